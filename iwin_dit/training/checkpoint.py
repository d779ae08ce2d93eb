"""Checkpoints: snapshots as folders, written whole or not at all, found again, and pruned.

    <root>/step-00001000/{model,ema,optimizer}.safetensors  state.json  checkpoint.json (size and sha256 of the others)

Must not know the loop or the run's configuration.
"""

import errno
import json
import logging
import os
import re
import shutil
import time
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file

from ..files import sha256, sync_folder, write_durably, write_json
from ..pipelines.loading import CHECKPOINT_MANIFEST as MANIFEST  # load_pipeline reads it
from ..threads import background_thread
from .best import Score, write_best
from .state import STATE, TENSORS, Snapshot

logger = logging.getLogger(__name__)

SCRATCH = ".tmp"

PAUSES = (1.0, 5.0)  # seconds between the tries of a save: network file systems fail now and then
HOPELESS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES}  # errors that another try doesn't mend
MAX_FAILURES = 3  # checkpoints in a row


class CheckpointError(RuntimeError):
    """Checkpoints could not be written; earlier ones are untouched."""


class CheckpointWriter:
    """Writes snapshots in the background, one at a time; of one process, which holds the run's lock.

    A checkpoint that cannot be written is logged at once, and training goes on: the next may succeed.

    Args:
        root: Folder of the checkpoints.
        keep_last: How many of the newest to keep, at least 1.
        keep_every: Checkpoints whose step this divides are kept besides; 0 keeps none.
        asynchronous: Whether `save` returns before the checkpoint is written.
        best: Score of the best checkpoint so far, which is kept besides.

    Attributes:
        best: The same, of the checkpoints that stand; to be read when nothing is being written.
    """

    def __init__(
        self,
        root: Path,
        keep_last: int,
        keep_every: int = 0,
        asynchronous: bool = True,
        best: Score | None = None,
    ) -> None:
        self.root, self.keep_last, self.keep_every, self.best = root, keep_last, keep_every, best
        self._executor = background_thread("checkpoint") if asynchronous else None
        self._pending: Future[None] | None = None
        self._problem: str | None = None  # of the last save
        self._failures = 0  # checkpoints in a row, up to the last

    def save(
        self, snapshot: Snapshot, export: Callable[[Snapshot], None] | None = None, best: Score | None = None
    ) -> None:
        """Write a checkpoint, then remove old ones, then export; first wait for the previous one.

        Args:
            snapshot: What to write; it is refused if it is not finite.
            export: Writes what others use, from the same snapshot.
            best: Its score, if it is the best so far: recorded once the checkpoint stands, before any is removed.

        Raises:
            CheckpointError: If the last `MAX_FAILURES` checkpoints could not be written.
        """
        self.join()
        if self._failures == MAX_FAILURES:
            raise CheckpointError(
                f"{MAX_FAILURES} checkpoints in a row could not be written. The last: {self._problem}"
            )
        if self._executor is None:
            self._write(snapshot, export, best)
        else:
            self._pending = self._executor.submit(self._write, snapshot, export, best)

    def join(self) -> None:
        """Return when nothing is being written, whether or not that succeeded."""
        if self._pending is not None:
            self._pending.result()

    def wait(self) -> None:
        """Return when nothing is being written; for the end of a run.

        Raises:
            CheckpointError: If the last checkpoint, or its export, could not be written.
        """
        self.join()
        if self._problem is not None:
            raise CheckpointError(self._problem)

    def _write(self, snapshot: Snapshot, export: Callable[[Snapshot], None] | None, best: Score | None) -> None:
        final = self.root / checkpoint_name(snapshot.step)
        self._problem = _write_checkpoint(snapshot, final)
        if self._problem is not None:
            self._failures += 1
            logger.error("%s", self._problem)
            return
        self._failures = 0
        if best is not None:
            self._record(best, final)
        self._prune(snapshot.step)
        if export is not None:
            needed = sum(tensor.nbytes for tensor in snapshot.ema.values())
            self._problem = _persist(lambda: export(snapshot), f"the export of checkpoint {final}", self.root, needed)
            if self._problem is not None:
                logger.warning("%s", self._problem)

    def _record(self, best: Score, folder: Path) -> None:
        """Write best.json; where that fails, the one before remains the best, and its checkpoint is kept."""
        what = f"the record of the best checkpoint {folder}"
        problem = _persist(lambda: write_best(self.root.parent, best, folder), what, self.root, 1000)
        if problem is None:
            self.best = best
        else:
            logger.warning("%s", problem)

    def _prune(self, step: int) -> None:
        """Remove what is older than the checkpoint just written, beyond what is kept."""
        older = [folder for folder in list_checkpoints(self.root) if _step(folder) < step]
        complete = [folder for folder in older if find_damage(folder, hashes=False) is None]
        kept = {*complete[::-1][: self.keep_last - 1]}
        kept |= {folder for folder in complete if self.keep_every and _step(folder) % self.keep_every == 0}
        kept |= {folder for folder in complete if self.best is not None and _step(folder) == self.best.step}
        for folder in sorted(set(older) - kept):
            try:
                shutil.rmtree(folder)
            except OSError as error:
                logger.warning("could not remove the old checkpoint %s: %s", folder, error)


