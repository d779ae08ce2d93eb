"""Files: lists of them, their sha256, and writing that outlives a crash: whole or not at all, replaced in one move."""

import hashlib
import json
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_durably(path: Path, write: Callable[[Path], object]) -> str:
    """Write a file so that, whatever dies, `path` is missing, the old file, or the new one, whole and on the disk.

    Args:
        path: File to write or replace, in a folder that exists.
        write: Writes the content to the temporary name it is given.

    Returns:
        sha256 of what was written, read back from the file.
    """
    temporary = path.with_name(f"{path.name}.{socket.gethostname()}-{os.getpid()}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # as the umask has it; safetensors makes files that only their owner can read
        write(temporary)
        temporary.chmod(mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        digest = sha256(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)  # on a disk that may be full
        raise
    sync_folder(path.parent)  # the name, too
    return digest


def sync_folder(folder: Path) -> None:
    """Make the names in a folder, as they are now, outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write JSON durably.

    Args:
        path: File to write or replace.
        content: What to write.

    Raises:
        ValueError: A number is NaN or infinite.
    """
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    write_durably(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def list_files(folder: Path) -> Iterator[str]:
    """Paths of the files below a folder, but for hidden ones and those in hidden folders, in no order.

    Args:
        folder: Searched with its subfolders. Links are followed, but for those that lead back to a folder above them.

    Yields:
        The paths, which begin with that of `folder`.
    """
    yield from _walk(str(folder), frozenset())


def _walk(folder: str, above: frozenset[tuple[int, int]]) -> Iterator[str]:
    """`list_files` of a folder that was reached through the folders of these devices and inodes."""
    status = Path(folder).stat()
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                yield from _walk(entry.path, above | {here})
            else:
                yield entry.path
