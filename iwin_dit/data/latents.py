"""Stored latents: a folder of safetensors shards and a manifest, its writer, its reader, and the order of an epoch.

Owns the format. The manifest lists every shard with its count and sha256, so that more shards per split, and more
tensors per shard, fit in. Knows nothing of models (they say their sizes to `check_fits`) and of training state, which
is one integer: the global sample position. Letters: B batch, C latent channels, h w latent cells, N images of a split.
"""

import dataclasses
import functools
import hashlib
import importlib.metadata
import itertools
import json
import logging
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from .codec import LatentCodec
from .sources import BrokenImageError, ImageSource, keyed_permutation, split_indices

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1
MANIFEST = "manifest.json"


@dataclasses.dataclass(frozen=True)
class Shard:
    """One safetensors file: `latents` (count, C, h, w) float32, raw stored latents, and `labels` (count,) int64.

    Attributes:
        file: Its name in the folder.
        count: Images in it.
        sha256: Of the file, in hex.
    """

    file: str
    count: int
    sha256: str


@dataclasses.dataclass(frozen=True)
class Split:
    """One split, `train` or `val`.

    Attributes:
        class_counts: Images stored per class, by label.
        shards: Its files, in the order of the split's indices.
    """

    class_counts: tuple[int, ...]
    shards: tuple[Shard, ...]

    @property
    def count(self) -> int:
        """Number of images stored."""
        return sum(shard.count for shard in self.shards)


