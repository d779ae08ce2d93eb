"""Image sources: what an image data set is to this project, the folder of class folders, and the held-out split.

An image leaves a source as a uint8 tensor (3, R, R), square, RGB; R is the source's resolution. Nothing here knows of
latents, VAEs or models. Letters: R image side, N number of images.
"""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from PIL import Image, ImageOps
from torchvision.datasets.folder import find_classes, make_dataset

_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # the only decoders Pillow may try: the rare ones are where its holes are
_EXTENSIONS = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


class ImageSource(Protocol):
    """A labelled image data set with random access."""

    @property
    def description(self) -> str:
        """Where the images come from: `data.source` as the user gives it."""

    @property
    def resolution(self) -> int:
        """Side R of the images."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names by label."""

    @property
    def labels(self) -> Sequence[int]:
        """Class of each image, N values."""

    def __len__(self) -> int:
        """Count the images, broken ones included."""

    def __getitem__(self, index: int) -> torch.Tensor:
        """Read one image, uint8 (3, R, R); raises `BrokenImageError` where that fails."""


class BrokenImageError(ValueError):
    """An image that cannot be decoded; the message names the file. The reader decides how many of them to skip."""


class ImageFolder:
    """A folder of class folders of images: `root/<class name>/**/*.png`.

    Class names are the folders' names in sorted order. Files that are not named as images are left alone. For what
    becomes of an image see `to_rgb` and `centre_crop`.

    Args:
        root: The folder that holds the class folders.
        resolution: Side R of the images that come out.

    Raises:
        ValueError: The folder is missing, has no class folders, or a class folder has no images.
    """

    def __init__(self, root: Path, resolution: int) -> None:
        if not root.is_dir():
            raise ValueError(f"expected a folder of class folders, got {root}, which is not a folder")
        if not any(entry.is_dir() for entry in root.iterdir()):
            raise ValueError(f"expected class folders in {root} (root/<class name>/image.png), found no folder there")
        names, class_to_index = find_classes(str(root))
        samples = make_dataset(str(root), class_to_index, extensions=_EXTENSIONS, allow_empty=True)
        empty = sorted(set(range(len(names))) - {label for _, label in samples})
        if empty:
            raise ValueError(
                f"no images ({', '.join(_EXTENSIONS)}) in these class folders of {root}: "
                f"{', '.join(names[label] for label in empty)}; fill or remove them"
            )
        self.description = str(root)
        self.resolution = resolution
        self.class_names = tuple(names)
        self.paths = [Path(path) for path, _ in samples]
        self.labels = [label for _, label in samples]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> torch.Tensor:
        image = centre_crop(read_image(self.paths[index]), self.resolution)
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous()


def read_image(path: Path) -> Image.Image:
    """Read one image file as RGB.

    Args:
        path: A PNG, JPEG, WEBP or BMP file, whatever its name says; of an animation, the first frame.

    Returns:
        The RGB image, upright (EXIF orientation applied).

    Raises:
        BrokenImageError: Not such a file, truncated, or larger than Pillow's pixel limit (about 89 million).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=_FORMATS) as image:
                return to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # on damaged files Pillow raises nearly anything: TypeError, SyntaxError, struct.error
        raise BrokenImageError(f"{path}: {type(error).__name__}: {error}") from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert any mode to RGB: transparency is composited on white, 16-bit grey is scaled to 8 bits (not clipped)."""
    if image.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion clips it at 255
        image = Image.fromarray((np.asarray(image).astype(np.float64) / 257).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def centre_crop(image: Image.Image, resolution: int) -> Image.Image:
    """Resize the short side to `resolution` and cut the central square, as ADM's data loader does (arXiv 2105.05233).

    The image is halved with a box filter while its short side is at least twice the target, which avoids aliasing, then
    resized bicubically.

    Args:
        image: An RGB image of any size; a smaller one is enlarged.
        resolution: Side R of the result.

    Returns:
        An RGB image of R x R pixels.
    """
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    return image.crop((left, top, left + resolution, top + resolution))


def keyed_permutation(size: int, *key: int) -> np.ndarray:
    """Permutation of `range(size)`, int64, that depends on nothing but its arguments.

    It sorts the raw stream of a bit generator, because numpy promises those streams for good, and not those of its
    `Generator.permutation`.

    Args:
        size: Length of the permutation.
        *key: Non-negative integers; every key has its own permutation.

    Returns:
        The permutation (size,), int64.
    """
    return np.argsort(np.random.PCG64(key).random_raw(size), kind="stable")


def split_indices(labels: Sequence[int], holdout: float | int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Split a data set into training and held-out images, the same share of every class.

    The one rule that VAE, latents and evaluation share, so that "held out" means the same images everywhere.

    Args:
        labels: Class of each image, N values.
        holdout: Number of held-out images (int), or their share (float, in (0, 1)).
        seed: Key of the choice.

    Returns:
        Indices of the training and of the held-out images, each ascending, int64. Every class keeps a training image.

    Raises:
        ValueError: `holdout` is out of range.
    """
    classes, counts = np.unique(np.asarray(labels), return_counts=True)
    total = round(holdout * len(labels)) if isinstance(holdout, float) else holdout
    spare = counts - 1  # what a class can give and keep a training image
    if not 1 <= total <= spare.sum():
        raise ValueError(
            f"expected a holdout of 1 to {spare.sum()} images (of {len(labels)}, every class keeps one for training), "
            f"got {holdout}, which is {total} images"
        )
    quota = spare * total / spare.sum()
    share = np.floor(quota).astype(np.int64)
    share[np.argsort(share - quota, kind="stable")[: total - share.sum()]] += 1  # the largest remainders
    held_out = np.zeros(len(labels), dtype=bool)
    for label, count in zip(classes, share, strict=True):
        members = np.flatnonzero(np.asarray(labels) == label)
        held_out[members[keyed_permutation(len(members), seed, int(label))[:count]]] = True
    return np.flatnonzero(~held_out), np.flatnonzero(held_out)
