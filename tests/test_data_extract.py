"""Latents written through a tiny VAE: their values, and the same bytes whoever wrote them and however often killed."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL, AutoencoderTiny
from PIL import Image

import extract_latents
from iwin_dit.data import extract
from iwin_dit.data.codec import LatentCodec
from iwin_dit.data.latents import LatentStore
from iwin_dit.data.manifest import DTYPES, Manifest
from iwin_dit.data.prepare import make_digits_vae
from iwin_dit.data.sources import ImageFolder, Item
from tests.latent_folders import (
    CLIPS,
    Killed,
    SquareClips,
    Squares,
    contents,
    extraction,
    failing_after,
    small_codec,
)
from tests.tools import tiny_vae

ROOT = Path(__file__).parents[1]
CODEC = small_codec()
PIXELS = Squares().pixels()


@pytest.fixture(scope="module")
def whole_of(tmp_path_factory) -> dict[type[Squares], Path]:
    """Extractions that nothing happened to, of images and of clips."""
    folders = {source: tmp_path_factory.mktemp("whole") / "latents" for source in (Squares, SquareClips)}
    for source, folder in folders.items():
        extraction(CODEC, folder, source(), flips=True).run()
    return folders


@pytest.fixture(scope="module")
def whole(whole_of) -> Path:
    """The one of images."""
    return whole_of[Squares]


# --- what is written


@pytest.mark.parametrize(
    ("posterior", "flips", "dtype", "source"),
    [
        ("mean_std", True, "float16", Squares),
        ("mean", True, "float32", Squares),
        ("mean_std", False, "bfloat16", Squares),
        ("mean_std", True, "float16", SquareClips),
        ("mean", False, "float32", SquareClips),
    ],
)
def test_round_trip(posterior, flips, dtype, source, tmp_path):
    extraction(CODEC, tmp_path, source(), posterior=posterior, flips=flips, dtype=dtype).run()
    manifest = Manifest.load(tmp_path)
    assert set(manifest.files()) == set(contents(tmp_path))
    assert [shard.file for shard in manifest.shards][:3] == [
        f"0000{i}.safetensors" for i in ("0-000", "0-001", "1-000")
    ]
    store = LatentStore(tmp_path)
    assert store.labels.tolist() == [0, 1] * 20
    train, held_out = store.split(8, seed=0)
    assert sorted([*train.images, *held_out.images]) == list(range(40))

    tolerance = {"atol": 1e-5, "rtol": 2 * torch.finfo(DTYPES[dtype][0]).eps}
    order = np.random.default_rng(0).integers(len(train), size=50)  # across shards, out of order, repeated
    pixels = source().pixels(train.images[order])
    mean, std = CODEC.encode_posterior(pixels)
    latents, labels = train.get(order)
    torch.testing.assert_close(latents, mean, **tolerance)
    assert labels.tolist() == (train.images[order] % 2).tolist() == train.labels[order].tolist()
    if flips:
        mirrored = torch.arange(50) % 3 == 0
        choice = mirrored.view(-1, *[1] * (mean.ndim - 1))
        expected = torch.where(choice, CODEC.encode(pixels.flip(-1)), mean)
        torch.testing.assert_close(train.get(order, flips=mirrored)[0], expected, **tolerance)
        assert not torch.allclose(expected, mean)
    if posterior == "mean_std":
        noise = torch.randn(mean.shape)
        tolerance["atol"] = 4 * tolerance["rtol"]
        torch.testing.assert_close(train.get(order, noise=noise)[0], mean + std * noise, **tolerance)


@pytest.mark.parametrize("source", [Squares, SquareClips])
def test_manifest_says_what_is_stored(whole_of, source):
    manifest = Manifest.load(whole_of[source])
    assert manifest.class_counts == (20, 20)
    if source is Squares:
        assert (manifest.latent_shape, manifest.clips) == ((4, 4, 4), None)
    else:
        settings = {"frames": 3, "frame_rate": 8.0, "frame_stride": 1, "clips_per_video": 1}
        assert (manifest.latent_shape, manifest.clips) == ((4, 3, 4, 4), settings)
    assert manifest.vae_sha256 == CODEC.stored_fingerprint()
    assert manifest.vae_config_sha256 == CODEC.config_fingerprint()
    assert (manifest.source_fingerprint, manifest.shard_size) == ("forty", 5)
    pixels = source().pixels()
    mean, std = CODEC.encode_posterior(torch.cat([pixels, pixels.flip(-1)]))
    others = (0, *range(2, mean.ndim))
    variance = mean.double().var(dim=others, correction=0) + std.double().square().mean(dim=others)
    assert manifest.latents_mean == pytest.approx(mean.mean(dim=others).tolist(), abs=1e-4)
    assert manifest.latents_std == pytest.approx(variance.sqrt().tolist(), rel=1e-3)


def test_others_may_read_what_the_umask_lets_them(whole):
    assert len({path.stat().st_mode for path in whole.iterdir()}) == 1  # safetensors alone would make files of mode 600


@pytest.mark.parametrize("source", [Squares, SquareClips])
def test_a_sample_depends_on_its_place_alone(source, tmp_path):
    """Not on the batch; and its noise is standard normal."""
    mean, std = CODEC.encode_posterior(source().pixels())
    latents = []
    for name, changes in {"a": {}, "b": {"batch_size": 4}}.items():
        extraction(CODEC, tmp_path / name, source(), posterior="sample", dtype="float32", **changes).run()
        train, held_out = LatentStore(tmp_path / name).split(8, seed=0)
        latents.append(torch.cat([train.get(range(32))[0], held_out.get(range(8))[0]]))
    order = np.concatenate([train.images, held_out.images])
    torch.testing.assert_close(latents[0], latents[1], atol=1e-5, rtol=1e-5)
    noise = (latents[0] - mean[order]) / std[order]
    assert noise.mean().abs() < 0.1
    assert noise.std() == pytest.approx(1, abs=0.05)


def test_broken_images_are_named_counted_and_limited(tmp_path, caplog):
    extraction(CODEC, tmp_path / "a", Squares(broken=(3, 14)), max_broken=2).run()
    manifest = Manifest.load(tmp_path / "a")
    assert manifest.broken == ("square 3", "square 14")
    assert (manifest.count, manifest.class_counts) == (38, (19, 19))
    assert LatentStore(tmp_path / "a").labels.tolist() == [i % 2 for i in range(40) if i not in (3, 14)]
    assert "skipped a broken image (2 so far): square 14: torn" in caplog.text

    with pytest.raises(ValueError, match=r"2 broken images, data.max_broken is 1; .*\n  square 3\n  square 14"):
        extraction(CODEC, tmp_path / "b", Squares(broken=(3, 14)), max_broken=1).run()
    with pytest.raises(ValueError, match=r"no image of squares could be read \(40 broken ones\)"):
        extraction(CODEC, tmp_path / "c", Squares(broken=tuple(range(40))), max_broken=40).run()


def test_broken_images_of_all_processes_are_limited_at_the_end(tmp_path):
    run_in_threads(tmp_path, 2, expected=ValueError, broken=(3, 14), max_broken=1)
    assert not (tmp_path / "manifest.json").exists()
    extraction(CODEC, tmp_path, Squares(broken=(3, 14)), max_broken=2, flips=True).run()  # all encoded already
    assert Manifest.load(tmp_path).count == 38


def test_latents_that_are_not_finite_name_the_images(tmp_path):
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    with torch.no_grad():
        vae.encoder.conv_in.bias[0] = float("nan")
    with pytest.raises(ValueError, match=r"the VAE \(in torch.float32\) gives NaN or .*:\n  square 0\n  square 1\n"):
        extraction(LatentCodec(vae), tmp_path / "a").run()
    codec = small_codec()
    with torch.no_grad():
        codec.vae.quant_conv.bias[0] = 1e5
    with pytest.raises(ValueError, match=r"overflow float16; set data.latents_dtype: float32:\n  square 0\n"):
        extraction(codec, tmp_path / "b").run()
    extraction(codec, tmp_path / "c", dtype="bfloat16").run()


def test_what_the_vae_cannot_do_is_refused(tmp_path):
    blocks = {"encoder_block_out_channels": (8,), "decoder_block_out_channels": (8,)}
    tiny = AutoencoderTiny(**blocks, num_encoder_blocks=(1,), num_decoder_blocks=(1,))
    with pytest.raises(ValueError, match=r"AutoencoderTiny has no posterior .* set data.posterior: mean"):
        extraction(LatentCodec(tiny), tmp_path).run()
    with pytest.raises(ValueError, match=r"data.resolution does not fit the VAE: expected height = k \* 2, .* got 7"):
        extraction(CODEC, tmp_path, resolution=7)
    with pytest.raises(ValueError, match=r"data.frames and data.resolution do not fit the VAE: .* got 7"):
        extraction(CODEC, tmp_path, SquareClips(), resolution=7)


def test_samples_of_another_size_than_the_settings_say_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected pixels \(3, 8, 8\) of square 0, got \(8, 8\)"):
        extraction(CODEC, tmp_path / "a", Squares(), clips=CLIPS).run()
    with pytest.raises(ValueError, match=r"expected pixels \(8, 8\) of square 0, got \(3, 8, 8\)"):
        extraction(CODEC, tmp_path / "b", SquareClips(), clips=None).run()


def test_decoding_reads_ahead_but_not_far(tmp_path):
    source = Squares()
    encoder = extraction(CODEC, tmp_path, source, shard_size=10, batch_size=2).encoder
    leads = []
    encoded = 0

    def advance(count: int) -> None:
        nonlocal encoded
        encoded += count
        leads.append(len(source.asked) - encoded)

    list(encoder.shards(0, advance))
    assert leads == [3, 3, 3, 2, 0]  # of at most four images


def test_every_thread_has_a_video_where_those_are_more_than_two_batches(tmp_path):
    """And its clips come out in their order, each with noise of its own place."""
    asked: list[int] = []

    def read(video: int) -> list[list[Image.Image]]:
        return [[Image.fromarray(frame) for frame in SquareClips.images[4 * video + clip]] for clip in range(4)]

    class Videos(SquareClips):
        num_parts = 1

        def items(self, part: int) -> Iterator[Item]:
            for video in range(10):
                asked.append(video)
                yield Item(f"video {video}", video % 2, partial(read, video), 4)

    ahead: list[int] = []
    settings = {"posterior": "sample", "dtype": "float32"}
    encoder = extraction(CODEC, tmp_path / "a", Videos(), shard_size=100, batch_size=1, **settings).encoder
    (shard,) = encoder.shards(0, lambda count: ahead.append(len(asked)))
    assert ahead[:2] == [4, 4]  # as many as threads, though two batches are two clips
    assert ahead[4] == 5  # the first one's clips are all encoded
    assert shard.labels.tolist() == [i // 4 % 2 for i in range(40)]

    class Clips(SquareClips):
        num_parts, part_size = 1, 40

    encoder = extraction(CODEC, tmp_path / "b", Clips(), shard_size=100, **settings).encoder
    (alone,) = encoder.shards(0, lambda count: None)
    torch.testing.assert_close(shard.latents, alone.latents, atol=1e-5, rtol=1e-5)


# --- killed, started again, and by several


@pytest.mark.parametrize("source", [Squares, SquareClips])
def test_killed_anywhere_it_ends_with_the_same_bytes(whole_of, source, tmp_path, monkeypatch):
    """Killed at every fifth write, now before a file has its name and now after it; of clips, at every thirteenth."""
    whole = whole_of[source]
    fsync = os.fsync
    writes = 2 * (8 + 4 + 3)  # a file and its folder: eight shards, four records, plan, labels and manifest
    for calls in range(0, writes, 5 if source is Squares else 13):
        out = tmp_path / str(calls)
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(os, "fsync", failing_after(calls, fsync))
            extraction(CODEC, out, source(), flips=True).run()
        with pytest.raises(ValueError, match=r"has no manifest\.json"):
            LatentStore(out)
        extraction(CODEC, out, source(), flips=True).run()
        assert contents(out) == contents(whole)
    with monkeypatch.context() as patch, pytest.raises(Killed):  # everything is there, but for a moment
        patch.setattr(os, "fsync", failing_after(writes - 1, fsync))
        extraction(CODEC, tmp_path / "last", source(), flips=True).run()
    extraction(CODEC, tmp_path / "last", source(), flips=True).run()
    assert contents(tmp_path / "last") == contents(whole)


def run_in_threads(out: Path, world: int, expected: type[Exception] | None = None, **changes) -> list[Squares]:
    """Processes of one launch, as threads."""
    barrier, errors = threading.Barrier(world), []
    sources = [Squares(changes.get("broken", ())) for _ in range(world)]

    def process(rank: int) -> None:
        options = {"max_broken": changes.get("max_broken", 0), "flips": True}
        try:
            extraction(CODEC, out, sources[rank], **options).run(rank, world, barrier.wait)
        except ValueError as error:
            errors.append(error)
            barrier.abort()
        except threading.BrokenBarrierError:  # another one has failed
            pass

    threads = [threading.Thread(target=process, args=(rank,)) for rank in range(world)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [type(error) for error in errors] == ([expected] if expected else [])
    return sources


def test_processes_share_the_work_and_write_the_same_bytes(whole, tmp_path):
    sources = run_in_threads(tmp_path, 3)
    assert contents(tmp_path) == contents(whole)
    assert [{index // 10 for index in source.asked} for source in sources] == [{0, 3}, {1}, {2}]


def test_other_settings_are_refused_once_a_part_is_finished(whole, tmp_path, monkeypatch):
    fsync = os.fsync
    for calls, finished in ((6, False), (8, True)):  # plan, two shards, record
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(os, "fsync", failing_after(calls, fsync))
            extraction(CODEC, tmp_path, posterior="sample").run()
        if not finished:  # a plan that nobody has acted on binds nobody
            extraction(CODEC, tmp_path, flips=True).run()
            assert contents(tmp_path) == contents(whole)
            shutil.rmtree(tmp_path)
    with pytest.raises(ValueError) as error:
        extraction(CODEC, tmp_path, batch_size=4, vae_id="other").run()
    listed = [line.strip() for line in str(error.value).splitlines()[1:-1]]
    assert listed == [
        "data.posterior: sample there, mean_std wanted",
        "data.vae: tiny there, other wanted",
        "data.encode_batch_size: 3 there, 4 wanted",
    ]


def test_a_source_that_changed_is_refused(tmp_path, monkeypatch):
    """Between two starts, and after the last."""

    def photos() -> ImageFolder:
        return ImageFolder(tmp_path / "photos", part_size=2)

    for name in ("a/1.png", "a/2.png", "b/1.png"):
        path = tmp_path / "photos" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(path)
    changed = r"\n  content of data.source: \w+ there, \w+ wanted\n"
    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "fsync", failing_after(6, os.fsync))  # plan, shard, record
        extraction(CODEC, tmp_path / "latents", photos()).run()
    (tmp_path / "photos" / "a" / "0.png").write_bytes(path.read_bytes())
    with pytest.raises(ValueError, match=changed):
        extraction(CODEC, tmp_path / "latents", photos()).run()
    (tmp_path / "photos" / "a" / "0.png").unlink()
    extraction(CODEC, tmp_path / "latents", photos()).run()
    path.write_bytes(path.read_bytes() + b"?")
    with pytest.raises(ValueError, match=changed):
        extraction(CODEC, tmp_path / "latents", photos()).run()


def test_a_record_of_another_plan_is_refused(tmp_path):
    """Of a process that outlived its launch: the part was encoded by another VAE, maybe."""

    orphan = extraction(CODEC, tmp_path, posterior="mean")
    record = tmp_path / "unfinished" / "00003.json"

    def overwrite() -> None:  # at the last barrier
        if record.is_file():
            orphan._encode_part(3, lambda count: None)

    with pytest.raises(ValueError, match=r"00003\.json was written by a process of an earlier extraction .*: end it"):
        extraction(CODEC, tmp_path).run(barrier=overwrite)
    assert not (tmp_path / "manifest.json").exists()


def test_more_processes_than_parts_are_pointed_out(tmp_path, caplog):
    extraction(CODEC, tmp_path, Squares(), flips=True).run(0, 1)
    assert not caplog.text
    extraction(CODEC, tmp_path, Squares(), flips=True).run(0, 5)
    assert "5 processes for 4 part(s) of squares, each done by one of them: lower data.shard_size" in caplog.text


def test_memory_does_not_grow_with_the_limit(tmp_path):
    extraction(CODEC, tmp_path, shard_size=10**6).run()
    assert [shard.count for shard in Manifest.load(tmp_path).shards] == [10] * 4


def test_a_complete_folder_is_left_alone_or_refused(whole):
    before = contents(whole)
    source = Squares()
    extraction(CODEC, whole, source, flips=True).run()
    assert source.asked == []
    extraction(CODEC, whole, source, batch_size=4, posterior="mean").run()  # which these serve for
    assert source.asked == []
    with pytest.raises(
        ValueError, match=r"made with.*\n  data.latents_dtype: .*\n  data.shard_size: 5 there, 6 wanted\n"
    ):
        extraction(CODEC, whole, shard_size=6, dtype="float32").run()
    assert contents(whole) == before


def test_a_folder_with_something_else_is_left_alone(tmp_path):
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        extraction(CODEC, tmp_path).run()
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        extraction(CODEC, tmp_path / "mine.txt").run()
    assert set(contents(tmp_path)) == {"mine.txt"}


def test_a_second_launch_is_refused(whole, tmp_path):
    def launch_another() -> None:
        with pytest.raises(ValueError, match=r"another process is extracting into .*: let it finish, or end it"):
            extraction(CODEC, tmp_path, flips=True).run()

    extraction(CODEC, tmp_path, flips=True).run(barrier=launch_another)
    assert contents(tmp_path) == contents(whole)


def test_a_machine_that_sees_another_folder_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(extract, "PATIENCE", 0.0)
    with pytest.raises(ValueError, match=r"plan\.json, which the main process wrote: do all machines see"):
        extraction(CODEC, tmp_path).run(rank=1, world=2)
    with pytest.raises(ValueError, match=r"parts \[1, 3\] never arrived"):
        extraction(CODEC, tmp_path).run(rank=0, world=2)


# --- the script


@pytest.fixture
def one_core(monkeypatch):
    """A thread more or less changes the last bits of a convolution, and the script takes all cores it may."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)


