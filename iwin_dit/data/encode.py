"""From one part of a source to what is stored of it: decoding in threads, both views, posterior, dtype.

What comes out depends on source, VAE and settings, and in the last bits on the device and on torch's threads; not on
the process, on what it encoded before, or on how many threads decode. Knows nothing of files. A sample is an image or a
clip. Letters: B batch, T frames of a clip, R image side, C latent channels, s latent cells (h, w) or (t, h, w), V views
and P parts of a posterior as in `manifest`.
"""

import dataclasses
import itertools
import logging
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from .clips import ClipSettings
from .codec import LatentCodec
from .images import BrokenSampleError, centre_crop
from .manifest import DTYPES, Posterior, stored_shape
from .sources import ImageSource, Item, Picture

logger = logging.getLogger(__name__)

_NOISE_KEY = 0x706F7374  # sets the noise of posterior samples apart from whatever else is drawn by place


@dataclasses.dataclass(frozen=True)
class EncodeSettings:
    """What besides source and VAE decides the bytes of a folder of latents.

    Attributes:
        resolution: Side R of what is encoded, in pixels: every image or frame is resized and cropped by `centre_crop`.
        posterior: What is stored of the VAE's posterior: its mean, one sample, or mean and standard deviation.
        flips: Encode the mirror images too. (A mirrored latent is not the latent of the mirrored image.)
        dtype: Of the latents on disk, a key of `DTYPES`.
        shard_size: Samples per file, at most. Memory holds about three times that (2.7 times where it was measured):
            the batches, the file's tensor and what is being written.
        batch_size: Samples per call of the codec. Memory holds the pixels of four batches in bytes, as two are decoded
            ahead (and at least an item per thread), and of one in float32, with flips of two. Of 64 clips of 16 frames
            of 256 pixels, four batches are 0.8 GB in bytes, and each one in float32 is as much again.
        clips: How the clips of a source of clips were cut; None for images.
    """

    resolution: int
    posterior: Posterior = "mean_std"
    flips: bool = False
    dtype: str = "float16"
    shard_size: int = 4096
    batch_size: int = 64
    clips: ClipSettings | None = None

    @property
    def size(self) -> tuple[int, ...]:
        """Pixels of a sample: (R, R), or of a clip (T, R, R)."""
        frame = (self.resolution, self.resolution)
        return frame if self.clips is None else (self.clips.frames, *frame)

    @property
    def noun(self) -> str:
        """What a sample is called in messages: "image" or "clip"."""
        return "image" if self.clips is None else "clip"


class EncodedShard(NamedTuple):
    """What goes into one file, and what it adds to the statistics.

    `latents` (count, V, P, C, *s) in the stored dtype and `labels` (count,) int64, on the CPU; `sums` (2, C) float64:
    sums of the stored latents and of their squares, as expected over the posterior's noise.
    """

    latents: torch.Tensor
    labels: torch.Tensor
    sums: np.ndarray


class _Decoded(NamedTuple):
    """A decoded sample: its row in the part (broken ones counted), key, label and pixels ([T,] R, R, 3) uint8."""

    row: int
    key: str
    label: int
    pixels: np.ndarray


