"""Sets of images as a metric sees them: a folder, a zip, an .npz or a tensor, checked before the long work begins.

A set is read by index, so any process can take any share of it. Pixels come as they are stored: no crop, no resize.
Must not know metrics, networks or data sets.

Letters: B batch, N images of a set, T frames, H W image axes.
"""

import contextlib
import hashlib
import io
import itertools
import logging
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path, PurePosixPath
from typing import IO, Any, Protocol, TypeVar

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from ..files import list_files, sha256
from .npz import array_names, explain_damage, open_archive, open_array

logger = logging.getLogger(__name__)

ARRAY_KEY = "arr_0"  # the array of an .npz that holds images, as ADM's evaluator reads it
MAX_PIXELS = 64 * 2**20  # of one image: more than any that is compared, less than a decompression bomb
MAX_BYTES = 4 * MAX_PIXELS  # of one image file in a zip, unpacked
DECODE_THREADS = 8  # Pillow decodes outside the interpreter's lock
_SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_FORMATS = ("PNG", "JPEG", "WEBP", "BMP")  # the only decoders Pillow may try
_LOSSLESS = ("PNG", "BMP")  # WebP may be, too, but does not say before it is decoded
_MODES = ("RGB", "L")
_T = TypeVar("_T")
_BLOCK = 4096  # files handed to the threads at a time; there may be millions


class ImageSet(Protocol):
    """Images, or clips, by index: stored somewhere, or made when they are read.

    Attributes:
        name: What the printed line says of the set.
        prefetch: Whether `read` may run ahead, in another thread.
    """

    name: str
    prefetch: bool

    def __len__(self) -> int:
        """Count the images."""

    def read(self, indices: Sequence[int]) -> Tensor:
        """Give some of the images.

        Args:
            indices: Which ones, B of them; ascending ones are cheapest.

        Returns:
            `(B, 3, H, W)` uint8; of a set of clips `(B, T, 3, H, W)`.
        """

    def record(self) -> dict[str, Any]:
        """Say what identifies the set, ready for JSON; among it `image_size`, [H, W].

        Asked by one process, also before the images were read: it then reads what was not.
        """


