"""Latent folders written through a tiny VAE and read back, and the order of epochs."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import load_file, save_file

from iwin_dit.data.codec import LatentCodec
from iwin_dit.data.latents import LatentDataset, Manifest, check_fits, positions_to_indices, write_latents
from iwin_dit.data.sources import BrokenImageError, split_indices


class Squares:
    """Forty 8x8 squares of two classes; some can be broken."""

    description = "squares"
    resolution = 8
    class_names = ("dark", "bright")
    labels = (0, 1) * 20

    def __init__(self, broken: tuple[int, ...] = ()) -> None:
        self.broken = broken

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> torch.Tensor:
        if index in self.broken:
            raise BrokenImageError(f"square-{index}.png: torn")
        return torch.full((3, 8, 8), 5 * index, dtype=torch.uint8)


@pytest.fixture(scope="module")
def codec() -> LatentCodec:
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latents_mean=[0.1, 0.2, 0.3, 0.4],
        latents_std=[1.0, 2.0, 3.0, 4.0],
        scaling_factor=1.0,
    )
    return LatentCodec(vae.eval())


def write(codec: LatentCodec, out: Path, source: Squares | None = None, max_broken: int = 0) -> Manifest:
    return write_latents(
        source or Squares(),
        codec,
        out,
        vae_id="tiny",
        holdout=8,
        seed=0,
        batch_size=3,
        max_broken=max_broken,
        shard_size=10,
    )


def test_round_trip(codec: LatentCodec, tmp_path: Path) -> None:
    manifest = write(codec, tmp_path / "latents")
    files = {path.name for path in (tmp_path / "latents").iterdir()}
    assert files == {"manifest.json", "val-00000.safetensors", *(f"train-0000{i}.safetensors" for i in range(4))}
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]

    split = dict(zip(("train", "val"), split_indices(Squares.labels, 8, 0), strict=True))
    for name, indices in split.items():
        dataset = LatentDataset(tmp_path / "latents", name)
        assert dataset.manifest == manifest
        assert len(dataset) == len(indices) == manifest.splits[name].count
        order = np.random.default_rng(0).integers(len(dataset), size=50)  # across shards, out of order, repeated
        latents, labels = dataset.get(order)
        pixels = torch.stack([Squares()[i] for i in indices[order].tolist()]) / 127.5 - 1
        torch.testing.assert_close(latents, codec.encode(pixels), atol=1e-5, rtol=1e-5)
        assert labels.tolist() == [Squares.labels[i] for i in indices[order]]
        with pytest.raises(IndexError, match=f"0 to {len(dataset) - 1}"):
            dataset.get([0, len(dataset)])
        with pytest.raises(IndexError):
            dataset.get([-1])


def test_manifest_says_what_is_stored(codec: LatentCodec, tmp_path: Path) -> None:
    manifest = write(codec, tmp_path / "latents")
    assert manifest.splits["train"].class_counts == (16, 16)
    assert manifest.splits["val"].class_counts == (4, 4)
    assert manifest.latent_shape == (4, 4, 4)
    assert manifest.vae_sha256 == codec.fingerprint()
    model = codec.normalize(LatentDataset(tmp_path / "latents", "train").get(range(32))[0]).double()
    std, mean = torch.std_mean(model, dim=(0, 2, 3), correction=0)
    assert manifest.model_mean == pytest.approx(mean.tolist())
    assert manifest.model_std == pytest.approx(std.tolist())


def test_broken_images_are_named_counted_and_limited(codec: LatentCodec, tmp_path: Path) -> None:
    manifest = write(codec, tmp_path / "latents", Squares(broken=(3, 4)), max_broken=2)
    assert sorted(manifest.broken) == ["square-3.png: torn", "square-4.png: torn"]
    assert sum(split.count for split in manifest.splits.values()) == 38
    assert sum(len(LatentDataset(tmp_path / "latents", name)) for name in ("train", "val")) == 38
    with pytest.raises(ValueError, match="none of the 8 images of the split 'val'"):
        write(codec, tmp_path / "other", Squares(tuple(split_indices(Squares.labels, 8, 0)[1])), max_broken=40)
    with pytest.raises(ValueError, match=r"max_broken is 1; .*\n  square-.*\n  square-"):
        write(codec, tmp_path / "other", Squares(broken=(3, 4)), max_broken=1)
    assert [path.name for path in tmp_path.iterdir()] == ["latents"]  # nothing half-made is left


def test_writing_over_something_is_refused(codec: LatentCodec, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").touch()
    with pytest.raises(ValueError, match="expected a new or empty folder"):
        write(codec, tmp_path)


def test_not_finite_latents_are_refused(codec: LatentCodec, tmp_path: Path) -> None:
    vae = AutoencoderKL(block_out_channels=(8,), norm_num_groups=4)
    with torch.no_grad():
        vae.encoder.conv_in.bias[0] = float("nan")
    with pytest.raises(ValueError, match="NaN or infinite latents"):
        write(LatentCodec(vae), tmp_path / "latents")


def test_damage_is_listed(codec: LatentCodec, tmp_path: Path) -> None:
    folder = tmp_path / "latents"
    write(codec, folder)
    with pytest.raises(ValueError, match=r"\['train', 'val'\], got 'test'"):
        LatentDataset(folder, "test")

    data = json.loads((folder / "manifest.json").read_text())
    shards = [folder / shard["file"] for shard in data["splits"]["train"]["shards"]]
    shards[0].unlink()
    damaged = bytearray(shards[1].read_bytes())
    damaged[-1] ^= 1
    shards[1].write_bytes(damaged)
    tensors = load_file(shards[2])
    save_file({"latents": tensors["latents"][:, :2].contiguous(), "labels": tensors["labels"]}, shards[2])
    data["splits"]["train"]["shards"][2]["sha256"] = hashlib.sha256(shards[2].read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(data))
    with pytest.raises(
        ValueError, match=r"(?s)00000.*: missing\n.*00001.*: expected sha256 .*\n.*00002.*\[10, 2, 4, 4\]"
    ):
        LatentDataset(folder, "train")
    assert len(LatentDataset(folder, "val")) == 8
    shards[1].write_bytes(damaged[:-1])
    with pytest.raises(ValueError, match=r"(?s)00000.*: missing\n  train-00001[^\n]*: [^\n]*\n.*00002"):
        LatentDataset(folder, "train", verify=False)  # reads headers alone


def test_bad_manifests(codec: LatentCodec, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no manifest\.json"):
        LatentDataset(tmp_path, "train")
    folder = tmp_path / "latents"
    write(codec, folder)
    path = folder / "manifest.json"
    good = json.loads(path.read_text())
    for bad, message in (
        ({**good, "format_version": 2}, "expected format version 1, got 2"),
        ({**good, "colour": "red"}, "colour"),
        ({key: value for key, value in good.items() if key != "vae_id"}, "vae_id"),
    ):
        path.write_text(json.dumps(bad))
        with pytest.raises(ValueError, match=message):
            Manifest.load(folder)
    path.write_text("{")
    with pytest.raises(ValueError, match="is not a manifest"):
        Manifest.load(folder)


def test_check_fits_lists_each_difference(codec: LatentCodec, tmp_path: Path) -> None:
    manifest = write(codec, tmp_path / "latents")
    fitting = {"vae_sha256": codec.fingerprint(), "latent_channels": 4, "sample_size": (4, 4), "num_classes": 2}
    check_fits(manifest, **fitting)
    with pytest.raises(ValueError) as error:
        check_fits(manifest, vae_sha256="other", latent_channels=16, sample_size=(4, 8), num_classes=10)
    assert "VAE (sha256): model other" in str(error.value)
    assert "latent channels: model 16, latents 4" in str(error.value)
    assert "latent size: model (4, 8), latents (4, 4)" in str(error.value)
    assert "classes: model 10, latents 2" in str(error.value)


def test_positions_are_pure_and_epochs_are_permutations() -> None:
    positions = np.arange(35)
    indices = positions_to_indices(positions, 10, seed=5)
    epochs = indices[:30].reshape(3, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs}) == 3
    shuffled = np.random.default_rng(0).permutation(35)
    assert np.array_equal(positions_to_indices(shuffled, 10, seed=5), indices[shuffled])
    assert [positions_to_indices([p], 10, seed=5)[0] for p in positions] == indices.tolist()
    assert not np.array_equal(positions_to_indices(positions, 10, seed=6), indices)
    far = positions_to_indices([10**12 + 3], 10, seed=5)  # the state never grows
    assert 0 <= far[0] < 10
