"""sample.py from end to end on tiny pipelines: which files it writes, what is in them, what it refuses."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import sample
from iwin_dit.data.videos import probe_clip
from tests import test_pipeline, test_pipeline_video


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("images")
    test_pipeline.tiny_pipeline().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def videos(tmp_path_factory) -> str:
    folder = tmp_path_factory.mktemp("videos")
    test_pipeline_video.tiny_pipeline().save_pretrained(folder)
    return str(folder)


def run(model: str, out: Path, *arguments: str) -> list[str]:
    """Names of the files that were written for two classes and two seeds."""
    pairs = ["--classes", "3", "name 7", "--seeds", "0,12"]
    sample.main(["--model", model, "--out", str(out), "--steps", "2", *pairs, *arguments])
    return sorted(path.name for path in out.iterdir())


def stems(names=("3-name_3", "7-name_7")) -> list[str]:
    return [f"class-00{name}-seed-{seed:06d}" for name in names for seed in (0, 12)]


def test_images(images, tmp_path, capsys):
    assert run(images, tmp_path) == [*(f"{stem}.png" for stem in stems()), "grid.png"]
    assert "wrote 4 images to" in capsys.readouterr().out
    with Image.open(tmp_path / "class-003-name_3-seed-000012.png") as image:
        about, pixels = json.loads(image.text["iwin-dit"]), np.asarray(image).astype(int)
    assert (about["class"], about["seed"], about["num_inference_steps"], about["height"]) == (3, 12, 2, 16)
    assert about["scheduler"]["class"] == "FlowMatchEulerDiscreteScheduler"
    assert "fps" not in about
    run(images, tmp_path / "again", "--batch-size", "1")
    with Image.open(tmp_path / "again" / "class-003-name_3-seed-000012.png") as image:
        assert np.abs(np.asarray(image).astype(int) - pixels).max() <= 1  # 1e-4 before rounding


def test_clips(videos, tmp_path, capsys):
    names = run(videos, tmp_path, "--batch-size", "3")
    assert names == [*(f"{stem}.{kind}" for stem in stems() for kind in ("gif", "json", "mp4")), "grid.gif"]
    assert "wrote 4 clips to" in capsys.readouterr().out
    for stem in stems():
        with Image.open(tmp_path / f"{stem}.gif") as gif:
            assert (gif.n_frames, gif.size) == (4, (16, 16))
        facts = probe_clip(tmp_path / f"{stem}.mp4")
        assert (facts.frames, facts.width, facts.height, facts.rate) == (4, 16, 16, 8)
    about = json.loads((tmp_path / f"{stems()[1]}.json").read_text())
    assert (about["class"], about["seed"], about["num_frames"], about["height"], about["fps"]) == (3, 12, 4, 16, 8.0)
    with Image.open(tmp_path / "grid.gif") as grid:
        assert (grid.n_frames, grid.height) == (4, 2 * (64 + 2))


def test_clips_of_another_length_and_rate(videos, tmp_path):
    grid = tmp_path / "elsewhere" / "all.gif"
    settings = ["--frames", "2", "--height", "12", "--fps", "12.5", "--format", "gif", "--grid", str(grid)]
    assert run(videos, tmp_path / "out", *settings) == sorted(f"{s}.{k}" for s in stems() for k in ("gif", "json"))
    with Image.open(tmp_path / "out" / f"{stems()[0]}.gif") as gif:
        assert (gif.n_frames, gif.size, gif.info["duration"]) == (2, (16, 12), 80)
    assert grid.is_file()
    assert json.loads((tmp_path / "out" / f"{stems()[0]}.json").read_text())["fps"] == 12.5


def refused(model: str, out: Path, *arguments: str) -> str:
    """The error; nothing was sampled or written."""
    with pytest.raises(SystemExit) as stopped:
        run(model, out, *arguments)
    assert not out.exists()
    return str(stopped.value)


def test_an_image_model_has_no_frames(images, tmp_path):
    for arguments in (["--frames", "4"], ["--fps", "8"], ["--format", "gif"]):
        message = refused(images, tmp_path / "out", *arguments)
        assert f"makes images, and video models alone take {arguments[0]}" in message


def test_what_cannot_be_written_is_refused_before_sampling(videos, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert "--grid of clips must be a .gif file" in refused(videos, out, "--grid", str(tmp_path / "grid.png"))
    assert "whole frames per second, got 8.5; --fps sets" in refused(videos, out, "--fps", "8.5")
    assert "at most 50 frames per second, got 60" in refused(videos, out, "--fps", "60")
    assert "--batch-size must be at least 1, got 0" in refused(videos, out, "--batch-size", "0")
    monkeypatch.setitem(sys.modules, "av", None)
    assert 'needs PyAV: pip install "iwin-dit[video]"; --fps sets another rate, --format gif' in refused(videos, out)
    assert len(run(videos, out, "--format", "gif")) == 9


def test_formats():
    assert sample.parse_formats("gif") == ["gif"]
    assert sample.parse_formats("mp4,gif") == ["mp4", "gif"]
    for text in ("", "webm", "gif,"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected formats among gif, mp4, got"):
            sample.parse_formats(text)