class _EncodedImages(ABC):
    """What a folder and a zip have in common: named image files, all of one size.

    Args:
        path: Where they are, for messages.
        names: Of all files in the set; they count for its hash.
        ignored: Number of files that are not named as images.
        allow_lossy: Whether JPEG and WebP are accepted.
    """

    prefetch = True

    def __init__(self, path: Path, names: Sequence[str], ignored: int, *, allow_lossy: bool) -> None:
        self.name, self.path, self.names, self.ignored = str(path), path, names, ignored
        self._allow_lossy = allow_lossy
        if len(names) < 2:
            found = len(names)
            raise ValueError(f"expected at least 2 images ({' '.join(sorted(_SUFFIXES))}) in {path}, got {found}")
        self._pool = ThreadPoolExecutor(DECODE_THREADS)
        self._digests: list[bytes | None] = [None] * len(names)  # of the contents that have been read
        headers = Counter(self._in_threads(self._check_header, range(len(names))))
        sizes: Counter[tuple[int, int]] = Counter()
        self.stored_as: Counter[str] = Counter()
        for (size, stored_as), n in headers.items():
            sizes[size] += n
            self.stored_as[stored_as] += n
        if len(sizes) > 1:
            counts = ", ".join(f"{n} of {h} x {w}" for (h, w), n in sizes.most_common(5))
            raise ValueError(f"expected images of one size in {path}, got {counts}: crop them as for training")
        self.size = next(iter(sizes))

    @abstractmethod
    def _open(self, index: int) -> contextlib.AbstractContextManager[IO[bytes]]:
        """Open one of the files."""

    @abstractmethod
    def _describe(self, index: int) -> str:
        """Name one of the files in messages."""

    def __len__(self) -> int:
        return len(self.names)

    def read(self, indices: Sequence[int]) -> Tensor:
        """Decode some of the images, several at a time.

        Args:
            indices: Which ones, B of them.

        Returns:
            `(B, 3, H, W)` uint8.

        Raises:
            ValueError: If an image is broken.
        """
        images = np.empty((len(indices), *self.size, 3), np.uint8)
        for _ in self._pool.map(self._decode, indices, images):
            pass
        return torch.from_numpy(images).permute(0, 3, 1, 2)  # (B, H, W, 3) -> (B, 3, H, W)

    def record(self) -> dict[str, Any]:
        """What identifies the set; files that this process has not read are read now."""
        unread = [index for index, digest in enumerate(self._digests) if digest is None]
        for _ in self._in_threads(self._read_content, unread):
            pass
        digests = [digest for digest in self._digests if digest is not None]
        listing = "".join(f"{digest.hex()}  {name}\n" for digest, name in zip(digests, self.names, strict=True))
        return {
            "path": str(self.path),
            "n": len(self),
            "image_size": list(self.size),
            "stored_as": dict(sorted(self.stored_as.items())),
            "ignored": self.ignored,
            "sha256": hashlib.sha256(listing.encode(errors="surrogateescape")).hexdigest(),
            "duplicates": count_duplicates(digests, self.name),
        }

    def _in_threads(self, function: Callable[[int], _T], indices: Iterable[int]) -> Iterator[_T]:
        indices = iter(indices)
        while block := list(itertools.islice(indices, _BLOCK)):
            yield from self._pool.map(function, block)

    def _check_header(self, index: int) -> tuple[tuple[int, int], str]:
        """Size (height, width) and format of an image that may be in the set, without decoding it."""
        where = self._describe(index)
        with self._image(index, self._open(index)) as image:
            stored_as = image.format or "unknown"
            if stored_as not in _LOSSLESS and not self._allow_lossy:
                raise ValueError(
                    f"{where} is {stored_as}, a lossy format, whose artefacts change the distance: "
                    f"save the samples as {' or '.join(_LOSSLESS)}"
                )
            if image.mode not in _MODES:
                raise ValueError(f"expected RGB or grayscale images, but {where} is {image.mode}: convert it first")
            if image.has_transparency_data:
                raise ValueError(f"{where} has a transparent colour, which has no single meaning as RGB: convert it")
            self._check_upright(index, image)
            return (image.height, image.width), stored_as

    def _check_upright(self, index: int, image: Image.Image) -> None:
        """Refuse an image that viewers turn; a PNG may say so after its pixels, so once more when it is decoded."""
        where = self._describe(index)
        try:
            # Of the base class: that of PNG decodes the image first.
            orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
        except Exception as error:  # on damaged metadata Pillow raises nearly anything
            raise ValueError(f"{where} is no usable image: its EXIF data are broken: {error}") from error
        if orientation in range(2, 9):  # 1 is upright, and other numbers mean nothing
            raise ValueError(
                f"{where} is stored turned or mirrored (EXIF orientation {orientation}), and pixels are compared as "
                "stored: save it upright, or make a reference file by `evaluate_fid.py reference`, which applies it"
            )

    def _read_content(self, index: int) -> bytes:
        """One file, hashed on the way."""
        where = self._describe(index)
        with explain_damage(f"{where} is broken"), self._open(index) as file:
            content = file.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise ValueError(f"expected images of at most {MAX_BYTES:,} bytes, but {where} is larger")
        self._digests[index] = hashlib.sha256(content).digest()
        return content

    def _decode(self, index: int, row: np.ndarray) -> None:
        """Decode one image into a row of the batch, `(H, W, 3)`."""
        content = self._read_content(index)
        with self._image(index, contextlib.closing(io.BytesIO(content))) as image:
            try:
                pixels = np.asarray(image.convert("RGB"))
            except Exception as error:  # on damaged files Pillow raises nearly anything
                raise ValueError(f"{self._describe(index)} is broken: {error}") from error
            self._check_upright(index, image)
        if pixels.shape != row.shape:
            raise ValueError(f"{self._describe(index)} has become another image since the set was opened")
        row[...] = pixels

    @contextlib.contextmanager
    def _image(self, index: int, source: contextlib.AbstractContextManager[IO[bytes]]) -> Iterator[Image.Image]:
        """Open an image without decoding it; a file that is none, or a decompression bomb, is a ValueError."""
        with source as file:
            try:
                image = Image.open(file, formats=_FORMATS)
            except Exception as error:
                raise ValueError(f"{self._describe(index)} is no usable image: {error}") from error
            with image:
                # Pillow's own limit is a warning, which cannot be made an error for one thread, and an error far above.
                if image.width * image.height > MAX_PIXELS:
                    pixels = f"{image.width} x {image.height} pixels, expected at most {MAX_PIXELS:,} in all"
                    raise ValueError(f"{self._describe(index)} is no usable image: {pixels}")
                yield image


