"""evaluate_fid.py from its command line: what it refuses and writes, and that processes and batches don't matter."""

import hashlib
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler
from PIL import Image

from iwin_dit import IwinDiTPipeline, IwinDiTTransformer2DModel
from iwin_dit.data.digits import Digits
from iwin_dit.metrics import inception
from iwin_dit.metrics.digits import DigitsFeatures

SCRIPT = Path(__file__).parents[1] / "evaluate_fid.py"


sys.path.insert(0, str(SCRIPT.parent))  # scripts are no package
evaluate_fid = importlib.import_module("evaluate_fid")


@pytest.fixture
def workplace(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty current folder with a (random) digits classifier where the script looks for one."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    DigitsFeatures().save(tmp_path / evaluate_fid.CLASSIFIER, {})
    return tmp_path


def write_digits(folder: Path, count: int, noise: float = 0.0) -> Path:
    """The first digits as PNG files, with noise of this many grey levels."""
    digits, generator = Digits(), torch.Generator().manual_seed(0)
    folder.mkdir()
    for i in range(count):
        image = digits[i] + noise * torch.randn(3, 32, 32, generator=generator)
        pixels = image.round().clamp(0, 255).to(torch.uint8).permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{i:04}.png")
    return folder


def write_pipeline(folder: Path) -> Path:
    """A tiny pipeline with random weights: ten classes, 32 x 32 images."""
    torch.manual_seed(0)
    transformer = IwinDiTTransformer2DModel(
        sample_size=8, patch_size=2, num_layers=1, num_attention_heads=2, attention_head_dim=8, num_classes=10
    )
    for parameter in transformer.parameters():  # the zeros of the initialisation would hide the class
        torch.nn.init.normal_(parameter, std=0.2)
    vae = AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        layers_per_block=1,
        mid_block_add_attention=False,
    )
    pipe = IwinDiTPipeline(transformer, vae, FlowMatchEulerDiscreteScheduler())
    pipe.save_pretrained(folder)
    return folder


def run(*arguments: str | Path) -> dict:
    evaluate_fid.main([str(argument) for argument in arguments])
    out = arguments[arguments.index("--out") + 1] if "--out" in arguments else "fid.json"
    return json.loads(Path(out).read_text())


