"""Arrays in .npz archives that anyone may have written: headers are believed only where the archive bears them out.

Nothing is unpickled, and nothing is allocated before its size is known to be in the file. Must not know what the arrays
mean.
"""

import contextlib
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

_READERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
# What zipfile and numpy raise on archives that are damaged, encrypted or packed in a way they do not know.
_DAMAGE = (ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error, struct.error)


@contextlib.contextmanager
def explain_damage(what: str) -> Iterator[None]:
    """Turn whatever a damaged archive raises into a ValueError that says what it was read for.

    Args:
        what: Begins the message: "x.npz is no usable reference".

    Yields:
        Nothing.

    Raises:
        ValueError: In place of the error of zipfile or numpy.
    """
    try:
        yield
    except _DAMAGE as error:
        raise ValueError(f"{what}: {error or type(error).__name__}") from error


def open_archive(path: Path) -> zipfile.ZipFile:
    """Open a .npz or .zip for reading.

    Args:
        path: The archive.

    Returns:
        The archive; the caller closes it.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no zip archive, or was cut off.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected an archive, got {path}, which is no file")
    with explain_damage(f"{path} is no zip archive, or not all of one"):
        return zipfile.ZipFile(path)


def array_names(archive: zipfile.ZipFile) -> list[str]:
    """Names of the arrays in a .npz, as `numpy.load` lists them."""
    return [name.removesuffix(".npy") for name in archive.namelist()]


class ArrayStream(NamedTuple):
    """An array that is being read: its elements as a stream, and what its header says, checked."""

    file: IO[bytes]
    shape: tuple[int, ...]
    dtype: np.dtype
    fortran_order: bool


def open_array(archive: zipfile.ZipFile, key: str) -> ArrayStream:
    """Open an array of a .npz at its first element.

    Args:
        archive: The .npz.
        key: Name of the array, one of `array_names`.

    Returns:
        The stream; the caller closes its file.

    Raises:
        ValueError: If the array is in a newer npy format, or its header claims more or fewer bytes than are there.
    """
    info = archive.getinfo(f"{key}.npy")
    file = archive.open(info)
    version = np.lib.format.read_magic(file)
    if version not in _READERS:
        raise ValueError(f"'{key}' has npy format {version}, expected one of {list(_READERS)}")
    shape, fortran_order, dtype = _READERS[version](file)
    claimed, there = int(np.prod([dtype.itemsize, *map(int, shape)], dtype=object)), info.file_size - file.tell()
    if claimed != there and not dtype.hasobject:
        raise ValueError(f"'{key}' is {dtype} {shape}, {claimed} bytes by its header, but the archive holds {there}")
    return ArrayStream(file, shape, dtype, fortran_order)


def read_array(archive: zipfile.ZipFile, key: str, shape: Sequence[int], kind: str) -> np.ndarray:
    """Read an array of known shape.

    Args:
        archive: The .npz.
        key: Name of the array, one of `array_names`.
        shape: What its shape must be.
        kind: What the kind of its dtype must be: "f" floating point, "U" text.

    Returns:
        The array, in the dtype it is stored in.

    Raises:
        ValueError: If shape or kind are others, or the content is damaged.
    """
    stream = open_array(archive, key)
    with stream.file:
        if stream.shape != tuple(shape) or stream.dtype.kind != kind:
            wanted = {"f": "floating point", "U": "text"}[kind]
            raise ValueError(f"expected '{key}' to be {wanted} {tuple(shape)}, got {stream.dtype} {stream.shape}")
        content = stream.file.read()
    return np.frombuffer(content, stream.dtype).reshape(stream.shape, order="F" if stream.fortran_order else "C")
