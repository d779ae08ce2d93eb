"""The record that goes with every number: versions and commit.

Must not know which metric is recorded.
"""

import importlib.metadata
import platform
import subprocess
from pathlib import Path
from typing import Any

_PACKAGES = (
    "iwin-dit",
    "torch",
    "torchvision",
    "numpy",
    "pillow",
    "diffusers",
    "transformers",
    "accelerate",
    "pytorch-fid",
    "torch-fidelity",
    "clean-fid",
    "av",
)


def environment() -> dict[str, Any]:
    """Versions of Python and of the packages a number depends on (None: not installed), and the commit."""
    return {"python": platform.python_version(), "packages": {p: _version(p) for p in _PACKAGES}, "commit": _commit()}


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