def test_a_folder_against_the_digits(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clean, noisy = write_digits(workplace / "clean", 100), write_digits(workplace / "noisy", 100, noise=60)
    near = run("--images", clean, "--batch-size", "600")
    far = run("--images", noisy, "--batch-size", "600", "--out", "noisy.json")
    assert 0 < near["value"] < far["value"]
    assert near["metric"] == "frechet_digits"
    assert near["reference"] == far["reference"]
    assert (near["reference"]["path"], near["reference"]["n"]) == ("digits", 1797)
    assert (near["generated"]["path"], near["generated"]["n"]) == (str(clean), 100)
    assert near["generated"]["sha256"] != far["generated"]["sha256"]
    classifier = json.loads((workplace / evaluate_fid.CLASSIFIER / "classifier.json").read_text())
    assert near["features"]["weights_sha256"] == classifier["weights_sha256"]
    assert f"frechet_digits (100 samples vs 1797 real, {clean}): {near['value']:.4g}" in capsys.readouterr().out


def test_a_folder_against_itself(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_digits(workplace / "digits", 20)
    result = run("--images", folder, "--reference", folder, "--features", "digits", "--num-samples", "20")
    assert 0 <= result["value"] < 1e-3
    assert "20 samples cannot span 64 features" in capsys.readouterr().err


def test_a_run_folder_is_sampled_image_by_image(workplace: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_pipeline(workplace / "run" / "pipeline")
    reference = str(write_digits(workplace / "digits", 30))
    arguments = ("--model", "run", "--num-samples", "12", "--steps", "2", "--seed", "7")
    arguments += ("--reference", reference, "--features", "digits")
    arguments += ("--guidance-interval", "0.1", "0.9", "--guidance-channels", "3")
    result = run(*arguments, "--batch-size", "5", "--out", "run/fid.json")
    evaluate_fid.main([*arguments, "--batch-size", "12"])  # to run/fid.json by itself
    again = json.loads(Path("run/fid.json").read_text())
    assert again["value"] == pytest.approx(result["value"], rel=1e-4)
    generated = result["generated"]
    assert generated["n"] == 12
    assert generated["image_size"] == [32, 32]
    assert generated["seeds"] == [7, 18]
    assert generated["labels"] == "i mod 10"
    assert generated["weights"] == "ema"
    assert generated["num_inference_steps"] == 2
    assert (generated["guidance_interval"], generated["guidance_channels"]) == ([0.1, 0.9], 3)
    weights = Path("run/pipeline/transformer/diffusion_pytorch_model.safetensors")
    assert generated["weights_sha256"] == {weights.name: hashlib.sha256(weights.read_bytes()).hexdigest()}
    assert generated["vae"]["class"] == "AutoencoderKL"
    assert len(generated["vae"]["sha256"]) == 64
    assert generated["guidance_scale"] == 3.0  # the pipeline's own, as a number
    assert generated["scheduler"]["class"] == "FlowMatchEulerDiscreteScheduler"
    assert "12 samples vs 30 real, guidance 3, 2 steps, FlowMatchEulerDiscrete" in capsys.readouterr().out


def test_image_i_depends_on_its_index_alone(workplace: Path) -> None:
    write_pipeline(workplace / "pipeline")
    args = evaluate_fid.parse_arguments(["--model", "pipeline", "--num-samples", "12", "--steps", "2"])
    images = evaluate_fid.sampled_images(args, torch.device("cpu"), "no")
    together = images.read(range(12))
    assert together.shape == (12, 3, 32, 32)
    alone = torch.cat([images.read([i]) for i in (11, 3)])
    # 1e-4 of a float image can cross the border between two levels of grey
    assert (alone.int() - together[[11, 3]].int()).abs().max() <= 1
    assert len({image.numpy().tobytes() for image in together}) == 12


def test_rounding_is_that_of_a_png() -> None:
    images = torch.tensor([0.0, 0.5, 1.0, 100.49 / 255, 100.51 / 255])
    assert evaluate_fid.to_uint8(images).tolist() == [0, 128, 255, 100, 101]
    with pytest.raises(FloatingPointError, match="NaN or infinite"):
        evaluate_fid.to_uint8(torch.tensor([0.5, torch.nan]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "one of the arguments --model --images is required"),
        (["--model", "a", "--images", "b"], "not allowed with"),
        (["--images", "b", "--steps", "5"], "--steps has no meaning with --images"),
        (["--images", "b", "--guidance-channels", "3"], "--guidance-channels has no meaning with --images"),
        (["--images", "b", "--seed", "0"], "--seed has no meaning with --images"),
        (["--model", "a", "--num-samples", "1"], "--num-samples of at least 2"),
        (["--model", "a", "--inception-weights", "w"], "no meaning with digits features"),
        (["--model", "a", "--reference", "r.npz", "--features", "digits"], "holds Inception statistics"),
        (["--model", "a", "--out", "nowhere/fid.json"], "does not exist"),
    ],
)
def test_commands_without_meaning_are_refused(
    workplace: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit):
        evaluate_fid.main(arguments)
    assert message in capsys.readouterr().err


def test_missing_things_are_refused_before_the_work(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_digits(workplace / "digits", 3)
    with pytest.raises(FileNotFoundError, match="missing, which is none"):
        run("--images", "missing")
    with pytest.raises(FileNotFoundError, match="missing, which is none"):
        run("--images", folder, "--reference", "missing")
    with pytest.raises(ValueError, match=r"expected 5 images in .*, as --num-samples says, got 3"):
        run("--images", folder, "--num-samples", "5")
    with pytest.raises(ValueError, match="expected a run folder"):
        run("--model", folder)
    (workplace / "text.npz").write_text("no archive")
    with pytest.raises(ValueError, match=r"text\.npz is not a usable reference"):
        run("--images", folder, "--reference", "text.npz")
    monkeypatch.setenv("TORCH_HOME", str(workplace / "home"))
    monkeypatch.setattr(inception, "WEIGHTS_URL", (workplace / "nowhere").as_uri())
    with pytest.raises(FileNotFoundError, match="no Inception weights"):
        run("--images", folder, "--reference", folder)
    assert not Path("fid.json").exists()


@pytest.mark.slow
def test_the_classifier_is_trained_once_and_is_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    first = run("--images", write_digits(tmp_path / "digits", 300))
    record = json.loads((tmp_path / evaluate_fid.CLASSIFIER / "classifier.json").read_text())
    assert record["held_out_accuracy"] >= 0.98
    monkeypatch.setattr(evaluate_fid, "train_classifier", None)  # a second training would fail
    assert run("--images", tmp_path / "digits")["value"] == first["value"]
    noisy = run("--images", write_digits(tmp_path / "noisy", 300, noise=80), "--out", "noisy.json")
    assert noisy["value"] > 2 * first["value"]


@pytest.mark.slow
def test_two_processes_give_the_value_of_one(workplace: Path) -> None:
    write_pipeline(workplace / "pipeline")
    reference = str(write_digits(workplace / "digits", 31))
    arguments = ("--model", "pipeline", "--num-samples", "13", "--steps", "2", "--batch-size", "4")
    arguments += ("--reference", reference, "--features", "digits")
    one = run(*arguments)
    # --multi_gpu with ACCELERATE_USE_CPU is how accelerate starts several processes on CPUs without mpirun.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes=2"]
    launch += ["--num_machines=1", "--mixed_precision=no", "--dynamo_backend=no", "--main_process_port=0"]
    environment = {**os.environ, "PYTHONPATH": str(SCRIPT.parent), "ACCELERATE_USE_CPU": "true"}
    subprocess.run([*launch, str(SCRIPT), *arguments, "--out", "two.json"], check=True, env=environment, timeout=300)
    two = json.loads(Path("two.json").read_text())
    assert two["run"]["processes"] == 2
    assert (two["generated"]["n"], two["reference"]["n"]) == (13, 31)
    assert two["value"] == pytest.approx(one["value"], rel=1e-4)


def test_help_needs_no_torch() -> None:
    code = f"import sys, runpy; sys.argv = ['x', '--help']\ntry: runpy.run_path({str(SCRIPT)!r}, run_name='__main__')\n"
    code += "except SystemExit: pass\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