def checkpoint_name(step: int) -> str:
    """Return the name of a step's folder."""
    return f"step-{step:08d}"


def list_checkpoints(root: Path) -> list[Path]:
    """Return the folders in `root` that are named as checkpoints, complete or not, oldest first."""
    folders = root.iterdir() if root.is_dir() else ()
    return sorted((f for f in folders if re.fullmatch(r"step-\d{8,}", f.name) and f.is_dir()), key=_step)


def standing_checkpoints(root: Path, last: int) -> dict[int, Path]:
    """Return the checkpoints up to step `last` whose files are all there, by their sizes; by step, oldest first."""
    folders = (folder for folder in list_checkpoints(root) if _step(folder) <= last)
    return {_step(folder): folder for folder in folders if find_damage(folder, hashes=False) is None}


def find_damage(folder: Path, hashes: bool = True) -> str | None:
    """Compare a checkpoint's files with its manifest.

    Args:
        folder: Named as `checkpoint_name` does.
        hashes: Whether to read the files; else only their sizes are compared.

    Returns:
        The first difference: the file, what was expected and what is there; None where there is none.
    """
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text())
        step, files = manifest["step"], [(name, manifest["files"][name]) for name in (*TENSORS, STATE)]
        if step != _step(folder):
            return f"{path}: expected step {_step(folder)}, got {step}"
        for name, expected in files:
            path = folder / name
            size = path.stat().st_size
            if size != expected["size"]:
                return f"{path}: expected {expected['size']} bytes, got {size}"
            if hashes and (digest := sha256(path)) != expected["sha256"]:
                return f"{path}: expected sha256 {expected['sha256']}, got {digest}"
    except OSError as error:
        return f"{path}: {error.strerror}"
    except (ValueError, KeyError, TypeError) as error:
        return f"{folder / MANIFEST}: expected step, and size and sha256 by file name, got something else ({error!r})"
    return None


def find_checkpoint(root: Path, resume: str) -> Path | None:
    """Find the checkpoint to go on from; each that is considered is read as a whole and compared with its manifest.

    Args:
        root: Folder of the checkpoints.
        resume: "latest", or a checkpoint in `root`, by name or path.

    Returns:
        For "latest" the newest that is whole, with a warning for each newer one; None where there is none at all.

    Raises:
        ValueError: If the one named is not a whole checkpoint in `root`, or none of those in `root` is whole.
    """
    found = list_checkpoints(root)
    if resume != "latest":
        folder = root / resume if Path(resume).name == resume else Path(resume)
        if folder.resolve() not in [path.resolve() for path in found]:
            there = ", ".join(path.name for path in found) or "none"
            raise ValueError(f'--resume must be "latest" or a checkpoint in {root} ({there}), got {resume}')
        if damage := find_damage(folder):
            raise ValueError(f'checkpoint {folder} is damaged: {damage}. "--resume latest" takes the last whole one')
        return folder
    damages = []
    for folder in reversed(found):
        damage = find_damage(folder)
        if damage is None:
            return folder
        damages.append(damage)
        logger.warning("checkpoint %s is damaged and passed over: %s", folder, damage)
    if damages:
        listed = "\n  ".join(damages)
        raise ValueError(
            f"every checkpoint in {root} is damaged:\n  {listed}\nRestore one from a copy, or start afresh: --overwrite"
        )
    return None


