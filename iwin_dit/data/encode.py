"""From one part of an image source to what is stored of it: decoding in threads, both views, posterior, dtype.

What comes out depends on source, VAE and settings, and in the last bits on the device and on torch's threads; not on
the process, on what it encoded before, or on how many threads decode. Knows nothing of files. Letters: B batch, C
latent channels, h w latent cells, R image side, V views and P parts of a posterior as in `manifest`.
"""

import dataclasses
import itertools
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch

from .codec import LatentCodec
from .images import BrokenImageError, centre_crop
from .manifest import DTYPES, Posterior, stored_shape
from .sources import ImageSource, Sample

logger = logging.getLogger(__name__)

_NOISE_KEY = 0x706F7374  # sets the noise of posterior samples apart from whatever else is drawn by place


@dataclasses.dataclass(frozen=True)
class EncodeSettings:
    """What besides source and VAE decides the bytes of a folder of latents.

    Attributes:
        resolution: Side R of the images that are encoded, in pixels.
        posterior: What is stored of the VAE's posterior: its mean, one sample, or mean and standard deviation.
        flips: Encode the mirror images too. (A mirrored latent is not the latent of the mirrored image.)
        dtype: Of the latents on disk, a key of `DTYPES`.
        shard_size: Images per file, at most. Memory holds about three times that (2.7 times where it was measured):
            the batches, the file's tensor and what is being written.
        batch_size: Images per VAE call.
    """

    resolution: int
    posterior: Posterior = "mean_std"
    flips: bool = False
    dtype: str = "float16"
    shard_size: int = 4096
    batch_size: int = 64


class EncodedShard(NamedTuple):
    """What goes into one file, and what it adds to the statistics.

    `latents` (count, V, P, C, h, w) in the stored dtype and `labels` (count,) int64, on the CPU; `sums` (2, C) float64:
    sums of the stored latents and of their squares, as expected over the posterior's noise.
    """

    latents: torch.Tensor
    labels: torch.Tensor
    sums: np.ndarray


class _Image(NamedTuple):
    """A decoded image: its row in the part (broken ones counted), key, label and pixels (R, R, 3) uint8."""

    row: int
    key: str
    label: int
    pixels: np.ndarray


