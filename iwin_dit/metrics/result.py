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
    """Commit of the checkout this file belongs to, with `-dirty` where files differ; None where it is installed."""
    here = Path(__file__)
    try:
        # An installed copy may lie in somebody else's repository, which does not track it.
        _git(here.parent, "ls-files", "--error-unmatch", here.name)
        return _git(here.parent, "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*")
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    run = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True)
    return run.stdout.strip()
