"""The run folder: whether it may be used, its record, its lock. What lies in checkpoints/ is checkpoint.py's.

    runs/<name>/.lock  config.json  metrics.jsonl  previews/  pipeline/  checkpoints/  evaluations/  best.json
                init_from.json

Nothing is deleted before `open_run`, and by it only what a run left there, with --overwrite.
"""

import contextlib
import importlib.metadata
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from ..files import write_json
from .config import Config, build_parser

logger = logging.getLogger(__name__)

LOCK = ".lock"
RECORD = "config.json"
INITIAL = "init_from.json"  # whose weights the run started from, where it did not start from random ones
# What training leaves in a run folder, and --overwrite deletes; the record last, so that a deletion cut short can be
# started again. The lock stays, for it is held.
OF_A_RUN = (
    *("checkpoints", "previews", "pipeline", ".pipeline.tmp", "metrics.jsonl", ".metrics.tmp"),
    *("evaluations", "best.json", "tensorboard", "wandb", "wandb-id", INITIAL, RECORD),
)

# Keys that may differ when a run goes on: they decide what is shown, kept or run, not what is learned. The precision is
# compared as it was resolved with the launcher's; the length is free only where no schedule ends with it. Folders may
# be renamed: what they hold is compared, the latents by their manifest's hash, the VAE by the hash in the manifest.
FREE_KEYS = {
    *("run", "overwrite", "dry_run", "resume", "data.vae", "data.latents"),
    *("train.compile", "train.gradient_checkpointing", "train.gradient_accumulation_steps", "train.micro_batch_size"),
    *("train.max_time", "train.timeout", "train.max_skipped_steps", "train.mixed_precision"),
    *("data.num_workers", "data.encode_batch_size", "data.decode_threads", "data.max_broken"),
    *("data.verify", "data.streaming"),
}
PACKAGES = ("torch", "numpy", "diffusers", "accelerate", "iwin-dit")  # of other versions, the numbers differ


def check_run(config: Config, resolved: dict[str, str] | None = None) -> None:
    """Check, without touching anything, that the run folder can take this run or holds it already.

    Args:
        config: The configuration of this start.
        resolved: What decides the result besides, by name; None where it is not known yet and not compared.

    Raises:
        ValueError: If the folder holds something else, or a run whose configuration differs; the keys are listed.
    """
    run = Path(config.run)
    record = run / RECORD
    if not record.is_file():
        if run.exists() and (not run.is_dir() or any(path.name != LOCK for path in run.iterdir())):
            raise ValueError(f"run folder {run} is not empty and holds no run (no {RECORD}): give another --run")
        return
    if config.overwrite:
        return
    # a key that is newer than the record had its default, whatever it does now
    before, now = _defaults(config) | _flatten(_read_record(record)), _flatten(_record(config, resolved or {}))
    free_sections = (
        "log.",
        "eval.",
        "packages.",
        "train.compile_options.",
        *(() if resolved is not None else ("resolved.",)),
    )
    changed = sorted(
        key
        for key in before.keys() | now.keys()
        if before.get(key) != now.get(key)
        and key not in FREE_KEYS
        and not key.startswith(free_sections)
        and not (key == "train.images" and config.optim.schedule == "constant")
    )
    if changed:
        lines = "\n  ".join(f"{key}: {before.get(key)} before, {now.get(key)} now" for key in changed)
        cosine = (
            "The cosine schedule ends with the last image, so train.images is fixed. "
            if "train.images" in changed
            else ""
        )
        raise ValueError(
            f"run folder {run} holds a run of another configuration:\n  {lines}\n{cosine}Give another --run, or "
            "--overwrite to delete that run and start afresh"
        )


