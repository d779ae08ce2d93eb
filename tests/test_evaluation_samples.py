"""Samples by index: what decides them, what is recorded, and that what is kept is not sampled again."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from PIL import Image

from iwin_dit import IwinDiTPipeline
from iwin_dit.evaluation.samples import SCHEDULERS, SampledImages, Sampling, generator_seed, random_label, to_uint8
from iwin_dit.evaluation.saving import SavedArray, SavedImages, find_settings
from iwin_dit.metrics.images import ImageArray, ImageFiles
from tests.tools import tiny_model, tiny_vae

ABOUT = {"path": "runs/x", "weights": "ema", "weights_sha256": {"file": "0" * 64}, "step": 7}


@pytest.fixture(scope="module")
def pipe() -> IwinDiTPipeline:
    """Flow matching, ten classes, 16 x 16 images."""
    return IwinDiTPipeline(tiny_model(), tiny_vae(), FlowMatchEulerDiscreteScheduler(shift=2.0))


def samples(pipe: IwinDiTPipeline, count: int = 12, **settings) -> SampledImages:
    return SampledImages(pipe, count, Sampling(**{"steps": 2, **settings}), ABOUT)


def philox(*key: int) -> int:
    """First number of Philox4x64-10 (Salmon et al., SC 2011), from counter 1, where numpy begins."""
    counter, key = [1, 0, 0, 0], list(key)
    for _ in range(10):
        a, b = 0xD2E7470EE14C6C93 * counter[0], 0xCA5A826395121157 * counter[2]
        counter = [b >> 64 ^ counter[1] ^ key[0], b % 2**64, a >> 64 ^ counter[3] ^ key[1], a % 2**64]
        key = [(key[0] + 0x9E3779B97F4A7C15) % 2**64, (key[1] + 0xBB67AE8584CAA73B) % 2**64]
    return counter[0]


# --- what decides an image


@pytest.mark.parametrize("labels", ["balanced", "random"])
def test_image_i_depends_on_its_index_alone(pipe, labels):
    images = samples(pipe, labels=labels)
    together = images.read(range(12))
    assert together.shape == (12, 3, 16, 16)
    assert together.dtype == torch.uint8
    alone = torch.cat([images.read([i]) for i in (11, 3)])
    # 1e-4 of a float image can cross the border between two levels of grey
    assert (alone.int() - together[[11, 3]].int()).abs().max() <= 1
    assert len({image.numpy().tobytes() for image in together}) == 12


def test_noise_is_that_of_sample_py_and_seeds_share_none(pipe):
    ours = samples(pipe, steps=1).read([3, 4])
    generators = [torch.Generator().manual_seed(i) for i in (3, 4)]
    (theirs,) = pipe([3, 4], num_inference_steps=1, generator=generators, output_type="pt", return_dict=False)
    assert torch.equal(ours, to_uint8(theirs))
    last = generator_seed(4095, 2**20 - 1)
    assert last == 2**32 - 1  # all that torch's generator on the CPU tells apart
    seeds = [generator_seed(s, i) for s in (0, 1, 4095) for i in (0, 1, 2**20 - 1)]
    noise = [torch.randn(2, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    assert len({tuple(row.tolist()) for row in noise}) == 9
    assert not torch.equal(samples(pipe, steps=1, seed=1).read([0]), samples(pipe, steps=1).read([1]))


def test_balanced_labels_count_through_the_classes(pipe):
    assert samples(pipe).labels([0, 9, 10, 23]) == [0, 9, 0, 3]


def test_random_labels_are_a_function_of_seed_and_index(pipe):
    images = samples(pipe, labels="random", seed=5)
    labels = images.labels(range(2000))
    assert [images.labels([i])[0] for i in range(0, 2000, 97)] == labels[::97]
    assert samples(pipe, labels="random", seed=6).labels(range(2000)) != labels
    assert [random_label(5, i, 1000) for i in range(20)] == [philox(5, i) * 1000 >> 64 for i in range(20)]
    counts = np.bincount(labels, minlength=10)
    assert ((counts - 200) ** 2 / 200).sum() < 27.9  # chi-squared with 9 degrees of freedom: 0.1 % lie above


def test_rounding_is_that_of_a_png():
    images = torch.tensor([0.0, 0.5, 1.0, 100.49 / 255, 100.51 / 255])
    assert to_uint8(images).tolist() == [0, 128, 255, 100, 101]
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        to_uint8(torch.tensor([0.5, torch.nan]))


def test_a_model_that_gives_nan_is_an_error(pipe):
    broken = IwinDiTPipeline(tiny_model(), tiny_vae(), FlowMatchEulerDiscreteScheduler())
    torch.nn.init.constant_(next(broken.transformer.parameters()), torch.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        samples(broken).read([0])


# --- samplers


@pytest.mark.parametrize(
    ("own", "name"),
    [(FlowMatchEulerDiscreteScheduler(shift=2.0), name) for name in SCHEDULERS["flow_prediction"]]
    + [(DDPMScheduler(clip_sample=False), name) for name in SCHEDULERS["epsilon"]],
    ids=lambda value: value if isinstance(value, str) else type(value).__name__,
)
def test_every_scheduler_samples_and_is_recorded_as_used(own, name):
    pipe = IwinDiTPipeline(tiny_model(), tiny_vae(), own)
    images = samples(pipe, 2, scheduler=name, steps=4, guidance=1.0)
    first = images.read([0, 1])
    record = images.record()
    json.dumps(record, allow_nan=False)
    assert record["scheduler"]["class"] == f"{name}Scheduler"
    assert record["timesteps"] == images.scheduler.timesteps.tolist()
    if record["sigmas"] is not None:
        assert record["sigmas"] == images.scheduler.sigmas.tolist()
        assert record["sigmas"][-1] == 0
    config = images.scheduler.config
    if own.config.get("shift"):
        assert config.get("shift", config.get("flow_shift")) == 2.0
    assert pipe.scheduler is own
    assert torch.equal(images.read([0, 1]), first)  # a scheduler keeps nothing of an earlier call


def test_two_sets_share_a_pipeline(pipe):
    euler, unipc = samples(pipe, steps=3), samples(pipe, steps=3, scheduler="UniPCMultistep")
    first = euler.read([1])
    assert not torch.equal(unipc.read([1]), first)
    assert torch.equal(euler.read([1]), first)


def test_a_change_of_scheduler_and_back_keeps_the_shift(pipe):
    there = IwinDiTPipeline(tiny_model(), tiny_vae(), samples(pipe, scheduler="UniPCMultistep").scheduler)
    back = samples(there, scheduler="FlowMatchEulerDiscrete", steps=4)
    assert back.record()["sigmas"] == samples(pipe, steps=4).record()["sigmas"]


def test_the_record_and_the_name_say_the_settings(pipe):
    images = samples(pipe, seed=7, guidance_interval=(0.1, 0.9), guidance_channels=3, labels="random")
    assert images.name == "guidance 3 in [0.1, 0.9] on 3 channels, 2 steps, FlowMatchEulerDiscrete, random labels"
    record = images.record()
    assert record["path"] == "runs/x"
    assert (record["seeds"], record["image_size"], record["step"]) == ([7 * 2**20, 7 * 2**20 + 11], [16, 16], 7)
    assert record["transformer"]["num_layers"] == 2
    assert not any(key.startswith("_") for key in record["transformer"])
    assert (record["num_inference_steps"], record["guidance_scale"]) == (2, 3.0)  # the pipeline's own, as a number
    assert (record["guidance_interval"], record["guidance_channels"]) == ([0.1, 0.9], 3)
    assert record["labels"].startswith("random")
    assert (record["dtype"], record["vae"]["class"]) == ("float32", "AutoencoderKL")
    assert samples(pipe).request() == samples(pipe, count=99).request()
    assert samples(pipe).request() != samples(pipe, seed=1).request()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"scheduler": "DDIM"},
            "predicts 'flow_prediction': expected a scheduler of FlowMatchEuler.*, got 'DDIM'",
        ),
        ({"scheduler": "Karras"}, "got 'Karras'"),
        ({"steps": 0}, "num_inference_steps must be at least 1"),
        ({"guidance": 0.5}, "guidance_scale must be at least 1"),
        ({"guidance_interval": (0.9, 0.1)}, "guidance_interval must be"),
        ({"guidance_channels": 5}, "guidance_channels must be"),
        ({"labels": "sorted"}, "labels must be one of balanced, random, got 'sorted'"),
        ({"seed": -1}, "at least 0"),
        ({"seed": 4096}, "less than 4096"),
        ({"count": 2**20 + 1}, "at most 1048576 images"),
        ({"guidance": float("nan")}, "guidance_scale must be at least 1, .*, got nan"),
        ({"guidance": float("inf")}, "guidance_scale must be finite, got inf"),
    ],
)
def test_wrong_settings_are_refused_at_construction(pipe, settings, message):
    with pytest.raises(ValueError, match=message):
        samples(pipe, **settings)


def test_more_steps_than_the_scheduler_has_are_refused_at_construction():
    pipe = IwinDiTPipeline(tiny_model(), tiny_vae(), DDPMScheduler(clip_sample=False))
    with pytest.raises(ValueError, match="1000"):
        samples(pipe, steps=1001)


def test_one_set_of_weights_in_another_model_is_another_request(pipe):
    other = IwinDiTPipeline(tiny_model(num_attention_heads=1, attention_head_dim=16), tiny_vae(), pipe.scheduler)
    assert samples(pipe).request() != samples(other).request()


@pytest.mark.parametrize(
    "compile_model",
    [
        lambda model: model.compile_repeated_blocks(backend="eager"),
        lambda model: model.compile(backend="eager"),
        lambda model: torch.compile(model, backend="eager"),
    ],
    ids=["blocks", "in place", "wrapped"],
)
def test_compiled_samples_are_another_request_however_they_are_compiled(pipe, compile_model):
    model = tiny_model()
    wrapped = compile_model(model)
    other = IwinDiTPipeline(model if wrapped is None else wrapped, pipe.vae, pipe.scheduler)
    assert samples(pipe).request() | {"compiled": True} == samples(other).request()


def test_a_pipeline_without_vae_is_refused():
    with pytest.raises(ValueError, match="has no VAE"):
        samples(IwinDiTPipeline(tiny_model(), None, FlowMatchEulerDiscreteScheduler()))


# --- keeping them


def test_pngs_are_the_samples_and_are_not_sampled_again(pipe, tmp_path):
    images = samples(pipe)
    saved = SavedImages(images, tmp_path / "new" / "png")
    first = saved.read(range(12))
    assert torch.equal(first, images.read(range(12)))
    files = ImageFiles(saved.path, allow_lossy=False)
    assert [Path(name).name for name in files.names] == [f"{i:06}.png" for i in range(12)]
    assert torch.equal(files.read(range(12)), first)
    written = {path: path.stat().st_mtime_ns for path in saved.path.iterdir()}
    for index in (3, 8):
        (saved.path / f"{index:06}.png").unlink()
    again = SavedImages(samples(pipe), saved.path).read(range(12))
    assert (again.int() - first.int()).abs().max() <= 1  # sampled in another batch
    rewritten = [path.name for path in saved.path.iterdir() if path.stat().st_mtime_ns != written[path]]
    assert sorted(rewritten) == ["000003.png", "000008.png"]


def test_finish_keeps_what_an_earlier_attempt_only_measured(pipe, tmp_path):
    saved = SavedImages(samples(pipe), tmp_path)
    saved.read([4, 5])
    saved.finish(batch_size=5)
    assert len(ImageFiles(tmp_path, allow_lossy=False)) == 12


def test_a_folder_of_other_samples_is_refused(pipe, tmp_path):
    SavedImages(samples(pipe), tmp_path / "png")
    SavedImages(samples(pipe, count=50), tmp_path / "png")  # more of the same
    with pytest.raises(ValueError, match=r"guidance_scale is 3\.0 there, 1\.5 was asked for; seed is 0 there, 1 was"):
        SavedImages(samples(pipe, guidance=1.5, seed=1), tmp_path / "png")
    Image.new("RGB", (16, 16)).save(tmp_path / "000000.png")
    with pytest.raises(ValueError, match=r"expected an empty folder for the samples, or one with sampling\.json"):
        SavedImages(samples(pipe), tmp_path)


def test_a_broken_png_is_named(pipe, tmp_path):
    saved = SavedImages(samples(pipe), tmp_path)
    saved.read([0, 1])
    (tmp_path / "000000.png").write_bytes((tmp_path / "000000.png").read_bytes()[:-30])
    with pytest.raises(ValueError, match=r"000000\.png is broken .*: delete it, and it is sampled again"):
        saved.read([0])
    Image.new("L", (16, 16)).save(tmp_path / "000001.png")
    with pytest.raises(ValueError, match=r"expected .*000001\.png to be \(16, 16, 3\), got \(16, 16\)"):
        saved.read([1])


def test_the_archive_is_what_adms_evaluator_reads(pipe, tmp_path):
    file, images = tmp_path / "samples.npz", samples(pipe, labels="random")
    saved = SavedArray(images, file)
    saved.read([7, 2])
    assert not file.exists()
    rows = tmp_path / "samples.npz.partial" / "rows.bin"
    with rows.open("rb+") as damaged:  # half written when the power went
        damaged.seek(2 * (16 * 16 * 3 + 4) + 50)
        damaged.write(b"\x00" * 40)
    saved = SavedArray(samples(pipe, labels="random"), file)  # the next attempt
    kept = saved.read(range(12))
    saved.finish(batch_size=5)
    assert [path.name for path in tmp_path.iterdir()] == ["samples.npz"]
    with np.load(file, allow_pickle=False) as archive:
        assert archive.files == ["arr_0", "arr_1", "sampling"]
        assert archive["sampling"].shape == ()
        settings = json.loads(archive["sampling"].item())
        assert settings == find_settings(file) == {**images.request(), "count": 12}
        assert (archive["arr_0"].dtype, archive["arr_0"].shape) == (np.uint8, (12, 16, 16, 3))
        assert archive["arr_1"].tolist() == images.labels(range(12))
    assert torch.equal(ImageArray(file).read(range(12)), kept)
    assert (kept.int() - images.read(range(12)).int()).abs().max() <= 1


def test_an_archive_that_is_there_is_read_or_refused(pipe, tmp_path):
    file = tmp_path / "a.npz"
    saved = SavedArray(samples(pipe), file)
    kept = saved.read(range(12))
    saved.finish(batch_size=5)
    written = file.stat().st_mtime_ns
    again = SavedArray(samples(pipe), file)
    assert torch.equal(again.read([2, 11]), kept[[2, 11]])
    again.finish(batch_size=5)
    assert [path.name for path in tmp_path.iterdir()] == ["a.npz"]
    assert file.stat().st_mtime_ns == written
    with pytest.raises(ValueError, match=r"a\.npz was made with other settings: count is 12 there, 13 was asked for"):
        SavedArray(samples(pipe, count=13), file)
    np.savez(tmp_path / "b.npz", arr_0=np.zeros((12, 16, 16, 3), np.uint8))
    with pytest.raises(ValueError, match=r"b\.npz does not say how its images were sampled"):
        SavedArray(samples(pipe), tmp_path / "b.npz")


def test_an_archive_that_has_no_room_is_refused(pipe, tmp_path):
    images = samples(pipe, count=2**20)
    images.image_size = [2**14, 2**14]
    with pytest.raises(ValueError, match=rf"a\.npz takes {2**20 * 2**28 * 6} bytes until it is written, and \d+ are"):
        SavedArray(images, tmp_path / "a.npz")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("content", ["{", "[1]", '{"a": 1}'])
def test_damaged_settings_are_named(pipe, tmp_path, content):
    (tmp_path / "sampling.json").write_text(content)
    with pytest.raises(ValueError, match=r"damaged|no settings of samples that can be read") as caught:
        find_settings(tmp_path)
    assert str(tmp_path) in str(caught.value)
    with pytest.raises(ValueError, match=r"sampling\.json is damaged" if content != '{"a": 1}' else "a is 1 there"):
        SavedImages(samples(pipe), tmp_path)


def test_equal_samples_make_equal_archives(pipe, tmp_path):
    for name in ("a.npz", "b.npz"):
        SavedArray(samples(pipe), tmp_path / name).finish(batch_size=4)
    assert (tmp_path / "a.npz").read_bytes() == (tmp_path / "b.npz").read_bytes()


def test_an_unfinished_archive_of_other_samples_is_refused(pipe, tmp_path):
    SavedArray(samples(pipe), tmp_path / "a.npz")
    with pytest.raises(ValueError, match="count is 12 there, 13 was asked for"):
        SavedArray(samples(pipe, count=13), tmp_path / "a.npz")
