"""Reading folders of latents: shares, damage, what the folder does not hold, memory, and the order of epochs."""

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

from benchmarks.data import anonymous_memory, write_synthetic
from iwin_dit.data import manifest
from iwin_dit.data.latents import LatentDataset, LatentStore, check_fits, positions_to_indices
from iwin_dit.data.manifest import Manifest
from iwin_dit.data.prepare import check_made_from
from iwin_dit.training.data import share_of_process
from tests.latent_folders import contents, extraction, small_codec

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
            assert set(part.images // 5 % 3) <= {share}  # five images to a shard
            same = np.flatnonzero(np.isin(of_all.images, part.images))
            assert torch.equal(part.get(range(len(part)))[0], of_all.get(same)[0])
            images += part.images.tolist()
    assert [sorted(images) for images in seen] == [dataset.images.tolist() for dataset in both]

    (folder / kept[2]).unlink()
    rule = "share 2 of 3: the shards whose number in the manifest is 2 modulo 3"
    with pytest.raises(ValueError, match=rf"lacks files \({rule}\):\n  {re.escape(kept[2])}$"):
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
    train.get(range(256))
    before = anonymous_memory()
    for start in range(0, 4000, 250):
        train.get(range(start, start + 250))
    assert anonymous_memory() - before < 8 << 20


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
        ({**good, "format_version": 1}, "expected format version 2, got 1: delete the folder and extract again"),
        ({**good, "colour": "red"}, "colour"),
        ({key: value for key, value in good.items() if key != "vae_id"}, "vae_id"),
        ({**good, "dtype": "int8"}, "impossible values of dtype"),
        ({**good, "class_counts": [1, 2]}, "impossible values of class_counts"),
        ({**good, "shards": []}, "shards"),
        ({**good, "model_mean": [float("nan")] * 4}, "expected finite numbers, got NaN"),
    ):
        path.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=message):
            Manifest.load(folder)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not a manifest"):
        Manifest.load(folder)


# --- what a model and a configuration ask for


def test_check_fits_lists_each_difference(made):
    manifest = Manifest.load(made)
    fitting = {"vae_sha256": CODEC.fingerprint(), "latent_channels": 4, "sample_size": (4, 4), "num_classes": 2}
    check_fits(manifest, **fitting)
    with pytest.raises(ValueError) as error:
        check_fits(manifest, vae_sha256="other", latent_channels=16, sample_size=(4, 8), num_classes=10)
    assert "VAE (sha256): model other" in str(error.value)
    assert "latent channels: model 16, latents 4" in str(error.value)
    assert "latent size: model (4, 8), latents (4, 4)" in str(error.value)
    assert "classes: model 10, latents 2" in str(error.value)


def test_check_made_from_lists_each_difference(made):
    manifest = Manifest.load(made)
    same = {"data.source": "squares/", "data.resolution": 8, "data.flips": False, "data.class_names": ("even", "odd")}
    check_made_from(made, manifest, same)
    with pytest.raises(ValueError) as error:
        check_made_from(made, manifest, {**same, "data.source": "circles", "data.posterior": "mean"})
    listed = str(error.value).splitlines()[1:-1]
    assert listed == [
        "  data.source: squares there, circles wanted",
        "  data.posterior: mean_std there, mean wanted",
    ]


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
    epochs = [[7, 8, 4, 3, 5, 6, 2, 0, 1, 9], [7, 6, 1, 8, 5, 4, 2, 0, 3, 9]]
    assert positions_to_indices(range(20), 10, seed=5).reshape(2, 10).tolist() == epochs