def abandon_after(root: Path, step: int) -> None:
    """Rename later checkpoints, which the run that goes on from `step` does not follow, to "<name>.abandoned".

    Nothing is deleted: where that name is taken, it is "<name>.abandoned-2", and so on.

    Args:
        root: Folder of the checkpoints.
        step: The step loaded.
    """
    for folder in list_checkpoints(root):
        if _step(folder) > step:
            aside, number = folder.with_name(f"{folder.name}.abandoned"), 1
            while aside.exists():
                number += 1
                aside = folder.with_name(f"{folder.name}.abandoned-{number}")
            folder.replace(aside)
            logger.warning(
                "checkpoint %s is later than the one loaded: renamed to %s. A --resume that names a checkpoint would "
                "go back to it again: use --resume latest from now on",
                *(folder, aside.name),
            )


def _step(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))


# --- writing


def _write_checkpoint(snapshot: Snapshot, final: Path) -> str | None:
    """Write a snapshot that is finite; return the problem, if there is one."""
    for name, tensors in zip(TENSORS, (snapshot.model, snapshot.ema, snapshot.optimizer), strict=True):
        for key, tensor in tensors.items():
            if not tensor.isfinite().all():
                return (
                    f"checkpoint {final} was not written: its weights are not finite, first {key} of {name}; earlier "
                    "checkpoints are untouched"
                )
    return _persist(lambda: _commit(snapshot, final), f"checkpoint {final}", final.parent, snapshot.nbytes())


def _commit(snapshot: Snapshot, final: Path) -> None:
    """Write a checkpoint beside its place, read it back from the disk, and rename it into place."""
    root, scratch = final.parent, final.parent / SCRATCH
    if not final.exists() or find_damage(final):  # a whole one is saved already, and not risked for its like
        staging = scratch / final.name
        shutil.rmtree(scratch, ignore_errors=True)  # of a save that was killed
        try:
            staging.mkdir(parents=True)
            _write_files(snapshot, staging)
            if final.exists():
                final.replace(scratch / "damaged")
            staging.replace(final)
        finally:
            shutil.rmtree(scratch, ignore_errors=True)
    for folder in (root, root.parent):  # the new names, too, must outlive a power cut
        sync_folder(folder)


def _write_files(snapshot: Snapshot, folder: Path) -> None:
    """Write all files and the manifest last; then judge them by their manifest as a resume would.

    The hashes are of the files as the kernel still has them in memory. Reading them once more without that memory costs
    a second or two per GB, in the background, and finds a disk that stored something else before an older checkpoint is
    removed in favour of this one.
    """
    digests = {
        name: write_durably(folder / name, partial(save_file, tensors))
        for name, tensors in zip(TENSORS, (snapshot.model, snapshot.ema, snapshot.optimizer), strict=True)
    }
    write_json(folder / STATE, snapshot.state)
    digests[STATE] = sha256(folder / STATE)
    files = {name: {"size": (folder / name).stat().st_size, "sha256": digest} for name, digest in digests.items()}
    write_json(folder / MANIFEST, {"step": snapshot.step, "files": files})
    for name in files:
        with (folder / name).open("rb") as file:
            if hasattr(os, "posix_fadvise"):  # not on macOS
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    if damage := find_damage(folder):
        raise OSError(errno.EIO, f"the disk holds something else than was written, {damage}")


def _persist(action: Callable[[], None], what: str, root: Path, needed: int) -> str | None:
    """Do something that writes to `root`; try again where the error may pass; return the problem that is left."""
    pauses = iter(PAUSES)
    while True:
        try:
            action()
            return None
        except (OSError, SafetensorError) as error:
            pause = next(pauses, None)
            if pause is None or _errno(error) in HOPELESS:
                free = shutil.disk_usage(next(path for path in (root, *root.parents) if path.exists())).free
                return (
                    f"{what} could not be written: {error}. {free:,} bytes are free there, {needed:,} needed. "
                    "Complete checkpoints are untouched"
                )
            logger.warning("%s could not be written: %s. Trying again in %g s", what, error, pause)
            time.sleep(pause)


def _errno(error: OSError | SafetensorError) -> int | None:
    """The system's error number, which safetensors gives in its message alone."""
    if isinstance(error, OSError):
        return error.errno
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found.group(1)) if found else None
