"""evaluate_fid.py from its command line: what it refuses, prints and writes, and that processes don't matter."""

import hashlib
import inspect
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from filelock import FileLock
from PIL import Image

import evaluate_fid
from benchmarks.seeded_inception import write_seeded_weights
from iwin_dit import IwinDiTPipeline
from iwin_dit.data.clips import ClipSettings
from iwin_dit.data.digits import Digits
from iwin_dit.data.sources import keyed_permutation
from iwin_dit.evaluation import networks
from iwin_dit.evaluation.evaluator import Measurement
from iwin_dit.evaluation.report import lines, warnings
from iwin_dit.evaluation.videos import Cut
from iwin_dit.metrics import inception
from iwin_dit.metrics.digits import DigitsFeatures
from tests.tools import tiny_model, tiny_vae

SCRIPT = Path(evaluate_fid.__file__)
FEW = ("--reference", "real.npz", "--metrics", "frechet_digits")  # quicker than all digits


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a (random) digits classifier where the script looks for one, and 80 digits in real.npz."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    DigitsFeatures().save(tmp_path / networks.CLASSIFIER, {})
    digits = Digits()
    np.savez("real.npz", np.stack([digits[i].permute(1, 2, 0).numpy() for i in range(80)]))
    return tmp_path


def write_digits(folder: Path, count: int, noise: float = 0.0) -> Path:
    """The first digits as PNG files, with noise of this many grey levels."""
    digits, generator = Digits(), torch.Generator().manual_seed(0)
    folder.mkdir(parents=True)
    for i in range(count):
        image = digits[i] + noise * torch.randn(3, 32, 32, generator=generator)
        pixels = image.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{i:04}.png")
    return folder


def write_pipeline(folder: Path) -> Path:
    """A tiny pipeline with random weights: ten classes, 32 x 32 images."""
    pipe = IwinDiTPipeline(tiny_model(sample_size=16, patch_size=2), tiny_vae(), FlowMatchEulerDiscreteScheduler())
    pipe.save_pretrained(folder)
    return folder


def run(*arguments: str | Path, out: str = "fid.json") -> dict:
    """Run the command; return the JSON that it wrote to `out`."""
    words = [str(argument) for argument in arguments]
    evaluate_fid.main(words if out == "fid.json" or words[0] in ("sweep", "reference") else [*words, "--out", out])
    return json.loads(Path(out).read_text())


def launch(processes: int, *arguments: str, script: Path = SCRIPT, **settings) -> subprocess.Popen:
    """Start the script on several CPU processes, as `accelerate launch` does."""
    # --multi_gpu with ACCELERATE_USE_CPU is how accelerate starts several processes on CPUs without mpirun.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", f"--num_processes={processes}"]
    command += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent), "ACCELERATE_USE_CPU": "true"}
    return subprocess.Popen([*command, str(script), *arguments], env=environment, text=True, **settings)


# --- what it prints and writes


