"""Images on disk as a metric sees them: a folder, checked as a whole before the first one is decoded.

Must not know metrics or networks.

Letters: B batch, H W image axes.
"""

import hashlib
import warnings
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")
_MODES = ("RGB", "L")


class ImageFiles:
    """The images of a folder and its subfolders, in the order of their paths, all of one size.

    Headers of all files are read at construction, pixels when asked for.

    Args:
        folder: Where to look for PNG, JPEG, WEBP and BMP files.
        allow_jpeg: Whether JPEG is accepted: for references it is what data sets come in, but JPEG artefacts in
            generated images change a distance, often for the better.

    Attributes:
        size: Height and width.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If it holds fewer than two images, or images that are broken, of several sizes, JPEG where that is
            refused, or neither RGB nor grayscale (an alpha channel or a palette has no single meaning as RGB).
    """

    def __init__(self, folder: Path, *, allow_jpeg: bool) -> None:
        if not folder.is_dir():
            raise FileNotFoundError(f"expected a folder of images, got {folder}, which is none")
        self.folder = folder
        self.paths = sorted(p for p in folder.rglob("*") if p.suffix.lower() in _SUFFIXES and p.is_file())
        if len(self.paths) < 2:
            found = len(self.paths)
            raise ValueError(f"expected at least 2 images ({' '.join(sorted(_SUFFIXES))}) in {folder}, got {found}")
        sizes: Counter[tuple[int, int]] = Counter()
        for path in self.paths:
            with _open(path) as image:
                if image.format == "JPEG" and not allow_jpeg:
                    raise ValueError(f"{path} is JPEG, whose artefacts change the distance: save the samples as PNG")
                if image.mode not in _MODES:
                    raise ValueError(f"expected RGB or grayscale images, but {path} is {image.mode}: convert it first")
                sizes[image.height, image.width] += 1
        if len(sizes) > 1:
            counts = ", ".join(f"{n} of {h} x {w}" for (h, w), n in sizes.most_common(5))
            raise ValueError(f"expected images of one size in {folder}, got {counts}: crop them as for training")
        self.size = next(iter(sizes))

    def __len__(self) -> int:
        return len(self.paths)

    def read(self, indices: Sequence[int]) -> Tensor:
        """Decode some of the images.

        Args:
            indices: Which ones, B of them.

        Returns:
            `(B, 3, H, W)` uint8.

        Raises:
            ValueError: If an image is broken.
        """
        arrays = []
        for index in indices:
            path = self.paths[index]
            with _open(path) as image:
                try:
                    arrays.append(np.asarray(image.convert("RGB")))
                except Exception as error:  # on damaged files Pillow raises nearly anything
                    raise ValueError(f"{path} is broken: {error}") from error
        return torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)  # (B, H, W, 3) -> (B, 3, H, W)

    def sha256(self) -> str:
        """Hash of all names and contents, which identifies the set."""
        digest = hashlib.sha256()
        for path in self.paths:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
            digest.update(f"{content}  {path.relative_to(self.folder).as_posix()}\n".encode())
        return digest.hexdigest()


def _open(path: Path) -> Image.Image:
    """Open an image without decoding it; a file that is none, or a decompression bomb, is a ValueError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(path, formats=_FORMATS)
    except Exception as error:
        raise ValueError(f"{path} is no usable image: {error}") from error
