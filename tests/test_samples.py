"""The default run, trained once for all slow tests: what a newcomer gets from `make demo`, and how good it is."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from sklearn.svm import SVC

from iwin_dit import IwinDiTPipeline
from iwin_dit.data.codec import LatentCodec
from iwin_dit.data.digits import MIN_PSNR, Digits
from iwin_dit.data.sources import split_indices
from iwin_dit.training.runtime import MALLOC_SWITCHES
from tests.tools import fenced

pytestmark = [pytest.mark.slow, pytest.mark.demo]

ROOT = Path(__file__).parents[1]
SCRIPTS = {"train": "train_dit.py", "sample": "sample.py", "evaluate": "evaluate_fid.py"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A folder in which the default run was trained, with the README's command."""
    folder = tmp_path_factory.mktemp("demo")
    run(folder, "train")
    return folder


def run(folder: Path, script: str, *arguments: str) -> str:
    """Run a script through accelerate launch, as the README does; return what it printed."""
    launch = [sys.executable, "-m", "accelerate.commands.launch"] if script != "sample" else [sys.executable]
    ours = ("OMP_NUM_THREADS", *MALLOC_SWITCHES)  # as for a user, not as tests/conftest.py sets them
    environment = {name: value for name, value in os.environ.items() if name not in ours} | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [*launch, str(ROOT / SCRIPTS[script]), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def test_the_run_folder(folder):
    run_folder = folder / "runs" / "digits"
    names = {"pipeline", "previews", "checkpoints", "evaluations", "metrics.jsonl", "config.json", "best.json"}
    assert names <= {path.name for path in run_folder.iterdir()}
    records = [json.loads(line) for line in (run_folder / "metrics.jsonl").read_text().splitlines()]
    validation = [record["validation_loss"] for record in records if "validation_loss" in record]
    assert validation[-1] < 0.32 < validation[0]
    first, _, last = (record["eval_frechet_digits"] for record in records if "eval_frechet_digits" in record)
    assert last < first
    assert "is done: 450 of 450 steps" in run(folder, "train")


def test_the_vae_reconstructs_held_out_digits(folder):
    digits, codec = Digits(), LatentCodec(AutoencoderKL.from_pretrained(folder / "data" / "digits" / "vae"))
    pixels = torch.stack([digits[i] for i in split_indices(digits.labels, 300, seed=0)[1].tolist()]) / 127.5 - 1
    latents = codec.normalize(codec.encode(pixels))
    assert latents.mean((0, 2, 3)).abs().max() < 0.2  # the statistics are of the training split
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.2
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0))
    for strength, floor in ((0.0, MIN_PSNR), (0.1, MIN_PSNR - 1)):  # a decoder that forgives small errors
        error = (codec.decode(latents + strength * noise).clamp(-1, 1) - pixels).square().mean((1, 2, 3))
        assert (10 * (4 / error).log10()).mean() > floor


def test_samples_are_recognised(folder):
    """At least 98 % of 500 images at the default guidance and steps, by a classifier that never saw a sample."""
    digits = Digits()
    pixels = np.stack([digits[i][0].numpy().ravel() for i in range(len(digits))]) / 255
    labels = np.array(digits.labels)
    train, held_out = split_indices(digits.labels, 300, 0)
    classifier = SVC(C=10).fit(pixels[train], labels[train])
    assert classifier.score(pixels[held_out], labels[held_out]) > 0.98

    pipe = IwinDiTPipeline.from_pretrained(folder / "runs" / "digits" / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    classes = [i % 10 for i in range(500)]
    images = []
    for start in range(0, 500, 100):
        generators = [torch.Generator().manual_seed(i) for i in range(start, start + 100)]
        images += pipe(classes[start : start + 100], generator=generators).images
    samples = np.stack([np.asarray(image.convert("L")).ravel() for image in images]) / 255
    assert (classifier.predict(samples) == classes).mean() >= 0.98
    assert len({sample.tobytes() for sample in samples}) == 500


def test_sample_script(folder):
    printed = run(folder, "sample", "--model", "runs/digits", "--classes", "3", "7", "--seeds", "0-2", "--steps", "5")
    assert "wrote 6 images" in printed
    names = sorted(path.name for path in (folder / "samples").glob("class-*.png"))
    assert names == [f"class-{c:03d}-seed-{s:06d}.png" for c in (3, 7) for s in range(3)]
    with Image.open(folder / "samples" / names[0]) as image:
        about = json.loads(image.text["iwin-dit"])
    assert (about["class"], about["seed"], about["num_inference_steps"], about["guidance_scale"]) == (3, 0, 5, 3.0)
    before = np.asarray(Image.open(folder / "samples" / names[4]))
    run(
        folder,
        "sample",
        "--model",
        "runs/digits/pipeline",
        "--classes",
        "7",
        "--seeds",
        "1",
        "--steps",
        "5",
        "--out",
        "one",
    )
    alone = np.asarray(Image.open(folder / "one" / names[4]))
    assert np.abs(before.astype(int) - alone).max() <= 1  # 1e-4 before rounding


def test_evaluate_script(folder):
    printed = run(folder, "evaluate", "--model", "runs/digits", "--num-samples", "100")
    result = json.loads((folder / "runs" / "digits" / "fid.json").read_text())
    assert "frechet_digits (100 samples vs 1797 real, guidance 3, 50 steps, FlowMatchEulerDiscrete)" in printed
    assert 0 < result["metrics"]["frechet_digits"]["value"] < 60  # 500 samples score 21; 100 are biased upwards
    assert result["generated"]["seeds"] == [0, 99]


def test_the_best_checkpoint_scores_what_training_said(folder):
    best = json.loads((folder / "runs" / "digits" / "best.json").read_text())
    arguments = ["--num-samples", "200", "--steps", "20", "--guidance", "1", "--out", "best.json"]
    run(folder, "evaluate", "--model", f"runs/digits/{best['checkpoint']}", *arguments)
    result = json.loads((folder / "best.json").read_text())
    assert result["metrics"]["frechet_digits"]["value"] == pytest.approx(best["value"], rel=1e-4)
    assert result["generated"]["step"] == best["step"]


def test_the_readmes_python(folder, monkeypatch):
    """The README's Python blocks, in order, in the folder that the demo leaves."""
    monkeypatch.chdir(folder)
    exec(compile(fenced(ROOT / "README.md", "python"), "README.md", "exec"), {})
    with Image.open(folder / "three.png") as image:
        assert image.size == (32, 32)