@dataclasses.dataclass(frozen=True)
class Manifest:
    """What a folder of latents holds and what made it.

    Attributes:
        format_version: Of the folder; another one is refused.
        source: Where the images came from: "digits", or the folder as the writer was given it.
        class_names: Names by label.
        resolution: Side of the images, in pixels.
        latent_shape: (C, h, w).
        dtype: Of the latents on disk.
        vae_id: The folder or Hub id of the VAE.
        vae_sha256: `LatentCodec.fingerprint` of the VAE.
        holdout: Argument of `split_indices`.
        seed: Argument of `split_indices`.
        model_mean: C means of the *model* latents of the training split: about 0 if the VAE's statistics suit the data.
        model_std: C standard deviations of the same; about 1.
        broken: The images that were skipped; every count in the manifest is of what is stored.
        packages: Versions of what decoded and encoded.
        splits: By name, `train` and `val`.
    """

    format_version: int
    source: str
    class_names: tuple[str, ...]
    resolution: int
    latent_shape: tuple[int, int, int]
    dtype: str
    vae_id: str
    vae_sha256: str
    holdout: float | int
    seed: int
    model_mean: tuple[float, ...]
    model_std: tuple[float, ...]
    broken: tuple[str, ...]
    packages: dict[str, str]
    splits: dict[str, Split]

    def save(self, folder: Path) -> None:
        """Write `manifest.json` into `folder`."""
        (folder / MANIFEST).write_text(json.dumps(dataclasses.asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read `manifest.json` of `folder`.

        Args:
            folder: A folder that `write_latents` made.

        Returns:
            The manifest.

        Raises:
            ValueError: The file is missing, not JSON, of another format version, or has missing or unknown fields.
        """
        path = folder / MANIFEST
        if not path.is_file():
            raise ValueError(
                f"expected a folder of latents, got {folder}, which has no {MANIFEST} (an unfinished one?)"
            )
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["format_version"] != FORMAT_VERSION:
                raise ValueError(f"expected format version {FORMAT_VERSION}, got {data['format_version']}")
            splits = {
                name: Split(tuple(split["class_counts"]), tuple(Shard(**shard) for shard in split["shards"]))
                for name, split in data.pop("splits").items()
            }
            lists = {key: tuple(value) for key, value in data.items() if isinstance(value, list)}
            return cls(**{**data, **lists, "splits": splits})
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is not a manifest of this version: {type(error).__name__}: {error}") from error


def write_latents(
    source: ImageSource,
    codec: LatentCodec,
    out: Path,
    *,
    vae_id: str,
    holdout: float | int,
    seed: int,
    batch_size: int = 64,
    max_broken: int = 0,
    shard_size: int = 65_536,
) -> Manifest:
    """Encode a data set (posterior means) and write it as a folder of latents, which appears whole or not at all.

    Args:
        source: The images.
        codec: Encodes them, on the device of its VAE.
        out: The folder to make; it may exist only if it is empty.
        vae_id: Where the VAE can be found again (a folder or a Hub id); recorded.
        holdout: Held-out images, as for `split_indices`; they become the split `val`, the rest `train`.
        seed: Key of the split.
        batch_size: Images per encoder call.
        max_broken: How many unreadable images are skipped (named in the log and the manifest) before giving up.
        shard_size: Images per file, at most; also what is held in memory.

    Returns:
        The manifest that was written.

    Raises:
        ValueError: `out` is not empty, more than `max_broken` images are broken, a source's image has another size than
            it says, or a latent is NaN or infinite.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"expected a new or empty folder for the latents, got {out}; remove it or name another one")
    encoder = _Encoder(source, codec, batch_size, max_broken)
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    partial.mkdir(parents=True)
    try:
        splits = {
            name: _write_split(partial, name, indices, encoder, shard_size)
            for name, indices in zip(("train", "val"), split_indices(source.labels, holdout, seed), strict=True)
        }
        mean, std = _model_statistics(partial, splits["train"], codec)
        side = source.resolution // codec.stride
        manifest = Manifest(
            format_version=FORMAT_VERSION,
            source=source.description,
            class_names=source.class_names,
            resolution=source.resolution,
            latent_shape=(codec.latent_channels, side, side),
            dtype="float32",
            vae_id=vae_id,
            vae_sha256=codec.fingerprint(),
            holdout=holdout,
            seed=seed,
            model_mean=mean,
            model_std=std,
            broken=tuple(encoder.broken),
            packages={name: importlib.metadata.version(name) for name in ("diffusers", "numpy", "pillow", "torch")},
            splits=splits,
        )
        manifest.save(partial)
        partial.replace(out)
    except BaseException:  # Ctrl-C too: nothing half-made stays beside `out`
        shutil.rmtree(partial)
        raise
    return manifest


class _Encoder:
    """A source read through a codec, in batches; `broken` collects the images that could not be read."""

    def __init__(self, source: ImageSource, codec: LatentCodec, batch_size: int, max_broken: int) -> None:
        self.source, self.codec, self.batch_size, self.max_broken = source, codec, batch_size, max_broken
        self.broken: list[str] = []

    def batches(self, indices: Iterable[int]) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield stored latents (B, C, h, w) float32 and labels (B,) int64 of the readable images of `indices`."""
        readable = self._read(indices)
        while batch := list(itertools.islice(readable, self.batch_size)):
            numbers, images = zip(*batch, strict=True)
            pixels = torch.stack(images).to(self.codec.vae.device) / 127.5 - 1
            latents = self.codec.encode(pixels).cpu()
            if not latents.isfinite().all():
                raise ValueError(
                    f"the VAE (in {self.codec.vae.dtype}) gave NaN or infinite latents for some of the images "
                    f"{numbers[0]} to {numbers[-1]}; float32 usually helps"
                )
            yield latents, torch.tensor([self.source.labels[number] for number in numbers])

    def _read(self, indices: Iterable[int]) -> Iterator[tuple[int, torch.Tensor]]:
        for index in indices:
            try:
                image = self.source[index]
            except BrokenImageError as error:
                self.broken.append(str(error))
                logger.warning("skipped a broken image (%d so far): %s", len(self.broken), error)
                if len(self.broken) > self.max_broken:
                    listed = "\n  ".join(self.broken)
                    raise ValueError(
                        f"{len(self.broken)} broken images, max_broken is {self.max_broken}; mend or remove them, or "
                        f"raise the limit:\n  {listed}"
                    ) from error
            else:
                yield index, image


def _write_split(folder: Path, name: str, indices: np.ndarray, encoder: _Encoder, shard_size: int) -> Split:
    """Encode the images of `indices` into `<name>-00000.safetensors` and so on, `shard_size` images to a file."""
    shards: list[Shard] = []
    class_counts = torch.zeros(len(encoder.source.class_names), dtype=torch.int64)
    stream = iter(tqdm(indices.tolist(), desc=f"latents {name}", unit="image"))
    for _ in range(0, len(indices), shard_size):
        batches = list(encoder.batches(itertools.islice(stream, shard_size)))
        if not batches:  # every image of this shard is broken
            continue
        latents, labels = (torch.cat(tensors).contiguous() for tensors in zip(*batches, strict=True))
        class_counts += labels.bincount(minlength=len(class_counts))
        path = folder / f"{name}-{len(shards):05d}.safetensors"
        save_file({"latents": latents, "labels": labels}, path)
        shards.append(Shard(path.name, len(labels), _sha256(path)))
    if not shards:
        raise ValueError(f"none of the {len(indices)} images of the split {name!r} can be read; see the log")
    return Split(tuple(class_counts.tolist()), tuple(shards))


def _model_statistics(folder: Path, split: Split, codec: LatentCodec) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Per-channel mean and standard deviation of the model latents of a split, in float64, shard by shard."""
    moments = torch.zeros(3, codec.latent_channels, dtype=torch.float64)  # number, sum, sum of squares
    for shard in split.shards:
        latents = codec.normalize(load_file(folder / shard.file)["latents"]).double().transpose(0, 1).flatten(1)
        moments += torch.stack([torch.ones_like(latents), latents, latents.square()]).sum(dim=2)
    mean = moments[1] / moments[0]
    std = (moments[2] / moments[0] - mean.square()).sqrt()
    return tuple(mean.tolist()), tuple(std.tolist())


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class LatentDataset:
    """One split of a folder of latents, with random access; the latents stay memory-mapped on disk.

    Args:
        path: A folder that `write_latents` made.
        split: `train` or `val`.
        verify: Read every shard of the split once, to check its sha256; else only its size and header are checked.

    Raises:
        ValueError: No manifest, no such split, or shards that differ from the manifest (each problem is listed).
    """

    def __init__(self, path: Path, split: str, verify: bool = True) -> None:
        self.manifest = Manifest.load(path)
        if split not in self.manifest.splits:
            raise ValueError(f"expected a split of {sorted(self.manifest.splits)}, got {split!r} for {path}")
        shards = self.manifest.splits[split].shards
        problems = [problem for shard in shards for problem in _shard_problems(path, shard, self.manifest, verify)]
        if problems:
            raise ValueError(f"{path} does not hold what its manifest says; make it again:\n  " + "\n  ".join(problems))
        tensors = [load_file(path / shard.file) for shard in shards]
        self._latents = [shard["latents"] for shard in tensors]
        self.labels = torch.cat([shard["labels"] for shard in tensors])  # (N,) int64
        self._ends = np.cumsum([shard.count for shard in shards])

    def __len__(self) -> int:
        return len(self.labels)

    def get(self, indices: npt.ArrayLike) -> tuple[torch.Tensor, torch.Tensor]:
        """Read a batch.

        Args:
            indices: B integers from 0 to N - 1, in any order, repeated or not.

        Returns:
            Stored latents (B, C, h, w) float32 and labels (B,) int64, in the order of `indices`.

        Raises:
            IndexError: An index is out of range.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        if ((chosen < 0) | (chosen >= len(self))).any():
            raise IndexError(f"expected indices from 0 to {len(self) - 1}, got {chosen.min()} to {chosen.max()}")
        latents = torch.empty(len(chosen), *self.manifest.latent_shape)
        owner = np.searchsorted(self._ends, chosen, side="right")  # the shard of each index
        for number in np.unique(owner).tolist():
            rows = np.flatnonzero(owner == number)
            start = self._ends[number] - len(self._latents[number])
            latents[torch.from_numpy(rows)] = self._latents[number][torch.from_numpy(chosen[rows] - start)]
        return latents, self.labels[torch.from_numpy(chosen)]


def _shard_problems(folder: Path, shard: Shard, manifest: Manifest, verify: bool) -> list[str]:
    """What is wrong with a shard's file, checked in an order in which no damaged data is interpreted."""
    path = folder / shard.file
    if not path.is_file():
        return [f"{shard.file}: missing"]
    if verify and (digest := _sha256(path)) != shard.sha256:
        return [f"{shard.file}: expected sha256 {shard.sha256}, got {digest} ({path.stat().st_size} bytes)"]
    expected = {
        "labels": ("I64", [shard.count]),
        "latents": ("F32", [shard.count, *manifest.latent_shape]),
    }
    try:
        with safe_open(path, framework="pt") as file:
            found = {
                name: (part.get_dtype(), part.get_shape())
                for name in sorted(file.keys())
                for part in [file.get_slice(name)]
            }
    except SafetensorError as error:  # of another length than its header says, or no such file
        return [f"{shard.file}: {error}"]
    return [] if found == expected else [f"{shard.file}: expected tensors {expected}, got {found}"]


def check_fits(
    manifest: Manifest, *, vae_sha256: str, latent_channels: int, sample_size: Sequence[int], num_classes: int
) -> None:
    """Check, before training starts, that a folder of latents fits a model and its VAE.

    Args:
        manifest: The latents' manifest.
        vae_sha256: `LatentCodec.fingerprint` of the VAE that the samples will be decoded with.
        latent_channels: Channels C that the model takes.
        sample_size: Height and width of the latents that the model is built for.
        num_classes: Classes that the model knows, without the null class.

    Raises:
        ValueError: They differ; every difference is listed.
    """
    differences = size_differences(
        manifest.latent_shape,
        len(manifest.class_names),
        latent_channels=latent_channels,
        sample_size=sample_size,
        num_classes=num_classes,
    )
    if vae_sha256 != manifest.vae_sha256:
        differences.append(f"VAE (sha256): model {vae_sha256}, latents {manifest.vae_sha256}")
    if differences:
        raise ValueError("the latents do not fit the model:\n  " + "\n  ".join(differences))


def size_differences(
    latent_shape: tuple[int, int, int],
    classes: int,
    *,
    latent_channels: int,
    sample_size: Sequence[int],
    num_classes: int,
) -> list[str]:
    """List where latents, present or to be made, differ in size from what a model takes.

    Args:
        latent_shape: (C, h, w) of the latents.
        classes: Classes of the data.
        latent_channels: Channels C that the model takes.
        sample_size: Height and width of the latents that the model is built for.
        num_classes: Classes that the model knows, without the null class.

    Returns:
        One line per difference.
    """
    channels, height, width = latent_shape
    pairs = {
        "latent channels": (latent_channels, channels),
        "latent size": (tuple(sample_size), (height, width)),
        "classes": (num_classes, classes),
    }
    return [f"{name}: model {model}, latents {data}" for name, (model, data) in pairs.items() if model != data]


@functools.lru_cache(maxsize=4)
def _epoch_order(size: int, seed: int, epoch: int) -> np.ndarray:
    """Order of one epoch, (size,) int64, cached (a batch can touch two epochs) and therefore read-only."""
    order = keyed_permutation(size, seed, epoch)
    order.setflags(write=False)
    return order


def positions_to_indices(positions: npt.ArrayLike, dataset_size: int, seed: int) -> np.ndarray:
    """Dataset indices of global sample positions: the whole state of data loading is one integer.

    Position p is image number `p % dataset_size` of epoch `p // dataset_size`, whose order is a permutation keyed by
    (seed, epoch). A pure function: it does not matter who asks, in which order, or in batches of what size.

    Args:
        positions: B non-negative integers.
        dataset_size: Number of images N in the split.
        seed: Key of the order.

    Returns:
        Indices (B,), int64, for `LatentDataset.get`.
    """
    epochs, offsets = np.divmod(np.asarray(positions, dtype=np.int64), dataset_size)
    indices = np.empty_like(offsets)
    for epoch in np.unique(epochs).tolist():
        rows = epochs == epoch
        indices[rows] = _epoch_order(dataset_size, seed, epoch)[offsets[rows]]
    return indices