def test_a_folder_against_the_digits(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clean, noisy = write_digits(workplace / "clean", 100), write_digits(workplace / "noisy", 100, noise=60)
    near = run("--images", clean, "--batch-size", "600")
    far = run("--images", noisy, "--batch-size", "600", out="noisy.json")
    near_value, far_value = (result["metrics"]["frechet_digits"]["value"] for result in (near, far))
    assert 0 < near_value < far_value
    assert near["reference"] == far["reference"]
    assert (near["reference"]["path"], near["reference"]["n"]) == ("digits", 1797)
    assert (near["generated"]["path"], near["generated"]["n"]) == (str(clean), 100)
    assert near["generated"]["sha256"] != far["generated"]["sha256"]
    classifier = json.loads((workplace / networks.CLASSIFIER / "classifier.json").read_text())
    assert near["features"]["digits"]["weights_sha256"] == classifier["weights_sha256"]
    floor = near["metrics"]["frechet_digits"]["floor"]
    assert (floor["n"], floor["against"]) == (100, 1697)
    assert (
        f"frechet_digits (100 samples vs 1797 real, {clean}, settings of the samples not known): {near_value:.5g}; 100 "
        f"real digits against the other 1697 score {floor['value']:.2g}   [fid.json]"
    ) in capsys.readouterr().out
    assert set(near["environment"]) >= {"python", "packages", "commit"}
    assert near["generated"]["sampling"] is None
    assert near["run"]["wall_seconds"] > near["run"]["seconds_for_generated"]
    assert list(Path().glob("fid.json.*")) == []  # neither statistics nor lock


def test_a_folder_against_itself(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_digits(workplace / "digits", 20)
    result = run("--images", folder, "--reference", folder, "--metrics", "frechet_digits", "--num-samples", "20")
    entry = result["metrics"]["frechet_digits"]
    assert entry["value"] == max(entry["raw"], 0) < 1e-3
    assert "frechet_digits: 20 samples cannot span 64 features" in capsys.readouterr().err


def test_a_run_folder_is_sampled_image_by_image(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pipeline(workplace / "run" / "pipeline")
    write_digits(workplace / "digits", 30)
    arguments = ("--model", "run", "--num-samples", "12", "--steps", "2", "--seed", "7")
    arguments += ("--reference", "./digits", "--metrics", "frechet_digits")
    arguments += ("--guidance-interval", "0.1", "0.9", "--guidance-channels", "3")
    result = run(*arguments, "--batch-size", "5", out="five.json")
    evaluate_fid.main([*arguments, "--batch-size", "12"])  # to run/fid.json by itself
    again = json.loads(Path("run/fid.json").read_text())
    value, value_again = (r["metrics"]["frechet_digits"]["value"] for r in (result, again))
    assert value_again == pytest.approx(value, rel=1e-4)
    generated = result["generated"]
    assert (generated["n"], generated["image_size"], generated["seeds"]) == (12, [32, 32], [7 * 2**20, 7 * 2**20 + 11])
    assert generated["labels"] == "balanced: i mod 10"
    assert generated["num_inference_steps"] == 2
    assert generated["sigmas"] == [1.0, 0.5, 0.0]
    assert (generated["guidance_interval"], generated["guidance_channels"]) == ([0.1, 0.9], 3)
    weights = Path("run/pipeline/transformer/diffusion_pytorch_model.safetensors")
    digest = hashlib.sha256(weights.read_bytes()).hexdigest()
    assert generated["weights_sha256"][f"transformer/{weights.name}"] == digest
    assert len(generated["vae"]["sha256"]) == 64
    assert result["run"]["processes"] == 1
    printed = capsys.readouterr().out
    assert "12 samples vs 30 real, guidance 3 in [0.1, 0.9] on 3 channels, 2 steps, FlowMatchEulerDiscrete" in printed


@pytest.mark.slow
def test_compiled_samples_score_the_same_and_are_another_request(workplace: Path) -> None:
    write_pipeline(workplace / "pipeline")
    model = ("--model", "pipeline", "--num-samples", "20", "--steps", "2", "--batch-size", "8", *FEW)
    torch.compiler.reset()
    eager, compiled = run(*model), run(*model, "--compile", out="compiled.json")
    assert eager["request"]["generated"] | {"compiled": True} == compiled["request"]["generated"]
    assert compiled["generated"]["compiled"]
    torch.compiler.reset()
    values = [result["metrics"]["frechet_digits"]["value"] for result in (eager, compiled)]
    assert values[1] == pytest.approx(values[0], rel=1e-4)


class MeanColours(torch.nn.Module):
    """Takes what I3D takes; gives the mean of each channel and frame, and zeros up to 400 numbers."""

    def forward(self, x: torch.Tensor, rescale: bool, resize: bool, return_features: bool) -> torch.Tensor:
        return torch.nn.functional.pad(x.mean(dim=[3, 4]).flatten(1), [0, 400 - 6])


def test_folders_of_clips(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.jit.save(torch.jit.script(MeanColours()), workplace / "i3d.pt")
    for clip in range(6):
        for side, grey in (("real", 40), ("fake", 90)):
            folder = workplace / side / f"clip{clip}"
            folder.mkdir(parents=True)
            for frame in range(4):  # the second and fourth do not count
                Image.new("L", (8, 6), grey + clip + 100 * (frame % 2)).save(folder / f"{frame}.png")
    result = run("--videos", "fake", "--reference", "real", "--i3d", "i3d.pt", "--frames", "2", "--frame-stride", "2")
    # All six features of a clip are its grey: a shift of the mean by 50, and equal covariances.
    assert result["metrics"]["fvd_6"]["value"] == pytest.approx(6 * 50**2, rel=1e-6)
    assert (result["generated"]["frames"], result["generated"]["frame_stride"]) == (2, 2)
    assert result["statistics"]["covariance"] == {"fvd": "over n"}
    assert "fvd_6 (6 samples vs 6 real, 2 frames at stride 2, from the middle, fake): 15000" in capsys.readouterr().out


def write_clip(folder: Path, greys: list[int], kind: str = "frames") -> None:
    """A clip of 8 x 6 pixels, each frame of one grey."""
    frames = [Image.new("L", (8, 6), grey) for grey in greys]
    folder.parent.mkdir(parents=True, exist_ok=True)
    if kind == "gif":
        frames[0].save(folder.with_suffix(".gif"), save_all=True, append_images=frames[1:], duration=100)
        return
    folder.mkdir()
    for number, frame in enumerate(frames):
        frame.save(folder / f"{number}.png")


def test_real_clips_that_cannot_be_cut_are_left_out_up_to_a_limit(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.jit.save(torch.jit.script(MeanColours()), workplace / "i3d.pt")
    for clip in range(7):
        write_clip(workplace / "real" / f"clip{clip}", [40 + clip] * (1 if clip in (2, 4) else 2))
        write_clip(workplace / "fake" / f"clip{clip}", [90 + clip] * 2)
    command = ("--videos", "fake", "--reference", "real", "--i3d", "i3d.pt", "--frames", "2")
    with pytest.raises(ValueError, match="clip4"):
        run(*command, "--max-broken", "1")
    result = run(*command, "--max-broken", "2")
    assert result["reference"]["n"] == 5
    assert len(result["reference"]["broken"]) == 2
    assert all(f"clip{clip}" in str(result["reference"]["broken"]) for clip in (2, 4))
    means, n = (np.mean([40, 41, 43, 45, 46]), np.mean(range(90, 97))), 6  # equal features of a clip
    spreads = np.std([40, 41, 43, 45, 46]), np.std(range(90, 97))
    expected = n * (means[0] - means[1]) ** 2 + n * (spreads[0] - spreads[1]) ** 2
    assert result["metrics"]["fvd_7"]["value"] == pytest.approx(expected, rel=1e-6)
    with pytest.raises(ValueError, match="clip1"):  # of generated clips none is left out
        (workplace / "fake" / "clip1" / "1.png").unlink()
        run(*command, "--max-broken", "2", out="other.json")


def test_a_seeded_choice_of_the_real_clips(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.jit.save(torch.jit.script(MeanColours()), workplace / "i3d.pt")
    greys = [40 + 3 * clip * clip for clip in range(8)]
    for clip, grey in enumerate(greys):
        write_clip(workplace / "real" / f"clip{clip}", [grey] * 2)
        write_clip(workplace / "fake" / f"clip{clip}", [90 + clip] * 2)
    command = ("--videos", "fake", "--reference", "real", "--i3d", "i3d.pt", "--frames", "2")
    result = run(*command, "--num-real", "5")
    chosen = [greys[i] for i in keyed_permutation(8, 0)[:5]]
    expected = 6 * (np.mean(chosen) - 93.5) ** 2 + 6 * (np.std(chosen) - np.std(range(8))) ** 2
    assert result["metrics"]["fvd_8"]["value"] == pytest.approx(expected, rel=1e-6)
    assert (result["reference"]["n"], result["reference"]["chosen_from"]) == (5, 8)
    floor = result["metrics"]["fvd_8"]["floor"]
    assert (floor["n"], floor["against"]) == (2, 3)
    assert "(8 samples vs 5 real, 2 frames at stride 1, from the middle, fake)" in capsys.readouterr().out
    assert run(*command, out="all.json")["reference"]["n"] == 8
    with pytest.raises(ValueError, match="expected at least 9 clips to choose from in real, got 8"):
        run(*command, "--num-real", "9", out="more.json")


def test_gifs_of_generated_clips_are_warned_of(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("av")
    torch.jit.save(torch.jit.script(MeanColours()), workplace / "i3d.pt")
    for clip in range(3):
        write_clip(workplace / "real" / f"clip{clip}", [40 + clip, 90])
        write_clip(workplace / "fake" / f"clip{clip}", [50 + clip, 90], kind="gif")
    command = ("--reference", "real", "--i3d", "i3d.pt", "--frames", "2")
    run("--videos", "fake", *command)
    assert capsys.readouterr().err.count("there are GIFs among the generated clips, which have 256 colours") == 1
    run("--videos", "real", *command, out="frames.json")
    assert "GIF" not in capsys.readouterr().err


def measurement(n_fake: int, values: dict, n_real: int | None = None, **record) -> Measurement:
    """A measurement in Inception features, against a file of statistics."""
    features = {"inception": {"widths": {"pool": 2048, "spatial": 2023, "logits": 1008}}}
    reference = {"path": "data/imagenet256.npz", "protocol": "adm", "image_size": [256, 256]}
    defaults = {"protocol": "adm", "features": features, "reference": reference, "run": {}}
    return Measurement(
        values, n_fake, n_real, 1.0, 1.0, {**defaults, "generated": {"image_size": [256, 256]}, **record}
    )


def test_a_line_per_value_and_none_without_its_settings() -> None:
    values = {"fid_500": {"value": 12.34, "raw": 12.34}, "is_500": {"value": 215.84, "std": 3.21}}
    fid, score = lines(measurement(500, values), "guidance 1.5, 250 steps, DDIM", Path("runs/x/fid.json"))
    settings = "guidance 1.5, 250 steps, DDIM"
    assert fid == f"fid_500 (500 samples vs imagenet256.npz, protocol adm, {settings}): 12.34   [runs/x/fid.json]"
    [known] = lines(measurement(500, {"fid_500": {"value": 1.5}}, n_real=10_000), settings, Path("fid.json"))
    assert known.startswith("fid_500 (500 samples vs imagenet256.npz, 10000 real, protocol adm, ")
    assert score == (
        f"is_500 (500 samples, protocol adm, {settings}): 215.84 (standard deviation 3.2)   [runs/x/fid.json]"
    )


def test_warnings() -> None:
    fid = {"value": 2.0, "raw": 2.0}
    assert (
        warnings(measurement(50_000, {"fid": fid})) == warnings(measurement(50_000, {"fid": fid}, n_real=50_000)) == []
    )
    [small] = warnings(measurement(50_000, {"fid": fid}, n_real=9_999))
    assert small.startswith("papers take whole data sets as reference: fid compare only with values against these 9999")
    pairs = {"precision": {"value": 0.6, "n_real": 9_999}, "recall": {"value": 0.6, "n_real": 10_000}}
    [pairs_warning] = warnings(measurement(50_000, pairs))
    assert pairs_warning.startswith("precision is against 9999 real images")
    [chunks] = warnings(measurement(50_001, {"is": {"value": 200.0, "std": 1.0}}))
    assert chunks.startswith("is is a mean over chunks of 5000 images, of which the last has 1 only")
    assert len(warnings(measurement(55_000, {"is": {"value": 200.0, "std": 1.0}}))) == 0
    [kid] = warnings(measurement(50_000, {"kid": {"value": 0.01, "std": 0.1}}, n_real=1_999))
    assert kid == "kid: its subsets are drawn from 1999 real images, expected at least 2000"
    [few] = warnings(measurement(10_000, {"fid_10000": fid}))
    assert few == "papers report 50000 samples: fid_10000 compare only with values of 10000 samples"
    assert "fid_2000: 2000 samples cannot span 2048 features" in warnings(measurement(2000, {"fid_2000": fid}))[0]
    other = {"path": "r.npz", "protocol": "not stated", "image_size": [128, 128]}
    sizes, protocol = warnings(measurement(50_000, {"fid": fid}, reference=other))
    assert sizes == "the reference images are [128, 128], the generated ones [256, 256] pixels (height, width)"
    assert protocol == "r.npz does not say by which protocol it was made; it is taken for 'adm'"
    [same] = warnings(measurement(50_000, {"fid": {"value": 0.0, "raw": -4.7e-5}}))
    assert same.startswith(
        "fid is 0 after clamping, -4.7e-05 before, which is rounding: both sides are the same images"
    )


# --- what it keeps


@pytest.mark.parametrize(("flag", "place"), [("--save-images", "png"), ("--save-npz", "samples.npz")])
def test_samples_that_are_kept_score_the_same(
    workplace: Path, capsys: pytest.CaptureFixture[str], flag: str, place: str
) -> None:
    write_pipeline(workplace / "pipeline")
    model = ("--model", "pipeline", "--num-samples", "20", "--steps", "1", "--batch-size", "8", *FEW)
    sampled = run(*model, flag, place)["metrics"]
    result = run("--images", place, "--batch-size", "8", *FEW, out="kept.json")
    assert result["generated"]["n"] == 20
    value = result["metrics"]["frechet_digits"]["value"]
    assert value == pytest.approx(sampled["frechet_digits"]["value"], rel=1e-9)
    assert f"{place}, guidance 3, 1 steps, FlowMatchEulerDiscrete): " in capsys.readouterr().out
    assert result["generated"]["sampling"]["num_inference_steps"] == 1
    written = {path: path.stat().st_mtime_ns for path in [*Path("png").glob("*"), Path(place)]}
    assert len(written) == (21 + 1 if place == "png" else 1)
    assert run(*model, flag, place, out="again.json")["metrics"] == sampled
    assert all(path.stat().st_mtime_ns == before for path, before in written.items())  # nothing was sampled again
    with pytest.raises(ValueError, match=r"made with other settings: .*seed is 0 there, 1 was asked for"):
        run(*model, flag, place, "--seed", "1", out="other.json")


def test_an_evaluation_that_failed_is_gone_on_with(workplace: Path) -> None:
    write_pipeline(workplace / "pipeline")
    model = ("--model", "pipeline", "--num-samples", "40", "--steps", "1", "--batch-size", "8", *FEW)
    whole = run(*model, "--save-images", "png")
    Path("png/000025.png").write_bytes(b"broken")
    with pytest.raises(ValueError, match=r"000025\.png is broken"):
        run(*model, "--save-images", "png", out="parts.json")
    assert list(Path("parts.json.partial").glob("attempt-*"))
    with pytest.raises(ValueError, match=r"part of another evaluation .*seed"):
        run(*model, "--seed", "1", out="parts.json")
    Path("png/000003.png").unlink()  # measured already, and yet to be kept
    Path("png/000025.png").unlink()
    parts = run(*model, "--save-images", "png", out="parts.json")
    assert parts["run"]["images_of_earlier_attempts"] == 24
    value = whole["metrics"]["frechet_digits"]["value"]
    assert parts["metrics"]["frechet_digits"]["value"] == pytest.approx(value, rel=1e-4)
    assert len(list(Path("png").glob("*.png"))) == 40
    assert not Path("parts.json.partial").exists()


def test_another_result_is_moved_aside(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first, second = write_digits(workplace / "a", 10), write_digits(workplace / "b", 10, noise=20)
    results = [run("--images", first, *FEW), run("--images", first, *FEW)]
    assert not list(Path().glob("fid.*.json"))  # of the same request: replaced
    results.append(run("--images", second, *FEW))
    assert "fid.json had another result, which is fid.1.json now" in capsys.readouterr().err
    Path("fid.json").write_text("mine")
    run("--images", first, *FEW)
    assert json.loads(Path("fid.1.json").read_text()) == results[1]
    assert Path("fid.2.json").read_text() == "mine"


def test_the_values_are_said_where_the_file_cannot_be_written(
    workplace: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path(f"fid.json.{socket.gethostname()}-{os.getpid()}.tmp").mkdir()  # where the file would be written first
    with pytest.raises(ValueError, match=r"fid\.json"):
        run("--images", write_digits(workplace / "digits", 10), *FEW)
    assert "frechet_digits (10 samples vs real.npz, 80 real, " in capsys.readouterr().out


@pytest.mark.parametrize("lock", ["fid.json.partial.lock", "a.npz.partial.lock"])
def test_a_second_start_is_refused(workplace: Path, lock: str) -> None:
    write_pipeline(workplace / "pipeline")
    model = ("--model", "pipeline", "--num-samples", "4", "--steps", "1", "--save-npz", "a.npz", *FEW)
    with FileLock(lock), pytest.raises(ValueError, match=r"another evaluation is writing .*partial: wait"):
        run(*model)
    run(*model)
    assert not list(Path().glob("*.lock"))


def test_warnings_come_before_the_work(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("large.npz", np.zeros((4, 40, 40, 3), np.uint8))
    folder = write_digits(workplace / "digits", 10)
    with pytest.raises(ValueError, match="32 x 32"):
        run("--images", folder, "--reference", "large.npz", "--metrics", "frechet_digits")
    assert "reference images are [40, 40], the generated ones [32, 32] pixels" in capsys.readouterr().err


# --- what it refuses


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "one of the arguments --model --images --videos is required"),
        ("--model a --images b", "not allowed with"),
        ("--images b --steps 5", "--steps has no meaning with --images"),
        ("--images b --guidance-channels 3", "--guidance-channels has no meaning with --images"),
        ("--images b --seed 0", "--seed has no meaning with --images"),
        ("--images b --labels random", "--labels has no meaning with --images"),
        ("--images b --compile", "--compile has no meaning with --images"),
        ("--images b --weights raw", "--weights has no meaning with --images"),
        ("--images b --save-npz c.npz", "--save-npz has no meaning with --images"),
        ("--model a --save-npz c.npz --save-images d", "not allowed with"),
        ("--model a --save-npz c", "--save-npz to be named .npz"),
        ("--images a --frames 16", "--frames has no meaning with --images: they are for clips"),
        ("--model a --frames 16 --metrics is", "--frames has no meaning with --metrics is"),
        (
            "--model a --frame-rate 8 --metrics moving_digits",
            "--frame-rate has no meaning with --metrics moving_digits",
        ),
        ("--model a --resolution 32", "--resolution has no meaning with --model: real clips are cropped to its size"),
        ("sweep --model a --resolution 32 --out b", "--resolution has no meaning with --model"),
        ("--images a --max-broken 1", "--max-broken has no meaning with --images: they are for clips"),
        ("--model a --num-real 9 --metrics moving_digits", "--num-real has no meaning with --metrics moving_digits"),
        ("--model a --max-broken 1 --metrics moving_digits", "--max-broken has no meaning with --metrics moving_"),
        ("--videos a --reference b --num-real 1", "expected --num-real of at least 2, got 1"),
        ("--videos a --reference b --max-broken -1", "expected --max-broken of at least 0, got -1"),
        ("--model a --num-samples 1", "--num-samples of at least 2"),
        ("--model a --batch-size 0", "--batch-size of at least 1"),
        ("--model a --metrics fid", "--metrics fid needs a --reference"),
        ("--model a --metrics fid,ssim --reference r", "expected metrics of fid, sfid, is, kid, pr, fd_dinov2"),
        ("--model a --metrics is --reference r", "--reference has no meaning with --metrics is"),
        ("--model a --metrics sfid --reference r --protocol clean", "sfid is defined under protocol adm, got 'clean'"),
        ("--model a --inception-weights w", "--inception-weights has no meaning with --metrics frechet_digits"),
        ("--model a --protocol adm", "--protocol has no meaning with --metrics frechet_digits"),
        ("--model a --reference r --dinov2 d", "--dinov2 has no meaning with --metrics fid"),
        ("--model a --metrics fvd,moving_digits", "fvd is of clips, with a reference of its own: expected it alone"),
        ("--model a --metrics fvd", "--metrics fvd needs a --reference"),
        ("--images a --metrics fvd --reference r", "fvd is of clips, to measure are images: expected fid or sfid or"),
        ("--videos a --metrics fid --reference r", "fid is of images, to measure are clips: expected fvd or moving"),
        ("--videos a --metrics moving_digits", "--videos have no labels: expected --metrics fvd, got moving_digits"),
        ("--videos a", "--metrics fvd needs a --reference"),
        ("--model a --out nowhere/fid.json", "does not exist"),
        ("--model a --out /proc/fid.json", "cannot be written"),
        ("--model a --out data", "expected --out to be a file, got data, which is a folder"),
        ("--model a --guidance 1 --guidance-channels 3", "--guidance-channels has no meaning with --guidance 1"),
        ("--model a --guidance 1 --guidance-interval 0 0.5", "--guidance-interval has no meaning with --guidance 1"),
        ("sweep --model a --guidance 1 --guidance-interval 0 0.5 --out b", "has no meaning with --guidance 1"),
        ("reference --source digits --num-classes 10 --resolution 32 --out r.npz", "--num-classes has no meaning with"),
        ("reference --source data --num-classes 10 --resolution 32 --out r.npz", "--num-classes has no meaning with"),
        ("--model a --save-npz nowhere/a.npz", "--save-npz nowhere/a.npz: its folder does not exist"),
        ("--videos a --reference b --frame-stride 0", "--frame-rate and --resolution above 0, got None, 0, None, None"),
        ("reference --source moving_digits --resolution 32 --out r.npz", "no reference file is made of clips"),
        ("reference --source a --resolution 32 --out r.npz --metrics moving_digits", "is made for moving_digits"),
        ("reference --source a --out r.npz", "--resolution"),
        ("reference --source a --resolution 32 --out r", "--out to be named .npz"),
        ("reference --source a --resolution 32 --out r.npz --metrics is", "no reference file is made for is"),
        ("sweep --model a --guidance 1 2", "--out"),
        ("sweep --model a --guidance-interval 0,1 --out b", "expected 2 arguments"),
        ("sweep --model a --images b --out c", "unrecognized arguments"),
    ],
)
def test_commands_without_meaning_are_refused(
    workplace: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    with pytest.raises(SystemExit):
        evaluate_fid.main(arguments.split())
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "settled"),
    [
        ("--model a", {"out": Path("fid.json")}),
        ("reference --source digits --resolution 32 --out r.npz", {"metrics": ("frechet_digits",)}),
        ("reference --source hf:x --resolution 64 --out r.npz", {"metrics": ("fid", "sfid"), "keep_images": 10_000}),
        ("reference --source hf:x --resolution 64 --out r.npz", {"num_classes": 1000}),
        (
            "sweep --model a b --guidance-interval 0 1 --guidance-interval 0.1 0.9 --out c",
            {"guidance_interval": [(0, 1), (0.1, 0.9)]},
        ),
    ],
)
def test_what_is_not_said_is_settled(workplace: Path, arguments: str, settled: dict) -> None:
    args = vars(evaluate_fid.parse_arguments(arguments.split()))
    assert {key: args[key] for key in settled} == settled


@pytest.mark.parametrize(
    ("arguments", "made", "metrics", "reference"),
    [
        ("--model a", evaluate_fid.Made(), ("frechet_digits",), "digits"),
        ("--model a", evaluate_fid.Made(True, (4, 32, 32), True, 8.0, 1), ("moving_digits",), "moving_digits"),
        ("evaluate --model a --reference r.npz", evaluate_fid.Made(False), ("fid",), "r.npz"),
        ("--model a --metrics is", evaluate_fid.Made(), ("is",), None),
        ("--videos a --reference b", evaluate_fid.Made(True), ("fvd",), "b"),
        ("--model a --reference moving_digits", evaluate_fid.Made(), ("moving_digits",), "moving_digits"),
        ("--model a --frames 8", evaluate_fid.Made(), ("moving_digits",), "moving_digits"),
        ("--model a --reference b --i3d c", evaluate_fid.Made(), ("fvd",), "b"),
    ],
)
def test_metrics_and_reference_settle_each_other(
    workplace: Path, arguments: str, made: evaluate_fid.Made, metrics: tuple[str, ...], reference: str | None
) -> None:
    args = evaluate_fid.parse_arguments(arguments.split())
    before = dict(vars(args))
    comparison = evaluate_fid.settle(args, made)
    assert (comparison.metrics, comparison.reference, comparison.protocol) == (metrics, reference, "adm")
    assert vars(args) == before


@pytest.mark.parametrize(
    ("arguments", "clips", "resolution"),
    [
        ("", ClipSettings(4, 12.5, 2), 32),
        ("--frame-stride 3", ClipSettings(4, 12.5, 3), 32),
        ("--frame-rate 25 --frames 8", ClipSettings(8, 25, 2), 32),
    ],
)
def test_real_clips_are_cut_as_the_models_but_for_what_is_said(
    workplace: Path, arguments: str, clips: ClipSettings, resolution: int
) -> None:
    model = "--model a --reference b --i3d c"
    made = evaluate_fid.Made(True, (4, 32, 32), True, 12.5, 2)
    args = evaluate_fid.parse_arguments(f"{model} {arguments}".split())
    assert evaluate_fid.settle(args, made).cut == Cut(clips, resolution)
    args = evaluate_fid.parse_arguments(["--model", "a", "--frames", "8", "--metrics", "moving_digits"])
    assert evaluate_fid.settle(args, made).cut == Cut(ClipSettings(8, frame_stride=2))
    args = evaluate_fid.parse_arguments(["--videos", "a", "--reference", "b", "--resolution", "64"])
    assert evaluate_fid.settle(args, evaluate_fid.Made(True)).cut == Cut(ClipSettings(16), 64)


def test_metrics_may_be_set_apart_by_spaces(workplace: Path) -> None:
    args = evaluate_fid.parse_arguments(["--model", "a", "--reference", "r.npz", "--metrics", " fid, is"])
    assert args.metrics == ("fid", "is")


def test_the_help_has_the_pipelines_numbers() -> None:
    defaults = inspect.signature(IwinDiTPipeline.__call__).parameters
    assert defaults["num_inference_steps"].default == evaluate_fid.DEFAULT_STEPS
    pipe = IwinDiTPipeline(tiny_model(class_dropout_prob=0.1), None, FlowMatchEulerDiscreteScheduler())
    assert pipe.default_guidance_scale == evaluate_fid.DEFAULT_GUIDANCE


def test_images_that_are_no_digits_are_refused_before_a_classifier_is_trained(workplace: Path) -> None:
    shutil.rmtree(networks.CLASSIFIER)
    pipe = IwinDiTPipeline(tiny_model(), tiny_vae(), FlowMatchEulerDiscreteScheduler())
    pipe.save_pretrained("pipeline")
    with pytest.raises(ValueError, match="takes images of 32 x 32, got 16 x 16: --reference is missing"):
        run("--model", "pipeline", "--save-images", "png")
    with pytest.raises(ValueError, match=r"takes images of 32 x 32, got 16 x 16$"):
        run("--model", "pipeline", *FEW)
    with pytest.raises(ValueError, match="takes images of 32 x 32, got 16 x 16: --reference is missing"):
        run("sweep", "--model", "pipeline", "--out", "sweep")
    assert not Path(networks.CLASSIFIER).exists()
    assert not Path("png").exists()


def test_weights_of_a_pipeline_that_does_not_say_are_refused(workplace: Path) -> None:
    write_pipeline(workplace / "pipeline")
    with pytest.raises(ValueError, match="--weights ema: pipeline has one set of weights"):
        run("--model", "pipeline", "--weights", "ema", *FEW)


def test_missing_things_are_refused_before_the_work(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_digits(workplace / "digits", 3)
    digits = ("--metrics", "frechet_digits")
    with pytest.raises(ValueError, match="missing, which does not exist"):
        run("--images", "missing")
    with pytest.raises(ValueError, match="as reference, got missing: no such file"):
        run("--images", folder, "--reference", "missing", *digits)
    with pytest.raises(ValueError, match=r"expected 5 in .*, as --num-samples says, got 3"):
        run("--images", folder, "--num-samples", "5")
    with pytest.raises(ValueError, match="expected a run folder"):
        run("--model", folder)
    (workplace / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match=r"text\.npz"):
        run("--images", folder, "--reference", "text.npz", *digits)
    monkeypatch.setenv("TORCH_HOME", str(workplace / "home"))
    monkeypatch.setattr(inception, "WEIGHTS_URL", (workplace / "nowhere").as_uri())
    with pytest.raises(ValueError, match="no Inception weights"):
        run("--images", folder, "--reference", folder)
    assert not Path("fid.json").exists()


@pytest.mark.slow
def test_a_mistake_is_one_line(workplace: Path) -> None:
    done = subprocess.run(
        [sys.executable, SCRIPT, "--images", "missing"], capture_output=True, text=True, env={**os.environ, "RANK": "0"}
    )
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("evaluate_fid.py: error: expected a folder of images")
    assert "Traceback" not in done.stderr


def test_help_needs_no_torch() -> None:
    code = f"import sys, runpy; sys.argv = ['x', *sys.argv[1:], '--help']\ntry: runpy.run_path({str(SCRIPT)!r}, "
    code += "run_name='__main__')\nexcept SystemExit: pass\nassert 'torch' not in sys.modules"
    for command in ([], ["reference"], ["sweep"]):
        done = subprocess.run([sys.executable, "-c", code, *command], check=True, capture_output=True, text=True)
        assert all(name in done.stdout for name in evaluate_fid.COMMANDS)


# --- the whole way


@pytest.mark.slow
def test_the_classifier_is_trained_once_and_is_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = run("--images", write_digits(tmp_path / "digits", 300))["metrics"]["frechet_digits"]["value"]
    record = json.loads((tmp_path / networks.CLASSIFIER / "classifier.json").read_text())
    assert record["held_out_accuracy"] >= 0.98
    monkeypatch.setattr(networks, "train_classifier", None)  # a second training would fail
    assert run("--images", tmp_path / "digits")["metrics"]["frechet_digits"]["value"] == first
    noisy = run("--images", write_digits(tmp_path / "noisy", 300, noise=80), out="noisy.json")
    assert noisy["metrics"]["frechet_digits"]["value"] > 2 * first


@pytest.mark.slow
def test_every_inception_metric_against_a_reference_of_ours(
    workplace: Path, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = write_seeded_weights(tmp_path_factory.getbasetemp() / "inception" / "seeded.pth")
    seeded = inception.sha256(weights)[:8]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception.InceptionFeatures.__init__, "__defaults__", ("adm", ("pool",), seeded))
        real, fake = write_digits(workplace / "real", 8), write_digits(workplace / "fake", 8, noise=40)
        network = ("--inception-weights", str(weights), "--batch-size", "4")
        source = ["reference", "--source", str(real), "--resolution", "32", "--out", "ref.npz"]
        evaluate_fid.main([*source, "--metrics", "fid,sfid,kid", *network])
        assert "ref.npz: 8 images of" in capsys.readouterr().out
        with np.load("ref.npz", allow_pickle=False) as archive:
            assert {"mu", "sigma", "mu_s", "sigma_s", "arr_0"} <= set(archive.files)
        every = ("--images", fake, "--metrics", "fid,sfid,is,kid,pr", *network)
        result = run(*every, "--reference", "ref.npz")
        from_images = run(*every, "--reference", real, out="images.json")
    names = [f"{name}_8" for name in ("fid", "sfid", "is", "kid", "precision", "recall")]
    assert list(result["metrics"]) == names
    for name in names:
        value, other = (r["metrics"][name]["value"] for r in (result, from_images))
        # The file has the images in another order, and KID is a small difference of float32 means of order 1 to 10.
        assert value == pytest.approx(other, rel=1e-5, abs=5e-6 if name == "kid_8" else 1e-9), name
    assert result["protocol"] == "adm"
    printed = capsys.readouterr()
    assert "fid_8 (8 samples vs ref.npz, 8 real, protocol adm, " in printed.out
    assert "is_8 (8 samples, protocol adm, " in printed.out
    assert "fid_8: 8 samples cannot span 2048 features" in printed.err


@pytest.mark.slow
def test_two_processes_give_the_value_of_one(workplace: Path) -> None:
    write_pipeline(workplace / "pipeline")
    reference = str(write_digits(workplace / "digits", 31))
    arguments = ("--model", "pipeline", "--num-samples", "13", "--steps", "2", "--batch-size", "4")
    arguments += ("--reference", reference, "--metrics", "frechet_digits")
    one = run(*arguments)
    with launch(2, *arguments, "--out", "two.json", "--save-npz", "two.npz") as process:
        assert process.wait(timeout=300) == 0
    two = json.loads(Path("two.json").read_text())
    assert two["run"]["processes"] == 2
    assert (two["generated"]["n"], two["reference"]["n"]) == (13, 31)
    assert two["metrics"]["frechet_digits"]["value"] == pytest.approx(
        one["metrics"]["frechet_digits"]["value"], rel=1e-4
    )
    with np.load("two.npz") as archive:
        assert archive["arr_1"].tolist() == [i % 10 for i in range(13)]


@pytest.mark.slow
def test_a_mistake_ends_all_processes_with_one_line(workplace: Path) -> None:
    folder = str(write_digits(workplace / "digits", 3))
    arguments = ("--images", folder, "--reference", "missing", "--metrics", "frechet_digits")
    with launch(2, *arguments, stderr=subprocess.PIPE) as process:
        _, error = process.communicate(timeout=120)
    assert process.returncode != 0
    assert error.count("evaluate_fid.py: error: expected 'digits', 'moving_digits', a folder") == 1


@pytest.mark.slow
def test_an_error_of_another_process_ends_all_and_is_named(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        "import pathlib\n"
        "import evaluate_fid\n"
        "accelerator = evaluate_fid.start()\n"
        "def action():\n"
        "    if accelerator.process_index == 1:\n"
        "        raise FileNotFoundError('it is on the other machine')\n"
        "try:\n"
        "    evaluate_fid.opened(accelerator, action)\n"
        "except Exception as error:\n"
        "    told = pathlib.Path(__file__).with_name(f'{accelerator.process_index}.txt')\n"
        "    told.write_text(f'{type(error).__name__} {error}')\n"
        "accelerator.end_training()\n"
    )
    with launch(2, script=script) as process:
        process.wait(timeout=120)
    message = "EvaluationError rank 1 of 2 failed: FileNotFoundError: it is on the other machine"
    assert [(tmp_path / f"{rank}.txt").read_text() for rank in range(2)] == [message, message]


@pytest.mark.slow
def test_a_stopped_evaluation_goes_on(workplace: Path) -> None:
    write_pipeline(workplace / "pipeline")
    arguments = ["--model", "pipeline", "--num-samples", "100", "--steps", "10", "--batch-size", "2", *FEW]
    arguments += ["--save-images", "png"]
    process = subprocess.Popen([sys.executable, SCRIPT, *arguments])
    while len(list(Path().glob("png/*.png"))) < 10:
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=60) == 128 + signal.SIGTERM
    kept = {path: path.stat().st_mtime_ns for path in Path("png").glob("*.png")}
    assert 10 <= len(kept) < 100
    result = run(*arguments)
    assert result["run"]["images_of_earlier_attempts"] == len(kept)
    assert all(path.stat().st_mtime_ns == written for path, written in kept.items())
    assert len(list(Path("png").glob("*.png"))) == 100
