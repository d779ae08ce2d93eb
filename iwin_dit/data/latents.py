"""Reading stored latents: the shards of a folder or of one share of it, memory-mapped, and the order of an epoch.

Knows nothing of how latents are made, of models (they say their sizes to `check_fits`) and of training state, which is
one integer: the global sample position. What is called an image here is a clip where the latents are of clips. Letters:
B batch, C latent channels, s latent cells (h, w) or (t, h, w), N images, V views and P parts as in `manifest`.
"""

import functools
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from ..files import sha256
from .manifest import DTYPES, LABELS, Manifest, Shard
from .sources import keyed_permutation, split_indices

logger = logging.getLogger(__name__)

_HASH_THREADS = 4
_Tensors = dict[str, tuple[str, tuple[int, ...]]]  # safetensors' dtype and the shape of one image, by name


class LatentStore:
    """A folder of latents, opened for reading; only the files of one share need to lie there.

    Shards stay memory-mapped, and a pickled store reopens them: neither worker processes nor their start copy latents.

    Args:
        path: A folder that `Extraction` made.
        share: Which share of the shards to read, as `Manifest.share_of` deals them.
        shares: How many shares there are.
        verify: Read every shard of the share once, to check its sha256; else only size and header are checked.

    Raises:
        ValueError: No manifest, no such share, or files that are missing or differ from the manifest (all are listed).
    """

    def __init__(self, path: Path, share: int = 0, shares: int = 1, verify: bool = True) -> None:
        self.path, self.share, self.shares = path, share, shares
        self.manifest = Manifest.load(path)
        numbers = self.manifest.share_of(share, shares)
        _check_files(path, self.manifest, share, shares, verify)
        self.labels = load_file(path / LABELS)["labels"]  # (N,) int64, of all shares
        self.ends = np.cumsum([shard.count for shard in self.manifest.shards])  # of the shards, in images
        # (count, V, bytes of P * C * cells numbers) by shard number. As bytes, numpy copies a row in about 1 us in any
        # dtype; a gather of torch's costs as much per row and 10 us for each shard that a batch touches.
        self._rows = {
            number: load_file(path / self.manifest.shards[number].file)["latents"].view(torch.uint8).flatten(2).numpy()
            for number in numbers
        }

    def __reduce__(self) -> tuple[type["LatentStore"], tuple[Path, int, int, bool]]:
        return LatentStore, (self.path, self.share, self.shares, False)

    def split(self, holdout: float | int, seed: int) -> tuple["LatentDataset", "LatentDataset"]:
        """Open the training and the held-out images that lie in this share.

        Args:
            holdout: Held-out images of all shares, as for `split_indices`.
            seed: Key of the split.

        Returns:
            Both; the held-out one can be empty where there are many shares and few held-out images. The clips of a
            video are all in one of them.

        Raises:
            ValueError: `holdout` is out of range or no whole number of videos, or all images of this share are held
                out.
        """
        share_of_shard = np.empty(len(self.ends), dtype=np.int64)
        for share in range(self.shares):
            share_of_shard[self.manifest.share_of(share, self.shares)] = share
        shares = np.repeat(share_of_shard, [shard.count for shard in self.manifest.shards])  # of the images
        clips_per_video = int((self.manifest.clips or {}).get("clips_per_video", 1))
        train, held_out = split_indices(self.labels.numpy(), holdout, seed, clips_per_video)
        sizes = np.bincount(shares[train], minlength=self.shares)
        if not sizes[self.share]:
            raise ValueError(
                f"all images of share {self.share} of {self.shares} are held out: lower data.holdout or data.shares"
            )
        if sizes.max() > 1.01 * sizes.min():
            logger.warning(
                "the shares of %s hold %d to %d training images, so those of the smallest are seen %.1f %% more often "
                "than those of the largest; extract with a smaller data.shard_size, or lower data.shares",
                *(self.path, sizes.min(), sizes.max(), 100 * (sizes.max() / max(1, sizes.min()) - 1)),
            )
        mine = shares == self.share
        return LatentDataset(self, train[mine[train]]), LatentDataset(self, held_out[mine[held_out]])

    def read(self, images: np.ndarray, views: np.ndarray, parts: int) -> torch.Tensor:
        """Copy stored latents out of the shards.

        Args:
            images: (B,) int64, numbers of images of this share, counted over all shards.
            views: (B,) integers below V.
            parts: How many of the P parts, from the first.

        Returns:
            Stored latents (B, parts, C, *s), float32.

        Raises:
            ValueError: A number is NaN or infinite, which no writer of ours stores.
        """
        dtype, shape = DTYPES[self.manifest.dtype][0], (len(images), parts, *self.manifest.latent_shape)
        buffer = torch.empty(len(images), int(np.prod(shape[1:])) * dtype.itemsize, dtype=torch.uint8)
        shards = np.searchsorted(self.ends, images, side="right")
        rows = images - self.ends[shards]  # negative: counted from the end of the shard
        for out, shard, row, view in zip(buffer.numpy(), shards.tolist(), rows.tolist(), views.tolist(), strict=True):
            out[:] = self._rows[shard][row, view, : buffer.shape[1]]
        latents = buffer.view(dtype).view(shape).float()
        if len(images) and not all(bound.isfinite() for bound in latents.aminmax()):
            broken = np.flatnonzero(~latents.isfinite().flatten(1).all(dim=1).numpy())
            places = [f"{self.manifest.shards[shards[i]].file}: latents of image {images[i]}" for i in broken]
            raise ValueError(f"expected finite latents in {self.path}, got NaN or infinity:\n  " + "\n  ".join(places))
        return latents