class PartEncoder:
    """Encodes parts of a source; `broken` collects the keys of the images that could not be read.

    Args:
        source: The images.
        codec: Encodes them, on the device of its VAE.
        settings: What decides the result.
        decode_threads: Threads that read and crop images while the VAE works.
        max_broken: How many broken images are skipped, with a warning each, before giving up.

    Raises:
        ValueError: The VAE cannot encode images of that size.
    """

    def __init__(
        self, source: ImageSource, codec: LatentCodec, settings: EncodeSettings, decode_threads: int, max_broken: int
    ) -> None:
        side, rest = divmod(settings.resolution, codec.stride)
        if rest:
            raise ValueError(
                f"data.resolution must be a multiple of {codec.stride}, the VAE's stride, got {settings.resolution}"
            )
        self.source, self.codec, self.settings = source, codec, settings
        self.decode_threads, self.max_broken = decode_threads, max_broken
        self.latent_shape = (codec.latent_channels, side, side)
        self.stored_shape = stored_shape(self.latent_shape, settings.posterior, settings.flips)
        self.broken: list[str] = []

    def shards(self, part: int, advance: Callable[[int], object]) -> Iterator[EncodedShard]:
        """Encode one part.

        Args:
            part: Which.
            advance: Told the number of images of every batch.

        Yields:
            Its files, full but for the last.

        Raises:
            ValueError: More than `max_broken` images are broken in all parts so far, or latents are not finite in the
                VAE's or the stored dtype.
        """
        with ThreadPoolExecutor(self.decode_threads) as pool:
            images = self._decoded(self.source.samples(part), pool)
            while True:
                batches: list[torch.Tensor] = []
                labels: list[int] = []
                sums = np.zeros((2, self.codec.latent_channels))
                of_this_shard = itertools.islice(images, self.settings.shard_size)
                while batch := list(itertools.islice(of_this_shard, self.settings.batch_size)):
                    batches.append(self._encode(batch, part))
                    labels += [image.label for image in batch]
                    sums += self._sums(batches[-1])
                    advance(len(batch))
                if not labels:
                    return
                yield EncodedShard(_join(batches), torch.tensor(labels), sums)

    def check_broken(self, broken: Sequence[str]) -> None:
        """Raise a ValueError that lists the keys of broken images, if they are more than `max_broken`."""
        if len(broken) > self.max_broken:
            raise ValueError(
                f"{len(broken)} broken images, data.max_broken_images is {self.max_broken}; mend or remove them, or "
                "raise the limit:\n  " + "\n  ".join(broken)
            )

    def _decoded(self, samples: Iterator[Sample], pool: ThreadPoolExecutor) -> Iterator[_Image]:
        """Decode in threads, at most two batches ahead, and yield the readable images in the order of the samples."""
        pending: deque[tuple[int, Sample, Future[np.ndarray]]] = deque()
        numbered = enumerate(samples)
        while True:
            for row, sample in itertools.islice(numbered, 2 * self.settings.batch_size - len(pending)):
                pending.append((row, sample, pool.submit(self._pixels, sample)))
            if not pending:
                return
            row, sample, decoding = pending.popleft()
            try:
                yield _Image(row, sample.key, sample.label, decoding.result())
            except BrokenImageError as error:
                self.broken.append(sample.key)
                logger.warning("skipped a broken image (%d so far): %s", len(self.broken), error)
                self.check_broken(self.broken)

    def _pixels(self, sample: Sample) -> np.ndarray:
        return np.asarray(centre_crop(sample.read(), self.settings.resolution))

    def _encode(self, batch: Sequence[_Image], part: int) -> torch.Tensor:
        """Encode a batch to what is stored of it: (B, V, P, C, h, w) in the stored dtype, on the CPU."""
        images = torch.from_numpy(np.stack([image.pixels for image in batch])).to(self.codec.vae.device)
        pixels = images.permute(0, 3, 1, 2) / 127.5 - 1
        views = [pixels, pixels.flip(-1)] if self.settings.flips else [pixels]
        if self.settings.posterior == "mean":
            parts = [self.codec.encode(view)[:, None] for view in views]
        else:
            parts = [torch.stack(self.codec.encode_posterior(view), dim=1) for view in views]
        latents = torch.stack(parts, dim=1).cpu()  # (B, V, P, C, h, w)
        if self.settings.posterior == "sample":
            noise = torch.stack([self._noise(part, image.row) for image in batch])[:, :, None]
            latents = latents[:, :, :1] + latents[:, :, 1:] * noise
        what = f"the VAE (in {self.codec.vae.dtype}) gives NaN or infinite latents"
        _check_finite(latents, batch, f"{what}; use another VAE, or remove these images")
        stored = latents.to(DTYPES[self.settings.dtype][0])
        _check_finite(stored, batch, f"latents overflow {self.settings.dtype}; set data.latents_dtype: float32")
        return stored

    def _noise(self, part: int, row: int) -> torch.Tensor:
        """Noise (V, C, h, w) of a posterior sample, keyed by the image's place, so by neither batch nor process."""
        generator = np.random.Generator(np.random.PCG64((_NOISE_KEY, part, row)))
        shape = (self.stored_shape[0], *self.latent_shape)
        return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))

    def _sums(self, stored: torch.Tensor) -> np.ndarray:
        """The sums of `EncodedShard`; in numpy, whose sums do not depend on the number of threads."""
        mean = stored[:, :, 0].flatten(0, 1).double().numpy()  # (B * V, C, h, w)
        squares = np.square(mean)
        if self.settings.posterior == "mean_std":
            squares += np.square(stored[:, :, 1].flatten(0, 1).double().numpy())
        return np.stack([mean.sum(axis=(0, 2, 3)), squares.sum(axis=(0, 2, 3))])


def _join(batches: list[torch.Tensor]) -> torch.Tensor:
    """Concatenate and empty a list, so that memory holds hardly more than the result."""
    joined = torch.empty(sum(map(len, batches)), *batches[0].shape[1:], dtype=batches[0].dtype)
    end = len(joined)
    while batches:  # from the end, since memory that was taken last goes back first
        batch = batches.pop()
        joined[end - len(batch) : end] = batch
        end -= len(batch)
    return joined


def _check_finite(latents: torch.Tensor, batch: Sequence[_Image], message: str) -> None:
    """Raise a ValueError that names the images of a batch (B, ...) whose latents are NaN or infinite."""
    finite = latents.isfinite().flatten(1).all(dim=1).tolist()
    keys = [image.key for image, is_finite in zip(batch, finite, strict=True) if not is_finite]
    if keys:
        raise ValueError(f"{message}:\n  " + "\n  ".join(keys))
