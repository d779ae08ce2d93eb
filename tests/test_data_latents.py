"""Reading folders of latents: shares, damage, what the folder does not hold, memory, and the order of epochs."""

import dataclasses
import hashlib
import json
import pickle
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from benchmarks.data import measure_memory, write_synthetic
from iwin_dit.data import manifest
from iwin_dit.data.facts import check_made_from
from iwin_dit.data.latents import LatentDataset, LatentStore, check_fits, positions_to_indices
from iwin_dit.data.manifest import Manifest, Shard
from iwin_dit.training.batches import MicroBatches
from iwin_dit.training.data import share_of_process
from tests.latent_folders import CLIPS, SquareClips, contents, extraction, small_codec

CODEC = small_codec()


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """Forty images in eight shards of five: mean and deviation, no mirror images, float16."""
    folder = tmp_path_factory.mktemp("made") / "latents"
    extraction(CODEC, folder).run()
    return folder


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy of it to damage."""
    copy = tmp_path / "latents"
    copy.mkdir()
    for name, content in contents(made).items():
        (copy / name).write_bytes(content)
    return copy


def first_shard(folder: Path) -> Path:
    return folder / "00000-000.safetensors"


def vouch_for(path: Path) -> None:
    """Make the manifest say that a shard is as it should be."""
    listing = path.parent / "manifest.json"
    data = json.loads(listing.read_text())
    (entry,) = (shard for shard in data["shards"] if shard["file"] == path.name)
    entry["sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
    listing.write_text(json.dumps(data))


# --- reading


def test_reads_by_index(made):
    store = LatentStore(made)
    train, held_out = store.split(8, seed=0)
    assert (len(train), len(held_out)) == (32, 8)
    latents, labels = train.get([])
    assert (latents.shape, labels.shape) == ((0, 4, 4, 4), (0,))
    for bad in ([0, 32], [-1]):
        with pytest.raises(IndexError, match="from 0 to 31"):
            train.get(bad)
    with pytest.raises(ValueError, match=r"holds no mirror images: extract again with data.flips: true"):
        train.get([0], flips=torch.tensor([False]))


def test_noise_needs_a_posterior(tmp_path):
    extraction(CODEC, tmp_path, posterior="mean").run()
    train, _ = LatentStore(tmp_path).split(8, seed=0)
    with pytest.raises(ValueError, match=r"got data.posterior 'mean' in .*: extract again with mean_std"):
        train.get([0], noise=torch.zeros(1, 4, 4, 4))


def test_a_node_needs_the_files_of_its_share_alone(made, folder):
    whole = LatentStore(made)
    both = whole.split(8, seed=0)
    seen: list[list[int]] = [[], []]
    for share in range(3):
        kept = whole.manifest.files(share, 3)
        for path in folder.iterdir():
            path.unlink()
        for name in kept:
            (folder / name).write_bytes((made / name).read_bytes())
        parts = LatentStore(folder, share, 3).split(8, seed=0)
        for part, of_all, images in zip(parts, both, seen, strict=True):
            assert set(part.images // 5 % 3) <= {share}  # five images to a shard, so they are dealt in turn
            same = np.flatnonzero(np.isin(of_all.images, part.images))
            assert torch.equal(part.get(range(len(part)))[0], of_all.get(same)[0])
            images += part.images.tolist()
    assert [sorted(images) for images in seen] == [dataset.images.tolist() for dataset in both]

    (folder / kept[2]).unlink()
    rule = re.escape(f"(of share 2: what `python -m iwin_dit.data.manifest {folder} 2 3` prints)")
    with pytest.raises(ValueError, match=rf"lacks files {rule}:\n  {re.escape(kept[2])}$"):
        LatentStore(folder, 2, 3)
    with pytest.raises(ValueError, match=r"lacks files:\n  0"):
        LatentStore(folder)
    with pytest.raises(ValueError, match=r"at most 8 shares, one per shard; got share 0 of 9"):
        LatentStore(made, 0, 9)


def test_the_files_of_a_share_are_listed_for_copying(made, capsys):
    manifest.main([str(made), "1", "3"])
    assert capsys.readouterr().out.split() == LatentStore(made).manifest.files(1, 3)
    with pytest.raises(SystemExit):
        manifest.main([str(made), "3", "3"])
    assert "got share 3 of 3" in capsys.readouterr().err


def of_sizes(*counts: int) -> Manifest:
    """A manifest of shards of so many images, and nothing else."""
    blank = dict.fromkeys(field.name for field in dataclasses.fields(Manifest))
    return Manifest(**{**blank, "shards": tuple(Shard(Shard.name(i, 0), n, "") for i, n in enumerate(counts))})


def test_shares_hold_as_many_images(tmp_path, caplog):
    """Parts of ten images in files of eight and two: dealt by number, one share would hold four times the other."""
    assert [of_sizes(8, 2, 8, 2, 8, 2, 8, 2).share_of(k, 2) for k in range(2)] == [[0, 1, 4, 5], [2, 3, 6, 7]]
    assert [of_sizes(1, 9, 3, 3, 3).share_of(k, 2) for k in range(2)] == [[0, 1], [2, 3, 4]]
    assert [of_sizes(*[4] * 7).share_of(k, 3) for k in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]

    extraction(CODEC, tmp_path, shard_size=8).run()
    visits = np.zeros(40, dtype=int)
    for rank in range(2):
        train, held_out = LatentStore(tmp_path, rank, 2).split(0, seed=0)
        assert not len(held_out)
        batches = MicroBatches(train, 0, 4, num_processes=2, rank=rank, shares=2)
        for step in range(15):  # three epochs of forty, in steps of eight
            indices = positions_to_indices(batches.positions(step) // 2, len(train), 0, rank)
            np.add.at(visits, train.images[indices], 1)
    assert visits.tolist() == [3] * 40
    assert not caplog.text
    LatentStore(tmp_path, 0, 3).split(0, seed=0)
    assert "hold 12 to 16 training images, so those of the smallest are seen 33.3 % more often" in caplog.text


def test_a_share_without_training_images_is_refused(made):
    with pytest.raises(
        ValueError, match=r"all images of share \d of 8 are held out: lower data.holdout or data.shares"
    ):
        for share in range(8):
            LatentStore(made, share, 8).split(38, seed=0)


def test_shares_go_to_consecutive_processes():
    assert [share_of_process(rank, 4, 2) for rank in range(4)] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    with pytest.raises(ValueError, match=r"data.shares must divide the number of processes, got 3 for 4"):
        share_of_process(0, 4, 3)


def test_a_pickled_dataset_carries_no_latents(made):
    """What DataLoader sends to workers that are spawned."""
    train, _ = LatentStore(made).split(8, seed=0)
    sent = pickle.dumps(train)
    assert len(sent) < 1000 + train.images.nbytes
    assert torch.equal(pickle.loads(sent).get(range(32))[0], train.get(range(32))[0])


@pytest.mark.skipif(sys.platform != "linux", reason="asks the kernel for the memory of this process")
def test_latents_are_mapped_not_loaded(tmp_path):
    write_synthetic(tmp_path, 4096, shard_size=1024)  # 32 MiB
    train, _ = LatentStore(tmp_path, verify=False).split(8, seed=0)
    memory = measure_memory(train, batch=250, reads=50_000)  # a dozen epochs
    assert memory["highest"] - memory["first"] < 8 << 20


# --- damage


def test_damage_is_listed(folder):
    shards = sorted(folder.glob("0*.safetensors"))
    damaged = bytearray(shards[1].read_bytes())
    damaged[-1] ^= 1
    shards[1].write_bytes(damaged)
    shards[2].write_bytes(shards[2].read_bytes()[:-1])
    with pytest.raises(ValueError) as error:
        LatentStore(folder)
    assert re.findall(r"\n  (\S+): expected sha256 \w+, got \w+ \((\d+) bytes\)", str(error.value)) == [
        (shards[1].name, str(len(damaged))),
        (shards[2].name, str(len(damaged) - 1)),
    ]
    with pytest.raises(ValueError, match=rf"manifest says; .*:\n  {shards[2].name}: not a whole safetensors file"):
        LatentStore(folder, verify=False)  # reads headers alone
    shards[1].unlink()
    with pytest.raises(ValueError, match=rf"lacks files:\n  {shards[1].name}$"):
        LatentStore(folder)


@pytest.mark.parametrize("verify", [True, False])
@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda t: {**t, "latents": t["latents"].float()}, r"'latents': \('F32', \[5, 1, 2, 4, 4, 4\]\)"),
        (lambda t: {**t, "latents": t["latents"][:, :, :, :2].contiguous()}, r"got .*\[5, 1, 2, 2, 4, 4\]"),
        (lambda t: {"labels": t["labels"]}, r"expected tensors .*'latents'.*, got \{'labels': [^}]*\}$"),
    ],
    ids=["dtype", "shape", "key"],
)
def test_a_shard_of_another_kind_is_refused_by_its_header(folder, damage, message, verify):
    path = first_shard(folder)
    save_file(damage(load_file(path)), path)
    vouch_for(path)
    with pytest.raises(ValueError, match=message):
        LatentStore(folder, verify=verify)


def test_a_header_that_promises_too_much_allocates_nothing(folder):
    path = first_shard(folder)
    header = json.dumps({"latents": {"dtype": "F16", "shape": [10**12], "data_offsets": [0, 2 * 10**12]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(100))
    vouch_for(path)
    with pytest.raises(ValueError, match=rf"{path.name}: not a whole safetensors file"):
        LatentStore(folder)


def test_latents_that_are_not_finite_are_refused_by_name(folder):
    path = first_shard(folder)
    tensors = load_file(path)
    tensors["latents"][3, 0, 0, 1, 2, 2] = float("nan")
    save_file(tensors, path)
    vouch_for(path)
    store = LatentStore(folder)
    dataset = LatentDataset(store, np.arange(40))
    dataset.get([2, 4, 39])
    with pytest.raises(ValueError, match=r"got NaN or infinity:\n  00000-000.safetensors: latents of image 3$"):
        dataset.get([2, 3, 39])


class Payload:
    """Creates a file where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", ["00000-000.safetensors", "labels.safetensors", "manifest.json"])