def on_cores(count: int) -> dict[str, Any]:
    """Options of a subprocess that may use so many cores."""
    cores = sorted(os.sched_getaffinity(0))[:count]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    return {"env": environment, "preexec_fn": lambda: os.sched_setaffinity(0, cores)}


def run_script(*arguments: str) -> None:
    AcceleratorState._reset_state(reset_partial_state=True)
    extract_latents.main(["--config", str(ROOT / "configs" / "digits.yaml"), *arguments])


@pytest.mark.slow
def test_script(one_core, digits_folder, tmp_path, caplog):
    caplog.set_level("INFO")
    data = ["--data.vae", str(digits_folder / "vae"), "--data.latents", str(tmp_path / "latents")]
    run_script(*data, "--dry-run")
    assert "shard_size: 4096" in caplog.text
    assert not (tmp_path / "latents").exists()
    run_script(*data, "--data.shard_size", "1000", "--data.flips", "true")
    assert "images       1,797 in 10 classes of 174 to 183; 0 broken ones skipped, 0 other" in caplog.text
    assert "4 x 8 x 8 float32, posterior mean, with mirror images" in caplog.text
    assert "WARNING: diffusion expects standard deviations near 1" in caplog.text  # the VAE is an untrained one
    with pytest.raises(SystemExit, match=r"latent size: model \(16, 16\), latents \(8, 8\)"):
        run_script(*data, "--model.sample_size", "16")
    with pytest.raises(SystemExit, match=r"error: .*made with other settings:\n  data.posterior: mean there"):
        run_script(*data, "--data.shard_size", "1000", "--data.flips", "true", "--data.posterior", "mean_std")
    for others in (["--overwrite"], ["--resume", "step-00000100"]):
        with pytest.raises(SystemExit, match=r"--overwrite and --resume are for train_dit.py; to extract again"):
            run_script(*data, *others)


