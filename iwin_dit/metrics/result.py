"""The record that goes with every number: file hashes, versions, commit, and an atomic JSON writer.

Must not know which metric is recorded.
"""

import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

_PACKAGES = ("iwin-dit", "torch", "torchvision", "torchmetrics", "pytorch-fid", "diffusers", "accelerate", "numpy")


def sha256(path: Path) -> str:
    """Hexadecimal sha256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def environment() -> dict[str, Any]:
    """Versions of Python and of the packages a number depends on (None: not installed), and the commit."""
    return {"python": platform.python_version(), "packages": {p: _version(p) for p in _PACKAGES}, "commit": _commit()}


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write JSON so that a reader finds the old file or the new one, never half of it.

    Args:
        path: File to write or replace; its folder is created.
        content: What to write. NaN and infinity are refused with a ValueError.
    """
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """Commit of the checkout this file lies in, with `-dirty` where files differ; None where it is installed."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return run.stdout.strip()