def test_nothing_is_unpickled(name, folder, tmp_path):
    marker = tmp_path / "marker"
    (folder / name).write_bytes(pickle.dumps(Payload(marker)))
    with pytest.raises(ValueError, match=re.escape(name)):
        LatentStore(folder, verify=False)
    assert not marker.exists()


def test_bad_manifests(folder, tmp_path):
    with pytest.raises(ValueError, match=r"has no manifest\.json \(unfinished\? then start"):
        LatentStore(tmp_path)
    path = folder / "manifest.json"
    good = json.loads(path.read_text())
    for bad, message in (
        ({**good, "format_version": 2}, "expected format version 4, got 2: delete the folder and extract again"),
        ({**good, "format_version": 3, "latent_shape": [4, 1, 4, 4]}, "impossible values of latent_shape"),
        ({**good, "colour": "red"}, "colour"),
        ({key: value for key, value in good.items() if key != "vae_id"}, "vae_id"),
        ({**good, "dtype": "int8"}, "impossible values of dtype"),
        ({**good, "resolution": "eight", "flips": "no"}, "unexpected types of resolution, flips$"),
        ({**good, "resolution": True, "vae_id": None}, "unexpected types of resolution, vae_id$"),
        ({**good, "class_counts": [20.0, 20]}, "unexpected types of class_counts"),
        ({**good, "posterior": "all", "latent_shape": [4, 4.0]}, "unexpected types of latent_shape, posterior"),
        ({**good, "latent_shape": [4, 4]}, "impossible values of latent_shape"),
        ({**good, "latent_shape": [4, 1, 4, 4]}, "impossible values of latent_shape"),
        ({**good, "latent_shape": [], "clips": {}}, "is not a manifest of this version"),
        ({**good, "clips": {"frames": 3}}, "impossible values of latent_shape"),
        ({**good, "clips": {"frames": "three"}}, "unexpected types of clips"),
        ({**good, "source_settings": {"image_key": 1}}, "unexpected types of source_settings"),
        ({**good, "shards": [{**good["shards"][0], "count": 40.0}]}, "unexpected types of shards"),
        ({**good, "shards": [{**good["shards"][0], "file": "../x.safetensors", "count": 40}]}, "of file names"),
        ({**good, "class_counts": [1, 2]}, "impossible values of class_counts"),
        ({**good, "shards": []}, "shards"),
        ({**good, "latents_mean": [float("nan")] * 4}, "expected finite numbers, got NaN"),
    ):
        path.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=message):
            Manifest.load(folder)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not a manifest"):
        Manifest.load(folder)