class PartEncoder:
    """Encodes parts of a source; `broken` collects the keys of the images or videos that could not be used.

    Args:
        source: The images or clips.
        codec: Encodes them, on the device of its VAE.
        settings: What decides the result.
        decode_threads: Threads that read and crop while the VAE works, an image or a video each, of which a thread
            holds all clips, with frames of full size.
        max_broken: How many broken images or videos are skipped, with a warning each, before giving up.

    Raises:
        ValueError: The VAE cannot encode samples of that size.
    """

    def __init__(
        self, source: ImageSource, codec: LatentCodec, settings: EncodeSettings, decode_threads: int, max_broken: int
    ) -> None:
        try:
            sizes = codec.latent_size(settings.size)
        except ValueError as error:
            names = "data.resolution does" if settings.clips is None else "data.frames and data.resolution do"
            raise ValueError(f"{names} not fit the VAE: {error}") from error
        self.source, self.codec, self.settings = source, codec, settings
        self.decode_threads, self.max_broken = decode_threads, max_broken
        self.latent_shape = (codec.latent_channels, *sizes)
        self.stored_shape = stored_shape(self.latent_shape, settings.posterior, settings.flips)
        self.broken: list[str] = []

    def shards(self, part: int, advance: Callable[[int], object]) -> Generator[EncodedShard, None, None]:
        """Encode one part; to be closed where it is not used up, which ends its threads.

        Args:
            part: Which.
            advance: Told the number of samples of every batch.

        Yields:
            Its files, full but for the last.

        Raises:
            ValueError: More than `max_broken` images or videos are broken in all parts so far, a sample is of another
                size than the settings say, or latents are not finite in the VAE's or the stored dtype.
        """
        with ThreadPoolExecutor(self.decode_threads) as pool:
            decoded = self._decoded(self.source.items(part), pool)
            while True:
                batches: list[torch.Tensor] = []
                labels: list[int] = []
                sums = np.zeros((2, self.codec.latent_channels))
                of_this_shard = itertools.islice(decoded, self.settings.shard_size)
                while batch := list(itertools.islice(of_this_shard, self.settings.batch_size)):
                    batches.append(self._encode(batch, part))
                    labels += [sample.label for sample in batch]
                    sums += self._sums(batches[-1])
                    advance(len(batch))
                if not labels:
                    return
                yield EncodedShard(_join(batches), torch.tensor(labels), sums)

    def check_broken(self, broken: Sequence[str]) -> None:
        """Raise a ValueError that lists the keys of broken images or videos, if they are more than `max_broken`."""
        if len(broken) > self.max_broken:
            raise ValueError(
                f"{len(broken)} broken {self._file_noun}s, data.max_broken is {self.max_broken}; mend or remove them, "
                "or raise the limit:\n  " + "\n  ".join(broken)
            )

    @property
    def _file_noun(self) -> str:
        return "image" if self.settings.clips is None else "video"

    def _decoded(self, items: Iterator[Item], pool: ThreadPoolExecutor) -> Iterator[_Decoded]:
        """Decode in threads, an item each, and yield the samples that can be used in their order.

        At most two batches are ahead; but a video more where one is less than that, so that every thread has one.
        """
        pending: deque[tuple[int, Item, Future[list[np.ndarray]]]] = deque()
        row = ahead = 0  # samples submitted, and those of them that are pending
        while True:
            while ahead < 2 * self.settings.batch_size or len(pending) < self.decode_threads:
                if (item := next(items, None)) is None:
                    break
                pending.append((row, item, pool.submit(self._pixels, item)))
                row, ahead = row + item.count, ahead + item.count
            if not pending:
                return
            first, item, decoding = pending.popleft()
            try:
                samples = decoding.result()
            except BrokenSampleError as error:
                self.broken.append(item.key)
                logger.warning("skipped a broken %s (%d so far): %s", self._file_noun, len(self.broken), error)
                self.check_broken(self.broken)
                samples = []
            ahead -= item.count
            for number, pixels in enumerate(samples):
                yield _Decoded(first + number, item.sample_key(number), item.label, pixels)

    def _pixels(self, item: Item) -> list[np.ndarray]:
        """Pixels ([T,] R, R, 3) uint8 of the samples of an item."""
        return [self._crop(item.sample_key(number), picture) for number, picture in enumerate(item.read())]

    def _crop(self, key: str, picture: Picture) -> np.ndarray:
        """Pixels ([T,] R, R, 3) uint8 of a sample."""
        frames = [picture] if isinstance(picture, Image.Image) else picture
        pixels = np.stack([np.asarray(centre_crop(frame, self.settings.resolution)) for frame in frames])
        pixels = pixels[0] if isinstance(picture, Image.Image) else pixels
        if pixels.shape[:-1] != self.settings.size:
            raise ValueError(f"expected pixels {self.settings.size} of {key}, got {pixels.shape[:-1]}")
        return pixels

    def _encode(self, batch: Sequence[_Decoded], part: int) -> torch.Tensor:
        """Encode a batch to what is stored of it: (B, V, P, C, *s) in the stored dtype, on the CPU."""
        samples = torch.from_numpy(np.stack([sample.pixels for sample in batch])).to(self.codec.vae.device)
        pixels = (samples.movedim(-1, 1) / 127.5).sub_(1)  # (B, 3, [T,] R, R)
        views = [pixels, pixels.flip(-1)] if self.settings.flips else [pixels]
        if self.settings.posterior == "mean":
            parts = [self.codec.encode(view)[:, None] for view in views]
        else:
            parts = [torch.stack(self.codec.encode_posterior(view), dim=1) for view in views]
        latents = torch.stack(parts, dim=1).cpu()  # (B, V, P, C, *s)
        if self.settings.posterior == "sample":
            noise = torch.stack([self._noise(part, sample.row) for sample in batch])[:, :, None]
            latents = latents[:, :, :1] + latents[:, :, 1:] * noise
        what = f"the VAE (in {self.codec.vae.dtype}) gives NaN or infinite latents"
        _check_finite(latents, batch, f"{what}; use another VAE, or remove these {self.settings.noun}s")
        stored = latents.to(DTYPES[self.settings.dtype][0])
        _check_finite(stored, batch, f"latents overflow {self.settings.dtype}; set data.latents_dtype: float32")
        return stored

    def _noise(self, part: int, row: int) -> torch.Tensor:
        """Noise (V, C, *s) of a posterior sample, keyed by its place in the part, so by neither batch nor process."""
        generator = np.random.Generator(np.random.PCG64((_NOISE_KEY, part, row)))
        shape = (self.stored_shape[0], *self.latent_shape)
        return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))

    def _sums(self, stored: torch.Tensor) -> np.ndarray:
        """The sums of `EncodedShard`; in numpy, whose sums do not depend on the number of threads."""
        mean = stored[:, :, 0].flatten(0, 1).double().numpy()  # (B * V, C, *s)
        others = (0, *range(2, mean.ndim))  # axes but for the channels
        squares = np.square(mean)
        if self.settings.posterior == "mean_std":
            squares += np.square(stored[:, :, 1].flatten(0, 1).double().numpy())
        return np.stack([mean.sum(axis=others), squares.sum(axis=others)])


def _join(batches: list[torch.Tensor]) -> torch.Tensor:
    """Concatenate and empty a list, so that memory holds hardly more than the result."""
    joined = torch.empty(sum(map(len, batches)), *batches[0].shape[1:], dtype=batches[0].dtype)
    end = len(joined)
    while batches:  # from the end, since memory that was taken last goes back first
        batch = batches.pop()
        joined[end - len(batch) : end] = batch
        end -= len(batch)
    return joined


def _check_finite(latents: torch.Tensor, batch: Sequence[_Decoded], message: str) -> None:
    """Raise a ValueError that names the samples of a batch (B, ...) whose latents are NaN or infinite."""
    finite = latents.isfinite().flatten(1).all(dim=1).tolist()
    keys = [sample.key for sample, is_finite in zip(batch, finite, strict=True) if not is_finite]
    if keys:
        raise ValueError(f"{message}:\n  " + "\n  ".join(keys))
