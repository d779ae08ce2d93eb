"""Small sources of images and clips, and latents made of them, for the tests of the writer and of the reader."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image

from iwin_dit.data.clips import ClipSettings
from iwin_dit.data.codec import LatentCodec
from iwin_dit.data.encode import EncodeSettings
from iwin_dit.data.extract import Extraction
from iwin_dit.data.images import BrokenImageError
from iwin_dit.data.sources import ImageSource, Item
from iwin_dit.data.videos import BrokenVideoError

MEAN, STD = [0.1, 0.2, 0.3, 0.4], [1.0, 2.0, 3.0, 4.0]
CLIPS = ClipSettings(frames=3, frame_rate=8)


class Squares:
    """Forty random 8 x 8 images of two classes in four parts; some can be broken, all of them are counted."""

    description = "squares"
    fingerprint = "forty"
    num_ignored = 0
    class_names = ("even", "odd")
    num_parts = 4
    part_size = 10
    images = np.random.default_rng(0).integers(256, size=(40, 8, 8, 3), dtype=np.uint8)

    def __init__(self, broken: tuple[int, ...] = ()) -> None:
        self.broken = broken
        self.asked: list[int] = []

    def items(self, part: int) -> Iterator[Item]:
        for index in range(part * self.part_size, (part + 1) * self.part_size):
            self.asked.append(index)
            yield Item.of_one(f"square {index}", self.label(index), partial(self.read, index))

    def label(self, index: int) -> int:
        return index % 2

    def read(self, index: int) -> Image.Image | list[Image.Image]:
        if index in self.broken:
            raise BrokenImageError(f"square {index}: torn")
        return Image.fromarray(self.images[index])

    def pixels(self, indices: Any = slice(None)) -> torch.Tensor:
        """The images, or clips, as the VAE sees them."""
        return torch.from_numpy(self.images[indices]).movedim(-1, 1) / 127.5 - 1


class SquareClips(Squares):
    """Forty random clips of three such images: what `CLIPS` says."""

    images = np.random.default_rng(1).integers(256, size=(40, CLIPS.frames, 8, 8, 3), dtype=np.uint8)

    def read(self, index: int) -> list[Image.Image]:
        if index in self.broken:
            raise BrokenVideoError(f"square {index}: torn")
        return [Image.fromarray(frame) for frame in self.images[index]]


def small_codec() -> LatentCodec:
    """A random VAE of stride 2 with 4 latent channels."""
    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 8),
        norm_num_groups=4,
        latents_mean=MEAN,
        latents_std=STD,
        scaling_factor=1.0,
    )
    return LatentCodec(vae.eval())


def extraction(codec: LatentCodec, out: Path, source: ImageSource | None = None, **changes: Any) -> Extraction:
    """An extraction in eight shards of five squares, two batches each."""
    names = ("max_broken", "vae_id")
    arguments = {"vae_id": "tiny", **{name: changes.pop(name) for name in names if name in changes}}
    clips = CLIPS if isinstance(source, SquareClips) else None
    settings = EncodeSettings(**{"resolution": 8, "shard_size": 5, "batch_size": 3, "clips": clips, **changes})
    return Extraction(source or Squares(), codec, out, settings, **arguments)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def failing_after(calls: int, function: Callable[..., Any]) -> Callable[..., Any]:
    """A function that does its work so many times, and then stops the program dead."""
    left = iter(range(calls))

    def wrapped(*arguments: Any) -> Any:
        if next(left, None) is None:
            raise Killed
        return function(*arguments)

    return wrapped


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""