class ImageFiles(_EncodedImages):
    """The images of a folder and its subfolders, in the order of their names, all of one size.

    Headers of all files are read at construction, pixels when asked for. Hidden files and folders are left alone; so
    are files not named as images, and counted. Links are followed. A name is the path below the folder, with "/".

    Args:
        path: The folder in which to look for PNG, JPEG, WEBP and BMP files.
        allow_lossy: Whether JPEG and WebP are accepted: for references they are what data sets come in, but their
            artefacts in generated images change a distance, often for the better.

    Attributes:
        paths: The files.
        names: Their names.
        size: Height and width.
        stored_as: Number of images by format.
        ignored: Number of files that are not named as images.

    Raises:
        FileNotFoundError: If the folder does not exist.
        ValueError: If it holds fewer than two images, or images that are broken, of several sizes, lossy where that is
            refused, to be turned by their EXIF orientation, or neither RGB nor grayscale (an alpha channel or a palette
            has no single meaning as RGB).
    """

    def __init__(self, path: Path, *, allow_lossy: bool) -> None:
        if not path.is_dir():
            raise FileNotFoundError(f"expected a folder of images, got {path}, which is none")
        found = [Path(file).relative_to(path).as_posix() for file in list_files(path)]
        names = sorted(filter(_is_image_name, found))
        self.paths = [path / name for name in names]
        super().__init__(path, names, len(found) - len(names), allow_lossy=allow_lossy)

    def _open(self, index: int) -> contextlib.AbstractContextManager[IO[bytes]]:
        return self.paths[index].open("rb")

    def _describe(self, index: int) -> str:
        return str(self.paths[index])


class ImageZip(_EncodedImages):
    """The images of a .zip, as StyleGAN and EDM keep data sets, in the order of their names, all of one size.

    Nothing is extracted: a name such as `../../x.png` is a name and no place. Otherwise as `ImageFiles`.

    Args:
        path: The archive.
        allow_lossy: Whether JPEG and WebP are accepted.

    Attributes:
        names: Of the images.
        size: Height and width.
        stored_as: Number of images by format.
        ignored: Number of files that are not named as images.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no archive, or for its images as `ImageFiles`.
    """

    def __init__(self, path: Path, *, allow_lossy: bool) -> None:
        self._archive = open_archive(path)
        self._lock = threading.Lock()  # the archive counts its readers, and the count is not atomic
        found = [entry for entry in self._archive.infolist() if not entry.is_dir() and not _is_hidden(entry.filename)]
        images = [entry for entry in found if _is_image_name(entry.filename)]
        self._entries = sorted(images, key=lambda entry: entry.filename)
        names = [entry.filename for entry in self._entries]
        super().__init__(path, names, len(found) - len(names), allow_lossy=allow_lossy)

    @contextlib.contextmanager
    def _open(self, index: int) -> Iterator[IO[bytes]]:
        with self._lock:
            with explain_damage(f"{self._describe(index)} is broken"):
                file = self._archive.open(self._entries[index])
            with file:
                yield file

    def _describe(self, index: int) -> str:
        return f"{self._entries[index].filename} in {self.path}"


