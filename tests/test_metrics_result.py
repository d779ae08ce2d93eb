"""The record that goes with a number."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import torch

from iwin_dit.metrics import result
from iwin_dit.metrics.result import environment


def test_the_environment_names_versions() -> None:
    record = environment()
    assert record["packages"]["torch"] == torch.__version__.split("+")[0]
    assert record["python"].startswith("3.")
    assert "commit" in record


def test_a_commit_is_that_of_the_repository_that_tracks_the_file(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b")
        run = subprocess.run(["git", "-C", tmp_path, *who, *arguments], check=True, capture_output=True, text=True)
        return run.stdout.strip()

    copy = tmp_path / "installed.py"
    shutil.copy(result.__file__, copy)
    spec = importlib.util.spec_from_file_location("installed", copy)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    git("init")
    git("commit", "--allow-empty", "-m", "somebody else's")
    assert module.environment()["commit"] is None
    git("add", "installed.py")
    git("commit", "-m", "with it")
    assert module.environment()["commit"].removesuffix("-dirty") == git("rev-parse", "HEAD")
