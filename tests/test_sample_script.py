"""sample.py from end to end on tiny pipelines: which files it writes, what is in them, what it refuses."""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image

import sample
from iwin_dit import IwinDiTVideoPipeline
from iwin_dit.data.videos import probe_clip
from iwin_dit.pipelines import pictures
from iwin_dit.pipelines.pictures import grid_size
from tests import test_pipeline, test_pipeline_video
from tests.tools import all_frames, tiny_vae, tiny_video_model


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


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["images", "videos"])
def test_compiled(kind, request, tmp_path):
    """The same pixels but for rounding, of a batch of three and one of a single sample, guided and not."""
    torch.compiler.reset()
    settings = ["--batch-size", "3", "--guidance", "2", "--guidance-interval", "0.4", "0.9"]
    settings += ["--grid", str(tmp_path / "grid.gif"), *(("--format", "frames") if kind == "videos" else ())]
    pixels, about = [], []
    for flags in ([], ["--compile"]):
        out = tmp_path / f"{len(flags)}"
        run(request.getfixturevalue(kind), out, *settings, *flags)
        files = sorted(out.rglob("*.png"))
        pixels.append({path.relative_to(out): np.asarray(Image.open(path)).astype(int) for path in files})
        first = Image.open(files[0]).text["iwin-dit"] if kind == "images" else sorted(out.glob("*.json"))[0].read_text()
        about.append(json.loads(first))
    eager, compiled = pixels
    assert eager.keys() == compiled.keys()
    assert all(np.abs(compiled[path] - eager[path]).max() <= 1 for path in eager)
    assert about[1] == about[0] | {"compiled": True}
    torch.compiler.reset()


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
    assert "0.0015 to 50 frames per second, got 60: choose" in refused(videos, out, "--fps", "60")
    assert "got 0.001: choose" in refused(videos, out, "--fps", "0.001")
    assert "fps must be a number above 0 and finite, got -1.0" in refused(
        videos, out, "--fps", "-1", "--format", "frames"
    )
    assert "--batch-size must be at least 1, got 0" in refused(videos, out, "--batch-size", "0")
    assert "height must be a positive multiple of 2" in refused(videos, out, "--height", "0")
    monkeypatch.setitem(sys.modules, "av", None)
    message = refused(videos, out, "--format", "mp4")
    assert 'video files need PyAV: pip install "iwin-dit[video]"; --format gif or --format frames' in message