class ImageArray:
    """The images of an .npz, `arr_0` `(N, H, W, 3)` uint8, as ADM and those after it keep samples and references.

    They are read by rows through the archive, so memory stays at a batch whether it is compressed or not. Reading goes
    forward, and starts again at the first row where an earlier one is wanted.

    Args:
        path: The file; its other arrays are left alone.

    Attributes:
        size: Height and width.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no archive, or has no such array of at least two images.
    """

    prefetch = True

    def __init__(self, path: Path) -> None:
        self.name, self.path = str(path), path
        self._archive = open_archive(path)
        self._lock = threading.Lock()
        names = array_names(self._archive)
        if ARRAY_KEY not in names:
            raise ValueError(f"expected images as '{ARRAY_KEY}' in {path}, got the arrays {names}")
        with explain_damage(f"{path} holds no usable images"):
            self._stream, shape, dtype, fortran_order = open_array(self._archive, ARRAY_KEY)
            if len(shape) != 4 or shape[0] < 2 or shape[3] != 3 or dtype != np.uint8:
                wanted = "uint8 (N, H, W, 3), at least 2 images"
                raise ValueError(f"expected '{ARRAY_KEY}' to be {wanted}, got {dtype} {shape}")
            if fortran_order:
                raise ValueError(f"'{ARRAY_KEY}' is in Fortran order, images last: save numpy.ascontiguousarray of it")
            if not 0 < shape[1] * shape[2] <= MAX_PIXELS:
                raise ValueError(f"expected images of at most {MAX_PIXELS:,} pixels, got {shape[1]} x {shape[2]}")
        self._count, self.size = shape[0], (shape[1], shape[2])
        self._row = 0  # where the stream stands
        self._is_whole = False  # the stream has once come to its end, where zipfile compares the checksum
        self._digests: list[bytes | None] = [None] * self._count

    def __len__(self) -> int:
        return self._count

    def read(self, indices: Sequence[int]) -> Tensor:
        """Read some of the images.

        Args:
            indices: Which ones, B of them; cheap where they ascend from call to call.

        Returns:
            `(B, 3, H, W)` uint8.

        Raises:
            ValueError: If the archive is damaged, as far as it was read.
        """
        images = np.empty((len(indices), *self.size, 3), np.uint8)
        places = sorted(range(len(indices)), key=lambda place: indices[place])
        with self._lock, explain_damage(f"{self.path} is damaged"):
            for place, before in zip(places, [None, *places], strict=False):
                if before is not None and indices[before] == indices[place]:
                    images[place] = images[before]
                else:
                    self._go_to(indices[place])
                    self._read_row(images[place])
        return torch.from_numpy(images).permute(0, 3, 1, 2)  # (B, H, W, 3) -> (B, 3, H, W)

    def record(self) -> dict[str, Any]:
        """What identifies the set; the rest of the file is read now, as only its end tells whether it is whole."""
        with self._lock, explain_damage(f"{self.path} is damaged"):
            if not self._is_whole:
                self._go_to(self._count)
        digests = [digest for digest in self._digests if digest is not None]
        return {
            "path": str(self.path),
            "n": len(self),
            "image_size": list(self.size),
            "sha256": sha256(self.path),
            "duplicates": count_duplicates(digests, self.name),
        }

    def _go_to(self, row: int) -> None:
        """Move the stream to the beginning of a row; what is passed over is hashed, too."""
        if not 0 <= row <= self._count:
            raise IndexError(f"expected an index below {self._count}, got {row}")
        if row < self._row:
            self._stream.close()
            self._stream, self._row = open_array(self._archive, ARRAY_KEY).file, 0
        scratch = np.empty((*self.size, 3), np.uint8) if row > self._row else None
        while scratch is not None and self._row < row:
            self._read_row(scratch)

    def _read_row(self, image: np.ndarray) -> None:
        """Fill one image `(H, W, 3)` from the stream."""
        content = self._stream.read(image.nbytes)
        if len(content) != image.nbytes:
            raise EOFError(f"it ends within image {self._row} of {self._count}")
        image[...] = np.frombuffer(content, np.uint8).reshape(image.shape)
        if self._digests[self._row] is None:
            self._digests[self._row] = hashlib.sha256(content).digest()
        self._row += 1
        self._is_whole |= self._row == self._count


