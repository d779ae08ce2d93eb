"""Keeping the samples that are scored: PNG files by index, or one .npz as ADM's evaluator reads it.

What is kept is not sampled again: both are image sets around `SampledImages` that read an image from the disk where it
lies there, and sample and store it where it doesn't. With them lie the settings, by which the images are known when
they are measured later. Must not know metrics.

Letters: B batch, N images, H W image axes.
"""

import contextlib
import json
import shutil
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock, Timeout
from PIL import Image
from torch import Tensor

from ..files import write_durably, write_json
from ..metrics.images import ImageArray, ImageFiles, ImageZip
from ..metrics.npz import array_names, explain_damage, open_archive, read_array
from ..metrics.processes import rank, world_size
from .partial import differences
from .passes import together
from .samples import SampledImages, describe

_SETTINGS = "sampling.json"
_ROWS = "rows.bin"
_CHECK = 4  # bytes after each image in it
_MAX_SETTINGS = 2**24  # bytes of settings in an .npz, which anyone may have written
SETTINGS_KEY = "sampling"  # in an .npz: the settings, as JSON in a unicode scalar


def claim(path: Path, request: Mapping[str, Any]) -> None:
    """Write down what files are made from, or compare with what is written there.

    Args:
        path: JSON file beside the files.
        request: Everything that decides their content.

    Raises:
        ValueError: If they were made from something else, with the differences; or the file is damaged.
    """
    if not path.is_file():
        write_json(path, request)
        return
    found = differences(_read_settings(path), json.loads(json.dumps(request)))
    if found:
        raise ValueError(f"{path.parent} was made with other settings: {'; '.join(found)}. Delete it or name another")


@contextlib.contextmanager
def used_alone(folders: Iterable[Path]) -> Iterator[None]:
    """Keep a second evaluation, started by mistake, away from what a first one leaves in folders on its way.

    Args:
        folders: Such as `<out>.partial`; the lock is a file beside each, which is removed at the end.

    Yields:
        Nothing.

    Raises:
        ValueError: Another process holds one of them.
    """
    with contextlib.ExitStack() as stack:
        for folder in folders:
            lock = FileLock(folder.with_name(f"{folder.name}.lock"))
            try:
                lock.acquire(blocking=False)
            except Timeout as error:
                raise ValueError(
                    f"another evaluation is writing {folder}: wait for it, stop it, or write this one elsewhere"
                ) from error
            stack.callback(lock.release)
            stack.callback(Path(lock.lock_file).unlink, missing_ok=True)  # before the release: while it is ours
        yield


def find_settings(path: Path) -> dict[str, Any] | None:
    """Read how images were sampled, where `SavedImages` or `SavedArray` kept them.

    Args:
        path: Folder or .npz of images.

    Returns:
        `SampledImages.request`; None where the images came without.

    Raises:
        ValueError: What lies there is damaged.
    """
    if path.is_dir():
        settings = _read_settings(path / _SETTINGS) if (path / _SETTINGS).is_file() else None
    else:
        settings = _archived_settings(path) if path.suffix.lower() == ".npz" else None
    if settings is not None:
        try:
            describe(settings)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"{path} has no settings of samples that can be read ({error!r})") from error
    return settings


class StoredSamples:
    """Generated images that are on the disk, an `ImageSet`, with what is known of how they were sampled.

    Args:
        images: The images.
        settings: What `find_settings` found.

    Attributes:
        name: Place and settings.
        prefetch: As of the images.
        image_size: Height and width in pixels.
    """

    def __init__(self, images: ImageFiles | ImageZip | ImageArray, settings: Mapping[str, Any] | None) -> None:
        self.images, self.settings, self.prefetch = images, settings, images.prefetch
        self.image_size = list(images.size)
        known = "settings of the samples not known" if settings is None else describe(settings)
        self.name = f"{images.name}, {known}"
        self._record: dict[str, Any] | None = None

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Sequence[int]) -> Tensor:
        """Read some of the images, as the set itself does.

        Args:
            indices: Which ones, B of them.

        Returns:
            `(B, 3, H, W)` uint8.
        """
        return self.images.read(indices)

    def record(self) -> dict[str, Any]:
        """What identifies the set, and its settings as `sampling`, None where they are not known; found out once."""
        if self._record is None:
            self._record = {**self.images.record(), "sampling": self.settings and dict(self.settings)}
        return self._record


def _read_settings(path: Path) -> dict[str, Any]:
    """A file of settings, which must be a JSON object."""
    return _settings_in(path.read_text(encoding="utf-8", errors="replace"), path)


def _archived_settings(path: Path) -> dict[str, Any] | None:
    """The settings in an .npz; None where it has none."""
    with open_archive(path) as archive:
        if SETTINGS_KEY not in array_names(archive):
            return None
        with explain_damage(f"{path} has a damaged '{SETTINGS_KEY}'"):
            if archive.getinfo(f"{SETTINGS_KEY}.npy").file_size > _MAX_SETTINGS:
                raise ValueError(f"expected at most {_MAX_SETTINGS} bytes of it")
            text = read_array(archive, SETTINGS_KEY, (), "U").item()
    return _settings_in(text, path)