def test_gifs_alone_where_there_can_be_no_mp4(videos, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    assert len(run(videos, tmp_path)) == 9  # four GIFs, four JSONs, the grid
    assert 'writing GIFs alone: video files need PyAV: pip install "iwin-dit[video]"' in capsys.readouterr().out


def test_odd_sides(tmp_path, capsys):
    """The VAE of the other tests has a stride of 2: this one has none, and gives sides of 7 pixels."""
    vae = tiny_vae(
        block_out_channels=(8,), down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",)
    )
    pipe = IwinDiTVideoPipeline(tiny_video_model(sample_size=(2, 7, 8)), vae, FlowMatchEulerDiscreteScheduler())
    pipe.save_pretrained(tmp_path / "model")
    arguments = ["--model", str(tmp_path / "model"), "--classes", "3", "--seeds", "0", "--steps", "1"]
    sample.main([*arguments, "--out", str(tmp_path / "out")])
    assert "writing GIFs alone: MP4 files have even sides, got 8 x 7 pixels" in capsys.readouterr().out
    assert not list((tmp_path / "out").glob("*.mp4"))
    with pytest.raises(SystemExit, match="even sides, got 8 x 7 pixels; --format gif or --format frames does without"):
        sample.main([*arguments, "--out", str(tmp_path / "out"), "--format", "gif,mp4"])


def test_any_rate_without_a_gif(videos, tmp_path, capsys):
    """Then there is no grid, which would be one."""
    names = run(videos, tmp_path, "--fps", "60", "--format", "mp4")
    assert names == [f"{stem}.{kind}" for stem in stems() for kind in ("json", "mp4")]
    assert "no grid: a GIF shows 0.0015 to 50 frames per second, got 60" in capsys.readouterr().out
    assert probe_clip(tmp_path / f"{stems()[0]}.mp4").rate == 60
    run(videos, tmp_path, "--fps", "8.333", "--format", "mp4")
    assert float(probe_clip(tmp_path / f"{stems()[0]}.mp4").rate) == pytest.approx(8.333, rel=1e-3)


def test_frames(videos, tmp_path):
    """What evaluation reads is what the pipeline gave, pixel by pixel."""
    grid = ["--grid", str(tmp_path / "grid.gif")]
    assert run(videos, tmp_path / "out", "--format", "frames", *grid) == sorted(
        f"{stem}{kind}" for stem in stems() for kind in ("", ".json")
    )
    pipe = test_pipeline_video.tiny_pipeline()
    expected = pipe([7], num_inference_steps=2, generator=[torch.Generator().manual_seed(12)]).frames[0]
    read = all_frames(tmp_path / "out" / stems()[3]).astype(int)
    assert np.abs(read - np.stack([np.asarray(frame) for frame in expected])).max() <= 1  # 1e-4 before rounding


def test_the_grid_shows_sixteen_seeds(images, tmp_path, capsys):
    sample.main(["--model", images, "--classes", "3", "7", "--seeds", "0-17", "--steps", "1", "--out", str(tmp_path)])
    grid = tmp_path / "grid.png"
    assert f"wrote 36 images to {tmp_path} and a grid of 32 to {grid}" in capsys.readouterr().out
    with Image.open(grid) as picture:
        assert picture.size == grid_size((16, 16), 16, ["name 3", "name 7"])
        last = np.asarray(
            picture.crop((picture.width - 66, picture.height - 66, picture.width - 2, picture.height - 2))
        )
    with Image.open(tmp_path / "class-007-name_7-seed-000015.png") as image:
        np.testing.assert_array_equal(last, np.asarray(image.resize((64, 64), Image.Resampling.NEAREST)))


def test_a_grid_that_no_file_holds_is_left_out(videos, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(pictures, "GRID_MAX_SIDE", 100)
    assert run(videos, tmp_path, "--format", "gif") == [
        f"{stem}.{kind}" for stem in stems() for kind in ("gif", "json")
    ]
    printed = capsys.readouterr().out
    assert "no grid: a grid has sides of at most 100 pixels" in printed
    assert printed.endswith(f"wrote 4 clips to {tmp_path}\n")


def test_a_model_without_a_trained_null_class(tmp_path):
    """What is recorded is the guidance that ran."""
    test_pipeline.tiny_pipeline(class_dropout_prob=0.0).save_pretrained(tmp_path / "model")
    run(str(tmp_path / "model"), tmp_path / "out")
    with Image.open(tmp_path / "out" / f"{stems()[0]}.png") as image:
        assert json.loads(image.text["iwin-dit"])["guidance_scale"] == 1.0
    message = refused(str(tmp_path / "model"), tmp_path / "other", "--guidance", "2")
    assert "guidance_scale must be 1 for this model" in message


def test_a_file_in_place_of_the_folder(images, tmp_path):
    (tmp_path / "out").write_text("")
    with pytest.raises(SystemExit, match=r"^sample.py: error: \[Errno 17\] File exists: .*out'$"):
        run(images, tmp_path / "out")


def test_formats():
    assert sample.parse_formats("gif") == ["gif"]
    assert sample.parse_formats("mp4,frames") == ["mp4", "frames"]
    for text in ("", "webm", "gif,"):
        with pytest.raises(argparse.ArgumentTypeError, match="expected formats among gif, mp4, frames, got"):
            sample.parse_formats(text)
