"""Files that are written whole or not at all."""

import hashlib
import json
from pathlib import Path

import pytest

from iwin_dit.files import sha256, write_durably, write_json


def test_json_is_replaced_whole_and_holds_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "fid.json"
    write_json(path, {"value": 1.5})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"value": float("nan")})
    assert json.loads(path.read_text()) == {"value": 1.5}
    assert list(tmp_path.iterdir()) == [path]


def test_sha256(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"abc")
    assert sha256(tmp_path / "file") == hashlib.sha256(b"abc").hexdigest()


def test_a_write_that_fails_leaves_what_was_there_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def half(temporary: Path) -> None:
        temporary.write_text("ne")
        raise OSError("no space left on device")

    with pytest.raises(OSError, match="no space"):
        write_durably(path, half)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]