def test_advice_that_the_vae_does_not_allow_is_not_given(whole):
    """`data.latent_statistics: data` is refused where the VAE keeps statistics per channel of its own."""
    with_own = extract_latents.summary(whole, CODEC, 0)
    assert "WARNING" in with_own
    assert with_own.endswith("AutoencoderKL normalises by statistics of its own, which do not suit this data")
    without = extract_latents.summary(whole, LatentCodec(tiny_vae()), 0)
    assert "Train with --data.latent_statistics data" in without


def test_digits_vae_of_another_split_is_refused(digits_folder, tmp_path):
    shutil.copytree(digits_folder / "vae", tmp_path / "vae")
    make_digits_vae(tmp_path / "vae", "digits", 10, 5)  # a VAE from elsewhere
    (tmp_path / "vae" / "split.json").write_text('{"data.holdout": 300, "data.split_seed": 0}')
    make_digits_vae(tmp_path / "vae", "digits", 300, 0)
    with pytest.raises(
        ValueError, match=r"on something else:\n  data.holdout: 300 there, 10 wanted\n  data.split_seed"
    ):
        make_digits_vae(tmp_path / "vae", "digits", 10, 5)
    with pytest.raises(ValueError, match=r"on something else:\n  data.source: digits there, moving_digits wanted\n"):
        make_digits_vae(tmp_path / "vae", "moving_digits", 300, 0)


@pytest.mark.slow
def test_two_processes_finish_what_a_killed_one_began(digits_folder, tmp_path, request):
    """And end with the bytes of one that nothing happened to."""
    arguments = [str(ROOT / "extract_latents.py"), "--config", str(ROOT / "configs" / "digits.yaml")]
    arguments += ["--data.vae", str(digits_folder / "vae"), "--data.shard_size", "50", "--data.encode_batch_size", "10"]
    arguments += ["--data.posterior", "mean_std", "--data.flips", "true", "--data.latents"]
    out = tmp_path / "killed"
    one = subprocess.Popen([sys.executable, *arguments, str(out)], **on_cores(1))
    while len(list(out.glob("unfinished/[0-9]*.json"))) < 5 and one.poll() is None:
        time.sleep(0.01)
    one.send_signal(signal.SIGKILL)
    assert one.wait() == -signal.SIGKILL
    assert not (out / "manifest.json").exists()

    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"]
    subprocess.run([*two, *arguments, str(out)], **on_cores(2), check=True, timeout=120)
    request.getfixturevalue("one_core")
    run_script(*arguments[3:], str(tmp_path / "whole"))
    assert contents(out) == contents(tmp_path / "whole")
