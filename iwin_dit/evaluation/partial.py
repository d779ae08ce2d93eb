"""What an evaluation that was killed leaves on disk, and the next one goes on from.

Owns a folder of `request.json` and one file of statistics per attempt and process. Must not know what is measured: it
stores named tensors, and the indices of the images that are in them.
"""

import hashlib
import json
import logging
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..files import write_durably, write_json
from ..metrics.processes import rank

logger = logging.getLogger(__name__)

_FORMAT = 1
_REQUEST = "request.json"
_STATES = re.compile(r"attempt-(\d+)-rank-(\d+)\.safetensors")
_INDICES = "indices"
_MAX_SHARE = 0.1  # of the time that saving may take
_NOTHING = object()  # in place of a value that is missing


class Partial:
    """Statistics of the images seen so far, in a folder, by attempt and process.

    A process replaces its own file at each save, whole or not at all, and never touches those of earlier attempts. Each
    file says which images are in it, so the next attempt may have another number of processes or another batch size.

    Args:
        folder: Where; it is created at the first save.
        request: Everything that decides the statistics, ready for JSON.
        save_every: Seconds between saves, at least; more where saving takes long.

    Raises:
        ValueError: The folder has the statistics of another request, or is something else.
    """

    def __init__(self, folder: Path, request: Mapping[str, Any], *, save_every: float = 60.0) -> None:
        self.folder, self.save_every = folder, save_every
        self._request = json.loads(json.dumps({"format": _FORMAT, "request": request}, allow_nan=False))
        self._check_request()
        self._last_save = time.monotonic()
        self._interval = save_every
        self._earlier: dict[Path, np.ndarray] | None = None
        self._attempt: int | None = None

    def done(self) -> np.ndarray:
        """Find the images that earlier attempts have seen.

        To be called before any process of this attempt saves; a damaged file is left out with a warning, and its images
        are done again.

        Returns:
            Their indices, ascending, int64.

        Raises:
            ValueError: Two files have the same image.
        """
        states = self._scan()
        if not states:
            return np.empty(0, np.int64)
        together = np.sort(np.concatenate(list(states.values())))
        if len(together) != len(np.unique(together)):
            raise ValueError(
                f"images were counted twice in {self.folder}: two evaluations wrote there at once; delete the folder"
            )
        return together

    def earlier_states(self) -> Iterator[dict[str, Tensor]]:
        """Read the statistics that earlier attempts saved, one file at a time.

        Yields:
            What was given to `save`, without the indices.

        Raises:
            ValueError: A file was damaged after `done` had read it.
        """
        for path in self._scan():
            # Without a name here, so that a state can go before the next one is read.
            yield {name: tensor for name, tensor in _read(path).items() if name != _INDICES}

    def next_attempt(self) -> int:
        """Number of this attempt, above those of all files there, damaged ones too."""
        return 1 + max((int(match[1]) for _, match in self._files()), default=0)

    def begin(self, attempt: int) -> None:
        """Say which attempt this is.

        Args:
            attempt: What `next_attempt` gave on the main process.
        """
        self._attempt = attempt
        self._last_save = time.monotonic()

    @property
    def is_due(self) -> bool:
        """Whether it is time to save."""
        return time.monotonic() - self._last_save >= self._interval

    def save(self, state: Mapping[str, Tensor], indices: Sequence[int] | np.ndarray) -> None:
        """Replace what this process has saved in this attempt; where the disk refuses, that is logged.

        Args:
            state: Statistics of all images of this process and attempt.
            indices: Those images.

        Raises:
            ValueError: It was never said which attempt this is.
        """
        if self._attempt is None:
            raise ValueError("expected begin(attempt) before save: the number names the file")
        started = time.monotonic()
        tensors = {name: tensor.contiguous() for name, tensor in state.items()}  # no copy, nor in what follows
        tensors[_INDICES] = torch.from_numpy(np.asarray(indices, dtype=np.int64))
        metadata = {"sha256": _digest(tensors)}
        path = self.folder / f"attempt-{self._attempt:04d}-rank-{rank():05d}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            if not (self.folder / _REQUEST).exists():
                write_json(self.folder / _REQUEST, self._request)
            write_durably(path, lambda temporary: save_file(tensors, temporary, metadata))
        except (OSError, SafetensorError) as error:  # such as a full disk, which does not make the values wrong
            logger.warning("could not save the statistics so far in %s, going on without: %s", self.folder, error)
        self._last_save = time.monotonic()
        self._interval = max(self.save_every, (self._last_save - started) / _MAX_SHARE)

    def remove(self) -> None:
        """Delete the folder, once the result stands."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _check_request(self) -> None:
        path = self.folder / _REQUEST
        if not path.exists():
            if self.folder.exists() and (not self.folder.is_dir() or any(self._files())):
                raise ValueError(f"expected {path} beside the statistics of an evaluation: delete {self.folder}")
            return
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path} is broken ({error}): delete {self.folder}") from error
        differing = [line.removeprefix("request.") for line in differences(found, self._request)]
        if differing:
            raise ValueError(
                f"{self.folder} has a part of another evaluation ({'; '.join(differing)}): delete the folder, or "
                "give another --out"
            )

    def _files(self) -> Iterator[tuple[Path, re.Match[str]]]:
        for path in sorted(self.folder.glob("*")):
            match = _STATES.fullmatch(path.name)
            if match:
                yield path, match

    def _scan(self) -> dict[Path, np.ndarray]:
        """Indices by file, of the files that were there at the first call and are whole."""
        if self._earlier is None:
            self._earlier = {}
            for path, _ in self._files():
                try:
                    self._earlier[path] = _read(path)[_INDICES].numpy()
                except ValueError as error:
                    logger.warning("%s; its images are done again", error)
        return self._earlier


def differences(there: Any, asked: Any, prefix: str = "") -> list[str]:
    """Compare two JSON objects.

    Args:
        there: The one on the disk.
        asked: The one that is asked for.
        prefix: Put before the names.

    Returns:
        A line per value that differs, as "scheduler.config.shift is 1.0 there, 3.0 was asked for"; what one of them
        does not have is "nothing".
    """
    if not isinstance(there, dict) or not isinstance(asked, dict):
        return [] if there == asked else [f"{prefix or 'all'} is {_text(there)} there, {_text(asked)} was asked for"]
    lines: list[str] = []
    for key in sorted(there.keys() | asked.keys()):
        lines += differences(there.get(key, _NOTHING), asked.get(key, _NOTHING), f"{prefix}.{key}".removeprefix("."))
    return lines


def _text(value: Any) -> str:
    return "nothing" if value is _NOTHING else json.dumps(value)


def _read(path: Path) -> dict[str, Tensor]:
    """Read a file of statistics; a ValueError if it is not what was written."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{path} is broken: {error}") from error
    if _INDICES not in tensors or metadata.get("sha256") != _digest(tensors):
        raise ValueError(f"{path} is broken: it is not what was written")
    return tensors


def _digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 of names, dtypes, shapes and values; safetensors itself only notices a file that was cut short."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).numpy().data)
    return digest.hexdigest()