def _settings_in(text: str, path: Path) -> dict[str, Any]:
    try:
        settings = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: expected settings of samples as JSON, got {error}") from error
    if not isinstance(settings, dict):
        raise ValueError(f"{path} is damaged: expected settings of samples as a JSON object, got {text[:40]!r}")
    return settings


class KeptSamples:
    """Samples that are kept, an `ImageSet`; the subclasses know as what.

    Args:
        images: The samples.
        path: What the user called the place.

    Attributes:
        name: Of the samples.
        prefetch: False, as of the samples.
        image_size: Height and width in pixels.
    """

    prefetch = False

    def __init__(self, images: SampledImages, path: Path) -> None:
        self.images, self.path, self.name, self.image_size = images, path, images.name, images.image_size

    def __len__(self) -> int:
        return len(self.images)

    def read(self, indices: Sequence[int]) -> Tensor:
        """Read what is kept; sample and keep the rest.

        Args:
            indices: Which images, B of them.

        Returns:
            `(B, 3, H, W)` uint8 on the CPU.

        Raises:
            ValueError: If a file is broken.
            FloatingPointError: If a sample is not finite; nothing of its batch is kept.
        """
        found = self._load(indices)
        missing = [index for index in indices if index not in found]
        if missing:
            sampled = self.images.read(missing).permute(0, 2, 3, 1).cpu().numpy()  # (B, H, W, 3)
            rows = dict(zip(missing, sampled, strict=True))
            self._store(rows)
            found |= rows
        return torch.from_numpy(np.stack([found[index] for index in indices])).permute(0, 3, 1, 2)

    def request(self) -> dict[str, Any]:
        """What decides the pixels: that of the samples, kept or not."""
        return self.images.request()

    def record(self) -> dict[str, Any]:
        """What the JSON of a result says of the images."""
        return {**self.images.record(), "saved": str(self.path)}

    def finish(self, batch_size: int) -> None:
        """Keep what is not kept yet, images that an earlier attempt measured among them; a collective.

        Args:
            batch_size: Images per process at a time.

        Raises:
            EvaluationError: If a process of several fails; a single process raises its error as it is.
        """

        def read_missing() -> None:
            share = range(rank(), len(self), world_size())
            for start in range(0, len(share), batch_size):
                missing = [index for index in share[start : start + batch_size] if not self._has(index)]
                if missing:
                    self.read(missing)

        together(read_missing)

    def _has(self, index: int) -> bool:
        raise NotImplementedError

    def _load(self, indices: Sequence[int]) -> dict[int, np.ndarray]:
        """Those of the images that are kept, uint8 `(H, W, 3)`, by index."""
        raise NotImplementedError

    def _store(self, rows: Mapping[int, np.ndarray]) -> None:
        """Keep images, uint8 `(H, W, 3)`."""
        raise NotImplementedError


class SavedImages(KeptSamples):
    """Samples as `000123.png` by index, each written whole or not at all, beside the settings in `sampling.json`.

    More images of the same settings may be in the folder; those of other settings may not.

    Args:
        images: The samples.
        folder: Made where it is missing; must be empty, or what this class made of the same samples.

    Raises:
        ValueError: If there are images of other settings, or nobody knows of which.
    """

    def __init__(self, images: SampledImages, folder: Path) -> None:
        super().__init__(images, folder)
        folder.mkdir(parents=True, exist_ok=True)
        if not (folder / _SETTINGS).is_file() and any(folder.iterdir()):
            raise ValueError(f"expected an empty folder for the samples, or one with {_SETTINGS}, got {folder}")
        claim(folder / _SETTINGS, images.request())

    def _path(self, index: int) -> Path:
        return self.path / f"{index:06}.png"

    def _has(self, index: int) -> bool:
        return self._path(index).is_file()

    def _load(self, indices: Sequence[int]) -> dict[int, np.ndarray]:
        return {index: self._decode(self._path(index)) for index in indices if self._has(index)}

    def _decode(self, path: Path) -> np.ndarray:
        try:
            with Image.open(path, formats=("PNG",)) as image:
                pixels = np.asarray(image)
        except Exception as error:  # on damaged files Pillow raises nearly anything
            raise ValueError(f"{path} is broken ({error}): delete it, and it is sampled again") from error
        shape = (*self.images.image_size, 3)
        if pixels.shape != shape:
            raise ValueError(f"expected {path} to be {shape}, got {pixels.shape}: delete it, and it is sampled again")
        return pixels

    def _store(self, rows: Mapping[int, np.ndarray]) -> None:
        for index, row in rows.items():
            write_durably(self._path(index), partial(Image.fromarray(row).save, format="PNG"))


