"""Keeping the samples that are scored: PNG files by index, or one .npz as ADM's evaluator reads it.

What is kept is not sampled again: both are image sets around `SampledImages` that read an image from the disk where it
lies there, and sample and store it where it doesn't. Must not know metrics.

Letters: B batch, N images, H W image axes.
"""

import json
import shutil
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..files import write_durably, write_json
from ..metrics.images import ImageSet
from ..metrics.processes import from_main, rank, world_size
from .evaluator import Evaluator
from .passes import settle
from .samples import SampledImages

_SETTINGS = "sampling.json"
_ROWS = "rows.bin"
_CHECK = 4  # bytes after each image in it


def claim(path: Path, request: Mapping[str, Any]) -> None:
    """Write down what files are made from, or compare with what is written there.

    Args:
        path: JSON file beside the files.
        request: Everything that decides their content.

    Raises:
        ValueError: If they were made from something else; the message lists the differences.
    """
    if not path.is_file():
        write_json(path, request)
        return
    there = json.loads(path.read_text(encoding="utf-8"))
    found = differences(there, request)
    if found:
        raise ValueError(f"{path.parent} was made with other settings: {'; '.join(found)}. Delete it or name another")


def differences(there: Mapping[str, Any], asked: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Compare two JSON objects.

    Args:
        there: The one on the disk.
        asked: The one that is asked for.
        prefix: Put before the names.

    Returns:
        A line per value that differs, as "scheduler.config.shift is 1.0 there, 3.0 was asked for".
    """
    lines: list[str] = []
    for key in sorted(there.keys() | asked.keys()):
        old, new = there.get(key), asked.get(key)
        if isinstance(old, dict) and isinstance(new, dict):
            lines += differences(old, new, f"{prefix}{key}.")
        elif old != new:
            lines.append(f"{prefix}{key} is {json.dumps(old)} there, {json.dumps(new)} was asked for")
    return lines


def statistics_request(evaluator: Evaluator, images: ImageSet) -> dict[str, Any]:
    """Say what decides the statistics of generated images, for `Partial`; a collective.

    Args:
        evaluator: Measures them.
        images: Samples, or files, which the main process reads to identify them.

    Returns:
        JSON.

    Raises:
        EvaluationError: A process of several failed; a single one raises its error.
    """
    samples = images.images if isinstance(images, KeptSamples) else images
    if isinstance(samples, SampledImages):
        return evaluator.request_for(samples)
    about: dict[str, Any] | None = None
    error: Exception | None = None
    try:
        about = images.record() if rank() == 0 else None
    except Exception as raised:
        error = raised
    settle(error)
    features = {name: network.describe() for name, network in evaluator.networks.items()}
    return {"metrics": sorted(evaluator.request.metrics), "features": features, "generated": from_main(about)}


class KeptSamples:
    """Samples that are kept, an `ImageSet`; the subclasses know as what.

    Args:
        images: The samples.
        path: What the user called the place.

    Attributes:
        name: Of the samples.
        prefetch: False, as of the samples.
    """

    prefetch = False

    def __init__(self, images: SampledImages, path: Path) -> None:
        self.images, self.path, self.name = images, path, images.name

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
        error: Exception | None = None
        try:
            share = range(rank(), len(self), world_size())
            for start in range(0, len(share), batch_size):
                missing = [index for index in share[start : start + batch_size] if not self._has(index)]
                if missing:
                    self.read(missing)
        except Exception as raised:
            error = raised
        settle(error)

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
    """Samples as one .npz: `arr_0` uint8 `(N, H, W, 3)` as ADM's evaluator reads it, and `arr_1` with the labels.

    Until `finish`, the images lie in the folder `<file>.partial`, to which all processes write by index; each is
    followed by a checksum, so that one half written counts as missing. The archive is stored, not compressed, and there
    whole or not at all; for a moment the disk holds every image twice.

    Args:
        images: The samples.
        file: The .npz, replaced where it exists. With several machines, on a file system that they share.

    Raises:
        ValueError: If `<file>.partial` is of other samples.
    """

    def __init__(self, images: SampledImages, file: Path) -> None:
        super().__init__(images, file)
        self._folder = file.with_name(f"{file.name}.partial")
        self._folder.mkdir(parents=True, exist_ok=True)
        claim(self._folder / _SETTINGS, {**images.request(), "count": len(images)})
        (self._folder / _ROWS).touch()
        self._shape = (*images.image_size, 3)
        self._bytes = int(np.prod(self._shape))

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
            write_durably(self.path, self._pack)
            shutil.rmtree(self._folder)

    def _has(self, index: int) -> bool:
        return index in self._load([index])

    def _load(self, indices: Sequence[int]) -> dict[int, np.ndarray]:
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


def _checksum(content: bytes, index: int) -> bytes:
    """Checksum of an image in its place: of a hole in the file, or of another index, it is another one."""
    return zlib.crc32(content, index + 1).to_bytes(_CHECK, "little")