def test_latents_from_before_clips_are_read(folder):
    path = folder / "manifest.json"
    now = Manifest.load(folder)
    before = {key: value for key, value in json.loads(path.read_text()).items() if key != "clips"}
    path.write_text(json.dumps({**before, "format_version": 3}))
    assert Manifest.load(folder) == now
    assert len(LatentStore(folder).labels) == now.count


# --- what a model and a configuration ask for


def test_check_fits_lists_each_difference(made):
    manifest = Manifest.load(made)
    fitting = {"vae_sha256": CODEC.stored_fingerprint(), "latent_channels": 4, "sample_size": (4, 4), "num_classes": 2}
    check_fits(manifest, **fitting)
    with pytest.raises(ValueError) as error:
        check_fits(manifest, vae_sha256="other", latent_channels=16, sample_size=(4, 8), num_classes=10)
    assert "VAE (sha256): model other" in str(error.value)
    assert "latent channels: model 16, latents 4" in str(error.value)
    assert "latent size: model (4, 8), latents (4, 4)" in str(error.value)
    with pytest.raises(ValueError, match=r"latent size: model \(3, 4, 4\), latents \(4, 4\)"):
        check_fits(manifest, **{**fitting, "sample_size": (3, 4, 4)})
    assert "classes: model 10, latents 2" in str(error.value)