@contextlib.contextmanager
def lock_run(run: Path) -> Iterator[None]:
    """Hold the run folder for this process; it is created where it is missing.

    Args:
        run: Run folder. The system frees it when the process dies, however it does.

    Raises:
        ValueError: If another process holds it.
    """
    run.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run / LOCK)
    try:
        lock.acquire(blocking=False)
    except Timeout as error:
        raise ValueError(
            f"run folder {run} is in use by another process: wait for it, stop it, or give another --run"
        ) from error
    try:
        yield
    finally:
        lock.release()


def probe_run(run: Path, bytes_needed: int) -> None:
    """Write, sync and remove a file where the run is to be, and compare the free space, before any work is done.

    Args:
        run: Run folder; where it does not exist yet, the nearest folder above it is tried, and nothing is created.
        bytes_needed: Space that the run will take at once: its checkpoints and one more while it is written.

    Raises:
        ValueError: If nothing can be written there, or the space is too small.
    """
    folder = next(path for path in (run, *run.absolute().parents) if path.exists())
    try:
        with tempfile.NamedTemporaryFile(dir=folder, prefix=".probe-") as file:
            file.write(b"iwin-dit")
            file.flush()
            os.fsync(file.fileno())
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise ValueError(
            f"run folder {run} cannot be written: {folder}: {error.strerror}. Mend that, or give another --run"
        ) from error
    if free < bytes_needed:
        raise ValueError(
            f"run folder {run} needs {bytes_needed:,} bytes for checkpoints, and {folder} has {free:,} bytes free. "
            "Make space, lower log.keep_last, or give another --run"
        )


@contextlib.contextmanager
def open_run(config: Config, resolved: dict[str, str], bytes_needed: int) -> Iterator[Path]:
    """Create the run folder, hold its lock and write its record, once everything else has been found in order.

    Args:
        config: The configuration of this start. With `overwrite`, the run there before is deleted; else a run that was
            begun with other versions of the packages goes on with a warning.
        resolved: What decides the result besides, by name: the precision in use, the hash of the latents.
        bytes_needed: As for `probe_run`.

    Yields:
        The run folder.

    Raises:
        ValueError: As `check_run`, `probe_run` and `lock_run`.
    """
    run = Path(config.run)
    check_run(config, resolved)
    probe_run(run, bytes_needed)
    with lock_run(run):
        check_run(config, resolved)  # again: another process may have begun a run there just before the lock
        if config.overwrite:
            for path in (run / name for name in OF_A_RUN):
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        _compare_packages(run / RECORD)
        write_json(run / RECORD, _record(config, resolved))
        yield run


def _record(config: Config, resolved: dict[str, str]) -> dict[str, Any]:
    """The content of config.json, as JSON gives it back."""
    return json.loads(json.dumps({**config.to_dict(), "resolved": resolved, "packages": _packages()}))


def _packages() -> dict[str, str]:
    return {name: importlib.metadata.version(name) for name in PACKAGES}


def _compare_packages(record: Path) -> None:
    """Warn where the run before had other versions."""
    before = _read_record(record).get("packages", {}) if record.is_file() else {}
    changed = [
        f"{name} {before[name]} before, {version} now"
        for name, version in _packages().items()
        if before.get(name, version) != version
    ]
    if changed:
        logger.warning("from here on, the run is not bit for bit what it would have been: %s", ", ".join(changed))


def _defaults(config: Config) -> dict[str, Any]:
    """The defaults of all keys, as `_flatten` names them and JSON gives them back."""
    defaults = build_parser("", config.modality).get_defaults().as_dict()
    del defaults["config"]  # names a file of the command line, and is no key
    return _flatten(json.loads(json.dumps(defaults)))


def _read_record(path: Path) -> dict[str, Any]:
    try:
        record = json.loads(path.read_text())
    except ValueError as error:
        raise ValueError(f"{path} is damaged: expected JSON ({error}). Give another --run, or --overwrite") from error
    if not isinstance(record, dict):
        raise ValueError(f"{path} is damaged: expected a JSON object. Give another --run, or --overwrite")
    return record


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