class LatentDataset:
    """Some of the images of a store, such as one side of a split, with random access.

    Args:
        store: Where they lie.
        images: (N,) int64, their numbers in the store, all of its share.
    """

    def __init__(self, store: LatentStore, images: np.ndarray) -> None:
        self.store, self.images = store, images

    def __len__(self) -> int:
        return len(self.images)

    @property
    def manifest(self) -> Manifest:
        """Manifest of the store."""
        return self.store.manifest

    @property
    def labels(self) -> torch.Tensor:
        """Labels (N,) int64."""
        return self.store.labels[torch.from_numpy(self.images)]

    def get(
        self, indices: npt.ArrayLike, flips: torch.Tensor | None = None, noise: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Read a batch.

        Args:
            indices: B integers from 0 to N - 1, in any order, repeated or not; B may be 0.
            flips: (B,) booleans, which images to read mirrored; none by default.
            noise: (B, C, *s) standard normal, to draw from the posterior with; its mean by default. Only for
                posterior "mean_std".

        Returns:
            Stored latents (B, C, *s) float32 and labels (B,) int64, in the order of `indices`.

        Raises:
            IndexError: An index is out of range.
            ValueError: No mirror images or no standard deviations are stored, or a latent is not finite.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        if ((chosen < 0) | (chosen >= len(self))).any():
            raise IndexError(f"expected indices from 0 to {len(self) - 1}, got {chosen.min()} to {chosen.max()}")
        if flips is not None and not self.manifest.flips:
            raise ValueError(f"{self.store.path} holds no mirror images: extract again with data.flips: true")
        if noise is not None and self.manifest.posterior != "mean_std":
            raise ValueError(
                f"noise needs a posterior of mean and deviation, got data.posterior {self.manifest.posterior!r} in "
                f"{self.store.path}: extract again with mean_std"
            )
        images = self.images[chosen]
        views = np.zeros(len(chosen), dtype=np.int64) if flips is None else flips.long().numpy()
        stored = self.store.read(images, views, parts=1 if noise is None else 2)
        latents = stored[:, 0] if noise is None else torch.addcmul(stored[:, 0], stored[:, 1], noise)
        return latents, self.store.labels[torch.from_numpy(images)]


def _check_files(folder: Path, manifest: Manifest, share: int, shares: int, verify: bool) -> None:
    """Raise a ValueError that lists what a share lacks, or else what differs from the manifest."""
    missing = [file for file in manifest.files(share, shares) if not (folder / file).is_file()]
    if missing:
        rule = f" (of share {share}: what `python -m iwin_dit.data.manifest {folder} {share} {shares}` prints)"
        raise ValueError(f"{folder} lacks files{rule if shares > 1 else ''}:\n  " + "\n  ".join(missing))
    stored: _Tensors = {"latents": (DTYPES[manifest.dtype][1], manifest.stored_shape)}
    checks: list[tuple[Shard, _Tensors]] = [(Shard(LABELS, manifest.count, manifest.labels_sha256), {})]
    checks += [(manifest.shards[number], stored) for number in manifest.share_of(share, shares)]
    with ThreadPoolExecutor(_HASH_THREADS) as pool:  # hashing leaves the interpreter lock
        found = list(pool.map(lambda check: _problem(folder, verify, *check), checks))
    problems = [problem for problem in found if problem]
    if problems:
        raise ValueError(
            f"{folder} does not hold what its manifest says; restore or delete it:\n  " + "\n  ".join(problems)
        )


def _problem(folder: Path, verify: bool, shard: Shard, tensors: _Tensors) -> str | None:
    """What is wrong with a file, checked in an order in which no damaged data is interpreted or allocated for."""
    path = folder / shard.file
    if verify and (digest := sha256(path)) != shard.sha256:
        return f"{shard.file}: expected sha256 {shard.sha256}, got {digest} ({path.stat().st_size} bytes)"
    shapes: _Tensors = {"labels": ("I64", ()), **tensors}
    expected = {name: (dtype, [shard.count, *shape]) for name, (dtype, shape) in shapes.items()}
    try:
        with safe_open(path, framework="pt") as file:
            parts = {name: file.get_slice(name) for name in sorted(file.keys())}
            found = {name: (part.get_dtype(), part.get_shape()) for name, part in parts.items()}
    except SafetensorError as error:  # of another length than its header says, or no such file
        return f"{shard.file}: not a whole safetensors file ({error}, {path.stat().st_size} bytes)"
    return None if found == expected else f"{shard.file}: expected tensors {expected}, got {found}"


def check_fits(
    manifest: Manifest, *, vae_sha256: str, latent_channels: int, sample_size: Sequence[int], num_classes: int
) -> None:
    """Check, before training starts, that a folder of latents fits a model and its VAE.

    Args:
        manifest: The latents' manifest.
        vae_sha256: `LatentCodec.stored_fingerprint` of the VAE that the samples will be decoded with.
        latent_channels: Channels C that the model takes.
        sample_size: Cells (h, w) or (t, h, w) that the model is built for.
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
    latent_shape: tuple[int, ...],
    classes: int,
    *,
    latent_channels: int,
    sample_size: Sequence[int],
    num_classes: int,
) -> list[str]:
    """List where latents, present or to be made, differ in size from what a model takes.

    Args:
        latent_shape: (C, *s) of the latents.
        classes: Classes of the data.
        latent_channels: Channels C that the model takes.
        sample_size: Cells (h, w) or (t, h, w) that the model is built for.
        num_classes: Classes that the model knows, without the null class.

    Returns:
        One line per difference.
    """
    channels, *size = latent_shape
    pairs = {
        "latent channels": (latent_channels, channels),
        "latent size": (tuple(sample_size), tuple(size)),
        "classes": (num_classes, classes),
    }
    return [f"{name}: model {model}, latents {data}" for name, (model, data) in pairs.items() if model != data]


@functools.lru_cache(maxsize=2)
def _epoch_order(size: int, seed: int, epoch: int, share: int) -> np.ndarray:
    """Order of one epoch, (size,) int64, cached (a batch can touch two epochs) and therefore read-only."""
    order = keyed_permutation(size, seed, epoch, share)
    order.setflags(write=False)
    return order


def positions_to_indices(positions: npt.ArrayLike, dataset_size: int, seed: int, share: int = 0) -> np.ndarray:
    """Dataset indices of global sample positions: the whole state of data loading is one integer.

    Position p is image number `p % dataset_size` of epoch `p // dataset_size`, whose order is a permutation keyed by
    (seed, epoch, share). A pure function: it does not matter who asks, in which order, or in batches of what size.

    Args:
        positions: B non-negative integers.
        dataset_size: Number of images N in the split.
        seed: Key of the order.
        share: The share of the latents that the positions count, another key.

    Returns:
        Indices (B,), int64, for `LatentDataset.get`.
    """
    epochs, offsets = np.divmod(np.asarray(positions, dtype=np.int64), dataset_size)
    indices = np.empty_like(offsets)
    for epoch in np.unique(epochs).tolist():
        rows = epochs == epoch
        indices[rows] = _epoch_order(dataset_size, seed, epoch, share)[offsets[rows]]
    return indices