class ImageTensor:
    """Images in memory.

    Args:
        images: `(N, 3, H, W)` uint8, or clips `(N, T, 3, H, W)`.
        name: What the printed line says of them.

    Attributes:
        size: Height and width.

    Raises:
        ValueError: If there are fewer than two, or they have another shape or dtype.
    """

    prefetch = True

    def __init__(self, images: Tensor, name: str) -> None:
        if images.dtype != torch.uint8 or images.ndim not in (4, 5) or images.shape[-3] != 3 or len(images) < 2:
            wanted = "at least 2 uint8 images (N, 3, H, W) or clips (N, T, 3, H, W)"
            raise ValueError(f"expected {wanted}, got {images.dtype} {tuple(images.shape)}")
        self.name, self.images = name, images
        self.size = (images.shape[-2], images.shape[-1])

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Sequence[int]) -> Tensor:
        """Give some of the images.

        Args:
            indices: Which ones, B of them.

        Returns:
            `(B, 3, H, W)` uint8; of clips `(B, T, 3, H, W)`.
        """
        return self.images[list(indices)]

    def record(self) -> dict[str, Any]:
        """What identifies the set."""
        contents = [image.cpu().numpy().tobytes() for image in self.images]
        return {
            "n": len(self),
            "image_size": list(self.size),
            "sha256": hashlib.sha256(b"".join(contents)).hexdigest(),
            "duplicates": count_duplicates([hashlib.sha256(content).digest() for content in contents], self.name),
        }


def open_images(path: Path, *, allow_lossy: bool) -> ImageSet:
    """Open a set of images by what it is.

    Args:
        path: A folder, a .zip of images, or an .npz that holds images.
        allow_lossy: Whether a folder or zip may hold JPEG and WebP.

    Returns:
        The set, checked as far as its headers go.

    Raises:
        FileNotFoundError: If there is nothing at `path`.
        ValueError: If it is nothing of these, or not usable.
    """
    if not path.exists():
        raise FileNotFoundError(f"expected a folder of images, a .zip or an .npz, got {path}, which does not exist")
    if path.is_dir():
        return ImageFiles(path, allow_lossy=allow_lossy)
    if path.suffix.lower() == ".zip":
        return ImageZip(path, allow_lossy=allow_lossy)
    if path.suffix.lower() == ".npz":
        return ImageArray(path)
    raise ValueError(f"expected a folder of images, a .zip or an .npz, got the file {path}")


def count_duplicates(digests: Sequence[bytes], name: str) -> int:
    """Count the images that repeat an earlier one, and warn of them: a set with copies is a smaller set.

    Args:
        digests: Hash of every image.
        name: Of the set, for the warning.

    Returns:
        How many could go without any content going.
    """
    duplicates = len(digests) - len(set(digests))
    if duplicates:
        logger.warning("%s: %d of %d images repeat another one, byte for byte", name, duplicates, len(digests))
    return duplicates


def _is_hidden(name: str) -> bool:
    """Whether a relative path is hidden, as the `._*` that macOS leaves in archives are, or in a hidden folder."""
    return any(part.startswith(".") and part != ".." for part in PurePosixPath(name).parts)


def _is_image_name(name: str) -> bool:
    """Whether a file is named as an image."""
    return PurePosixPath(name).suffix.lower() in _SUFFIXES