def test_check_made_from_lists_each_difference(made):
    there = dataclasses.asdict(Manifest.load(made))
    same = {"source": "squares/", "source_settings": {}, "posterior": "mean_std", "flips": False, "dtype": "float16"}
    check_made_from(made, there, same)
    with pytest.raises(ValueError, match=r"latents in .* were made with other settings:\n") as error:
        check_made_from(made, there, {**same, "source": "circles", "posterior": "sample", "flips": True})
    assert str(error.value).splitlines()[1:-1] == [
        "  data.source: squares there, circles wanted",
        "  data.posterior: mean_std there, sample wanted",
        "  data.flips: False there, True wanted",
    ]
    with pytest.raises(ValueError, match=r"\n  data.image_key: None there, jpg wanted\n"):
        check_made_from(made, there, {**same, "source_settings": {"image_key": "jpg"}})


def test_how_clips_were_cut_is_compared_by_setting(made):
    images = dataclasses.asdict(Manifest.load(made))
    settings = {"frames": 3, "frame_rate": 8.0, "frame_stride": 1, "clips_per_video": 1}
    clips = {**images, "clips": settings}
    wanted = {"source": "squares", "source_settings": {}, "posterior": "mean", "flips": False}
    check_made_from(made, clips, {**wanted, "clips": settings})
    for there, here, lines in (
        (clips, {**settings, "frames": 4, "frame_rate": 8.5}, ["frames: 3 there, 4", "frame_rate: 8.0 there, 8.5"]),
        (images, settings, [f"{name}: None there, {value}" for name, value in settings.items()]),
        (clips, None, [f"{name}: {value} there, None" for name, value in settings.items()]),
    ):
        with pytest.raises(ValueError, match="were made with other settings") as error:
            check_made_from(made, there, {**wanted, "clips": here})
        assert str(error.value).splitlines()[1:-1] == [f"  data.{line} wanted" for line in lines]


class PairsOfClips(SquareClips):
    """Two to a video."""

    def label(self, index: int) -> int:
        return index // 2 % 2


def test_the_clips_of_a_video_are_on_one_side_of_a_split(tmp_path):
    clips = dataclasses.replace(CLIPS, clips_per_video=2)
    extraction(CODEC, tmp_path, PairsOfClips(), clips=clips, posterior="mean").run()
    store = LatentStore(tmp_path)
    train, held_out = store.split(8, seed=0)
    assert (len(train), len(held_out)) == (32, 8)
    assert not set(train.images // 2) & set(held_out.images // 2)
    assert train.get([0, 5])[0].shape == (2, 4, 3, 4, 4)
    with pytest.raises(
        ValueError, match=r"samples and holdout in whole groups of 2 .*got 40 samples and a holdout of 7"
    ):
        store.split(7, seed=0)


def test_latents_that_hold_more_serve_for_less(made):
    there = {**dataclasses.asdict(Manifest.load(made)), "flips": True}
    less = {"source": "squares", "source_settings": {}, "posterior": "mean", "flips": False}
    check_made_from(made, there, less)
    with pytest.raises(ValueError, match=r"were begun with .*\n  data.posterior: .*\n  data.flips: True there, False"):
        check_made_from(made, there, less, finished=False)


# --- the order of epochs


def test_positions_are_pure_and_epochs_are_permutations():
    positions = np.arange(35)
    indices = positions_to_indices(positions, 10, seed=5)
    epochs = indices[:30].reshape(3, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 3
    shuffled = np.random.default_rng(0).permutation(35)
    assert np.array_equal(positions_to_indices(shuffled, 10, seed=5), indices[shuffled])
    assert [positions_to_indices([p], 10, seed=5)[0] for p in positions] == indices.tolist()
    for other in ({"seed": 6}, {"seed": 5, "share": 1}):
        assert not np.array_equal(positions_to_indices(positions, 10, **other), indices)
    far = positions_to_indices([10**12 + 3], 10, seed=5)  # the state never grows
    assert 0 <= far[0] < 10


def test_the_order_stays_what_it_was():
    """Or else a resumed run would see some images twice."""
    epochs = [[6, 0, 1, 8, 3, 5, 4, 9, 7, 2], [2, 4, 3, 5, 6, 0, 9, 1, 8, 7]]
    assert positions_to_indices(range(20), 10, seed=5).reshape(2, 10).tolist() == epochs
