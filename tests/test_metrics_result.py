"""The record that goes with a number."""

import hashlib
import json
from pathlib import Path

import pytest
import torch

from iwin_dit.metrics.result import environment, sha256, write_json


def test_json_is_replaced_whole_and_holds_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "new" / "fid.json"
    write_json(path, {"value": 1.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"value": float("nan")})
    assert json.loads(path.read_text()) == {"value": 1.5}
    assert list(path.parent.iterdir()) == [path]


def test_the_environment_names_versions() -> None:
    record = environment()
    assert record["packages"]["torch"] == torch.__version__.split("+")[0]
    assert record["python"].startswith("3.")
    assert "commit" in record


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256(tmp_path / "file") == hashlib.sha256(b"abc").hexdigest()