class SavedArray(KeptSamples):
    """Samples as one .npz: `arr_0` uint8 `(N, H, W, 3)` as ADM's evaluator reads it, `arr_1` the labels.

    A third array, `sampling`, holds the settings; a file that is there already is read where they are these.

    Until `finish`, the images lie in the folder `<file>.partial`, to which all processes write by index; each is
    followed by a checksum, so that one half written counts as missing. The archive is stored, not compressed, and there
    whole or not at all; for a moment the disk holds every image twice.

    Args:
        images: The samples.
        file: The .npz. With several machines, on a file system that they share.

    Raises:
        ValueError: If the file or `<file>.partial` is of other samples, or there is no room for them.
    """

    def __init__(self, images: SampledImages, file: Path) -> None:
        super().__init__(images, file)
        self._shape = (*images.image_size, 3)
        self._bytes = int(np.prod(self._shape))
        self._settings = {**images.request(), "count": len(images)}
        self._folder = self.folder_of(file)
        self._whole = self._open_whole() if file.exists() else None
        if self._whole is not None:
            return
        self._check_space()
        self._folder.mkdir(parents=True, exist_ok=True)
        claim(self._folder / _SETTINGS, self._settings)
        (self._folder / _ROWS).touch()

    @staticmethod
    def folder_of(file: Path) -> Path:
        """Where the images lie until the .npz is written."""
        return file.with_name(f"{file.name}.partial")

    def finish(self, batch_size: int) -> None:
        """As `KeptSamples.finish`; then the main process writes the archive and removes what it was made from.

        Args:
            batch_size: Images per process at a time.

        Raises:
            EvaluationError: If a process of several fails.
            ValueError: If the main process misses images of others.
        """
        super().finish(batch_size)
        if rank() == 0:
            if self._whole is None:
                write_durably(self.path, self._pack)
            shutil.rmtree(self._folder, ignore_errors=self._whole is not None)

    def _open_whole(self) -> ImageArray:
        """Open the .npz that is there, if it has these samples."""
        there = _archived_settings(self.path)
        if there is None:
            raise ValueError(f"{self.path} does not say how its images were sampled: move it, or name another")
        found = differences(there, self._settings)
        if found:
            raise ValueError(f"{self.path} was made with other settings: {'; '.join(found)}. Move it or name another")
        return ImageArray(self.path)

    def _check_space(self) -> None:
        rows = self._folder / _ROWS
        needed = 2 * len(self) * self._bytes - (rows.stat().st_size if rows.is_file() else 0)
        free = shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise ValueError(f"{self.path} takes {needed} bytes until it is written, and {free} are free there")

    def _has(self, index: int) -> bool:
        return self._whole is not None or index in self._load([index])

    def _load(self, indices: Sequence[int]) -> dict[int, np.ndarray]:
        if self._whole is not None:
            return dict(zip(indices, self._whole.read(indices).permute(0, 2, 3, 1).numpy(), strict=True))
        found = {}
        with (self._folder / _ROWS).open("rb") as file:  # opened anew: what other machines wrote is seen only then
            for index in indices:
                file.seek(index * (self._bytes + _CHECK))
                content, check = file.read(self._bytes), file.read(_CHECK)
                if len(content) == self._bytes and check == _checksum(content, index):
                    found[index] = np.frombuffer(content, dtype=np.uint8).reshape(self._shape)
        return found

    def _store(self, rows: Mapping[int, np.ndarray]) -> None:
        with (self._folder / _ROWS).open("rb+") as file:
            for index, row in rows.items():
                content = row.tobytes()
                file.seek(index * (self._bytes + _CHECK))
                file.write(content + _checksum(content, index))

    def _pack(self, path: Path) -> None:
        labels = np.array(self.images.labels(range(len(self))), dtype=np.int64)
        header = {"descr": "|u1", "fortran_order": False, "shape": (len(self), *self._shape)}
        with zipfile.ZipFile(path, "w") as archive:
            # ZipInfo without a date, so that equal samples make equal files
            with archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as file:
                np.lib.format.write_array_header_1_0(file, header)
                for index in range(len(self)):
                    found = self._load([index])
                    if not found:
                        raise ValueError(
                            f"image {index} is missing in {self._folder}: several machines need a file system that "
                            "they share for this"
                        )
                    file.write(found[index].tobytes())
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as file:
                np.lib.format.write_array(file, labels, version=(1, 0), allow_pickle=False)
            settings = np.array(json.dumps(self._settings))  # ASCII, so that any reader's unicode will do
            with archive.open(zipfile.ZipInfo(f"{SETTINGS_KEY}.npy"), "w") as file:
                np.lib.format.write_array(file, settings, version=(1, 0), allow_pickle=False)


def _checksum(content: bytes, index: int) -> bytes:
    """Checksum of an image in its place: of a hole in the file, or of another index, it is another one."""
    return zlib.crc32(content, index + 1).to_bytes(_CHECK, "little")
