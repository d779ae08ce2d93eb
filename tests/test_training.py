"""What train_dit.py is made of, and a short real run: the loss falls, it resumes bit for bit, it refuses mistakes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

import train_dit
from iwin_dit import IwinDiTPipeline
from iwin_dit.data.latents import LatentDataset, LatentStore, positions_to_indices
from iwin_dit.data.manifest import Manifest
from iwin_dit.models.compilation import compile_options
from iwin_dit.training import summary
from iwin_dit.training.batches import Batch, MicroBatches
from iwin_dit.training.config import OptimConfig, TrainConfig, parse_config
from iwin_dit.training.draws import VALIDATION_STREAM, keyed_draws
from iwin_dit.training.log import read_metrics
from iwin_dit.training.plot import plot_runs
from iwin_dit.training.summary import describe
from iwin_dit.training.validation import by_time, loss_summary, validate
from tests.latent_folders import Squares, extraction, small_codec

ROOT = Path(__file__).parents[1]
DIGITS = str(ROOT / "configs" / "digits.yaml")

# --- configuration


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_builds(path):
    config = parse_config(["--config", str(path)])
    with torch.device("meta"):
        model = config.build_model()
    # on the causal axis of video, no kernel links the borders
    exchanges = model.global_exchange()
    assert all(exchange.borders if config.modality == "image" else exchange.interior for exchange in exchanges)
    assert "parameters" in describe(config, samples_per_pass=1)
    assert len(path.read_text().splitlines()) <= 40


def test_later_values_win():
    config = parse_config(["--config", DIGITS, "--optim.lr", "1e-4", "--model.window_size", "[4, 2]"])
    assert config.optim.lr == 1e-4
    assert config.model["window_size"] == (4, 2)
    assert config.data.holdout == 300


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["--optim.lrr", "1"], ["optim.lrr", "Did you mean 'optim.lr'?", "optim.warmup_images"]),
        (["--optm.lr", "1"], ["optm.lr", "Valid keys: data, ddpm"]),
        (["--runn", "x"], ["Did you mean 'run'?"]),
        (["--optim.lr", "fast"], ["optim.lr", "float", "fast"]),
        (["--model.window_size", "(8,8)"], ["model.window_size", "(8,8)"]),
        (["--train.images", "0"], ["train.images must be from 1 to 10**15, got 0"]),
        (["--model.num_layers", "1000000000"], ["model.num_layers must be from 1 to 10**4, got 1000000000"]),
        (["--train.batch_size", "-8"], ["train.batch_size must be from 1 to 10**6, got -8"]),
        (["--train.gradient_accumulation_steps", "0"], ["train.gradient_accumulation_steps must be from 1", "got 0"]),
        (["--train.seed", "-1"], ["train.seed must be in [0, 2**32), got -1"]),
        (["--optim.betas", "[0.9, 1.0]"], ["optim.betas.1 must be in [0, 1), got 1.0"]),
        (["--optim.lr", "0"], ["optim.lr must be above 0, got 0.0"]),
        (["--optim.final_lr_factor", "2"], ["optim.final_lr_factor must be in [0, 1], got 2.0"]),
        (["--log.preview_every", "-1"], ["log.preview_every must be at least 0, got -1"]),
        (["--log.preview_classes", "[0, 10]"], ["log.preview_classes must be 0 to 9, got [0, 10]"]),
        (["--ddpm.learned_variance", "true"], ["ddpm settings have no effect with objective 'flow_matching'"]),
        (
            ["--objective", "ddpm", "--ddpm.learned_variance", "true", "--model.out_channels", "4"],
            ["must be 8 (or null)"],
        ),
    ],
)
def test_mistakes_name_the_field(arguments, messages, capsys):
    with pytest.raises(SystemExit):
        parse_config(["--config", DIGITS, *arguments]).build_model()
    error = capsys.readouterr().err
    for message in messages:
        assert message in error


@pytest.mark.parametrize(
    ("text", "messages"),
    [
        ("modle: {num_layers: 2}", ["modle", "Did you mean 'model.num_layers'?"]),
        ("model: {num_layer: 2}", ["num_layer", "Did you mean 'model.num_layers'?"]),
        ("optim: {lr: fast}", ["optim.lr", "float", "fast"]),
        ("optim: {lr: !!python/object/apply:os.mkdir [pwned]}", ["python/object/apply:os.mkdir", "line 1, column 13"]),
    ],
)
def test_mistakes_in_a_file(text, messages, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(SystemExit):
        parse_config(["--config", str(tmp_path / "c.yaml")])
    error = capsys.readouterr().err
    for message in messages:
        assert message in error
    assert not (tmp_path / "pwned").exists()


def test_a_number_without_a_point_is_a_number(tmp_path):
    """YAML 1.1 reads 1e-4 as a string."""
    (tmp_path / "c.yaml").write_text(Path(DIGITS).read_text().replace("lr: 2e-3", "lr: 1e-4"))
    assert parse_config(["--config", str(tmp_path / "c.yaml")]).optim.lr == 1e-4


def test_learned_variance_doubles_the_output():
    config = parse_config(["--config", DIGITS, "--objective", "ddpm", "--ddpm.learned_variance", "true"])
    assert config.build_model().config.out_channels == 8


# --- parts


def test_draws_depend_on_seed_and_position_alone():
    draws = keyed_draws(0, [5, 6, VALIDATION_STREAM + 5], (4, 8, 8), posterior=True)
    for ours, again in zip(draws, keyed_draws(0, [6], (4, 8, 8), posterior=True), strict=True):
        assert torch.equal(ours[1], again[0])
    assert not torch.equal(draws.noise[0], draws.noise[2])
    assert not torch.equal(draws.noise[0], draws.posterior[0])
    assert not torch.equal(draws.noise[1], keyed_draws(1, [6], (4, 8, 8)).noise[0])
    first, second = keyed_draws(0, [VALIDATION_STREAM, VALIDATION_STREAM + 1], (4, 8, 8)).noise
    assert not torch.equal(first, second)
    without = keyed_draws(0, [5], (4, 8, 8))
    assert without.posterior is None
    assert torch.equal(without.noise[0], draws.noise[0])


def test_draws_are_distributed_as_they_should():
    noise, _, times, drops, flips, frames = keyed_draws(0, range(2000), (16,))
    assert flips.float().mean().item() == pytest.approx(0.5, abs=0.03)
    assert noise.mean().abs() < 0.02
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    for uniform in (times, drops, frames):
        assert uniform.min() > 0
        assert uniform.max() < 1
        assert uniform.mean().item() == pytest.approx(0.5, abs=0.02)
    for one, other in ((times, drops), (times, frames), (drops, frames)):
        assert abs(np.corrcoef(one, other)[0, 1]) < 0.06


def test_learning_rate():
    optim = OptimConfig(lr=1.0, warmup_images=8, schedule="cosine", final_lr_factor=0.1)
    rates = [optim.learning_rate(images, 2, 208) for images in (0, 6, 8, 108, 208)]
    assert rates == pytest.approx([0.25, 1.0, 1.0, 0.55, 0.1])
    assert OptimConfig(lr=0.3).learning_rate(10**6, 2, 10) == 0.3


def test_steps_round_up():
    assert TrainConfig(images=257, batch_size=128).steps == 3


def test_global_batch_is_the_same_for_any_split(digits_data):
    """Two processes with two micro-batches each see what one process sees at once, sample for sample."""
    _, data, _ = digits_data
    whole = MicroBatches(data, 0, 16, 1, 0)[3]
    parts = [MicroBatches(data, 0, 4, 2, rank)[3 * 2 + micro] for micro in range(2) for rank in range(2)]
    for ours, expected in zip(zip(*parts, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(ours), expected)


def test_positions_are_shared_out_once_each(digits_data):
    """Whatever the processes and shares: all positions of a step, once, and those of a share on its processes alone."""
    for processes, shares in ((1, 1), (4, 1), (4, 2), (6, 3), (4, 4)):
        batches = [
            MicroBatches(digits_data[1], 0, 12 // processes, processes, rank, shares=shares)
            for rank in range(processes)
        ]
        for index in (0, 5):
            positions = [batch.positions(index) for batch in batches]
            assert sorted(np.concatenate(positions).tolist()) == list(range(index * 12, index * 12 + 12))
            for rank, mine in enumerate(positions):
                assert (mine % shares == rank // (processes // shares)).all()


def test_losses_by_noise_level():
    sums = by_time(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0.0, 0.199, 0.9, 1.0]))
    assert sums.tolist() == [[3, 0, 0, 0, 7], [2, 0, 0, 0, 2]]
    summary = loss_summary(sums, prefix="validation_")
    assert summary["validation_loss"] == 2.5
    assert summary["validation_loss_by_time"] == pytest.approx([1.5, *[float("nan")] * 3, 3.5], nan_ok=True)


def test_validation_takes_all_classes(digits_folder):
    """Latents of a folder come class by class; a part of the held-out ones is drawn from all, at fixed times."""
    digits, seen = LatentStore(digits_folder / "latents"), []
    by_class = LatentDataset(digits, torch.argsort(digits.labels, stable=True).numpy())

    def losses_of(batch: Batch) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(batch)
        return batch.times, batch.times

    config = parse_config(["--config", DIGITS, "--log.validation_samples", "100"])
    AcceleratorState._reset_state(reset_partial_state=True)
    sums = [validate(config, Accelerator(cpu=True), by_class, 30, losses_of, lambda: False) for _ in range(2)]
    assert torch.equal(*sums)
    assert sums[0][1].sum() == 100
    assert torch.cat([batch.class_labels for batch in seen]).unique().tolist() == list(range(10))
    assert validate(config, Accelerator(cpu=True), by_class, 30, losses_of, lambda: True) is None


# --- the log


def test_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2: expected JSON"):
        read_metrics(path)


# --- the script

CONSTANT = ["--optim.schedule", "constant", "--optim.warmup_images", "0"]
SMALL = ["--model.num_layers", "1", "--train.batch_size", "32", "--log.every", "1", "--log.preview_every", "0"]
SMALL += ["--log.validate_every", "0"]


@pytest.fixture
def data(digits_folder, monkeypatch) -> list[str]:
    """Arguments that name the shared VAE and latents; on one thread, as two that spin are slow on a busy machine."""
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(os.cpu_count()))
    return ["--data.vae", str(digits_folder / "vae"), "--data.latents", str(digits_folder / "latents")]


def train(*arguments: str) -> None:
    """Run train_dit.py in this process, as if it had just started."""
    AcceleratorState._reset_state(reset_partial_state=True)
    train_dit.main(["--config", DIGITS, "--eval.every", "0", *arguments])


def losses(run: Path) -> list[float]:
    return [record["loss"] for record in read_metrics(run / "metrics.jsonl") if "loss" in record]


def assert_same_checkpoint(ours: Path, theirs: Path) -> None:
    for name in ("model", "ema", "optimizer"):
        a, b = load_file(ours / f"{name}.safetensors"), load_file(theirs / f"{name}.safetensors")
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def test_a_finished_run_goes_on_bit_for_bit(data, tmp_path, caplog):
    """train(4) = train(2) + resume(2); the line that was torn when the first was killed does no harm."""
    caplog.set_level("INFO")
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    arguments = [*data, *SMALL, *CONSTANT, "--log.validate_every", "1000"]
    train("--run", str(whole), *arguments, "--train.images", "128", "--log.checkpoint_every", "0")
    train("--run", str(parts), *arguments, "--train.images", "64")
    with (parts / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    train("--run", str(parts), *arguments, "--train.images", "128")
    assert f"resumed from {parts / 'checkpoints' / 'step-00000002'}" in caplog.text
    assert_same_checkpoint(whole / "checkpoints" / "step-00000004", parts / "checkpoints" / "step-00000004")

    assert losses(whole) == losses(parts)
    records = read_metrics(parts / "metrics.jsonl")
    assert [record["step"] for record in records if "validation_loss" in record] == [2, 4]
    plot_runs([parts, whole], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000

    shutil.rmtree(parts / "pipeline")
    train("--run", str(parts), *arguments, "--train.images", "128")
    assert "is done: 4 of 4 steps" in caplog.text
    assert type(IwinDiTPipeline.from_pretrained(parts / "pipeline")) is IwinDiTPipeline
    with pytest.raises(SystemExit, match=r"optim\.lr: 0\.002 before, 1\.0 now"):
        train("--run", str(parts), *arguments, "--train.images", "128", "--optim.lr", "1")


def test_a_killed_run_resumes_bit_for_bit_under_the_cosine_schedule(data, tmp_path):
    run, copy = tmp_path / "run", tmp_path / "copy"
    arguments = ["--run", str(run), *data, *SMALL, "--train.images", "128", "--log.checkpoint_every", "2"]
    train(*arguments)
    shutil.move(run / "checkpoints" / "step-00000004", copy)
    train(*arguments)
    assert_same_checkpoint(run / "checkpoints" / "step-00000004", copy)
    assert len(losses(run)) == 4


@pytest.mark.slow
def test_the_loss_falls(data, tmp_path):
    """From 1.1, the cost of the zeros that an untrained model predicts, to 0.21 (over the last five of 40 steps)."""
    arguments = ["--train.images", "1280", "--optim.warmup_images", "160"]
    train("--run", str(tmp_path), *data, *SMALL, *arguments)
    assert losses(tmp_path)[0] == pytest.approx(1.1, abs=0.05)
    assert np.mean(losses(tmp_path)[-5:]) < 0.3


def test_bfloat16_checkpointing_worker_and_tracker(data, tmp_path):
    arguments = ["--train.images", "64", "--train.mixed_precision", "bf16", "--train.gradient_checkpointing", "true"]
    train("--run", str(tmp_path), *data, *SMALL, *arguments, "--data.num_workers", "1", "--log.tracker", "tensorboard")
    assert np.isfinite(losses(tmp_path)).all()
    assert len(list(tmp_path.glob("tensorboard/**/events.out.*"))) == 1
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["resolved"]["mixed_precision"] == "bf16"


def test_accumulation_gives_the_same_step(data, tmp_path):
    """Losses and gradient norms, for Adam hides a wrong scale of the gradients."""
    curves = []
    for accumulation in ("1", "4"):
        run = tmp_path / accumulation
        arguments = ["--train.images", "96", "--train.gradient_accumulation_steps", accumulation]
        train("--run", str(run), *data, *SMALL, *CONSTANT, *arguments)
        records = [record for record in read_metrics(run / "metrics.jsonl") if "loss" in record]
        curves.append([record[key] for record in records for key in ("loss", "grad_norm")])
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_flips_and_posterior_samples_are_drawn_by_position(tmp_path):
    """From latents with both views and deviations: what is trained on is mean + deviation * noise of the view drawn."""
    codec = small_codec()
    extraction(codec, tmp_path / "latents", flips=True, posterior="mean_std", dtype="float32").run()
    data, _ = LatentStore(tmp_path / "latents").split(4, 0)
    batches = MicroBatches(data, 0, 8, 1, 0, flips=True, posterior=True)
    batch, positions = batches[3], np.arange(24, 32)
    indices = positions_to_indices(positions, len(data), 0)
    draws = keyed_draws(0, positions, (4, 4, 4), posterior=True)
    pixels = Squares().pixels(data.images[indices])
    pixels = torch.where(draws.flips[:, None, None, None], pixels.flip(-1), pixels)
    mean, std = codec.encode_posterior(pixels)
    torch.testing.assert_close(batch.latents, mean + std * draws.posterior, atol=1e-5, rtol=1e-5)
    assert 0 < draws.flips.sum() < 8
    plain = MicroBatches(data, 0, 8, 1, 0)[3]  # a configuration may ask for less than is stored
    torch.testing.assert_close(
        plain.latents, codec.encode(Squares().pixels(data.images[indices])), atol=1e-5, rtol=1e-5
    )
    assert torch.equal(plain.noise, batch.noise)


def test_statistics_of_the_data_travel_with_the_pipeline(digits_folder, tmp_path):
    """Latents of unit variance: an untrained model, which predicts 0, costs 1 for them and 1 for the noise."""
    vae = AutoencoderKL.from_pretrained(digits_folder / "vae")
    vae.register_to_config(latents_mean=None, latents_std=None)
    vae.save_pretrained(tmp_path / "vae")
    latents = ["--data.vae", str(tmp_path / "vae"), "--data.latents", str(digits_folder / "latents")]
    run = tmp_path / "run"
    train("--run", str(run), *latents, *SMALL, "--train.images", "32", "--data.latent_statistics", "data")
    assert losses(run) == pytest.approx([2.0], abs=0.1)
    manifest = Manifest.load(digits_folder / "latents")
    codec = IwinDiTPipeline.from_pretrained(run / "pipeline").codec
    assert codec.mean.tolist() == pytest.approx(manifest.latents_mean)
    assert codec.std.tolist() == pytest.approx(manifest.latents_std)


def test_a_failed_start_leaves_no_run_folder(data, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(SystemExit, match=r"data\.vae: expected a VAE folder, .*, got .*nowhere"):
        train("--run", str(run), *data, "--data.source", str(tmp_path), "--data.vae", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit) as error:
        train("--run", str(run), *data, "--model.num_classes", "7", "--model.sample_size", "16")
    assert "classes: model 7, latents 10" in str(error.value)
    assert "latent size: model (16, 16), latents (8, 8)" in str(error.value)
    with pytest.raises(SystemExit) as error:
        train("--run", str(run), *data, "--data.source", "photos/", "--data.resolution", "64", "--data.flips", "true")
    for line in (
        "source: digits there, photos wanted",
        "resolution: 32 there, 64 wanted",
        "flips: False there, True wanted",
    ):
        assert line in str(error.value)
    with pytest.raises(SystemExit, match=r"patch_size \(2, 2\) must divide sample_size \(9, 9\)"):
        train("--run", str(run), *data, "--model.sample_size", "9", "--model.patch_size", "2")
    assert not run.exists()


def test_overwrite_deletes_nothing_before_all_is_in_order(data, tmp_path):
    run = tmp_path / "run"
    train("--run", str(run), *data, *SMALL, "--train.images", "32")
    missing = ["--data.source", str(tmp_path / "no images"), "--data.latents", str(tmp_path / "no latents")]
    with pytest.raises(SystemExit, match="expected a folder of class folders"):
        train("--run", str(run), *data, *missing, "--overwrite")
    assert (run / "checkpoints" / "step-00000001").exists()


def test_a_diverged_run_stops(data, tmp_path, caplog):
    """A learning rate of 1e38: the first step spoils the weights, all others are skipped, until there were enough."""
    arguments = ["--optim.lr", "1e38", "--train.images", "3200", "--train.max_skipped_steps", "3"]
    with pytest.raises(SystemExit, match=r"step 4: loss .*: 3 steps in a row were not finite.* Lower optim\.lr"):
        train("--run", str(tmp_path / "run"), *data, *SMALL, *CONSTANT, *arguments)
    assert not (tmp_path / "run" / "checkpoints").exists()
    skipped = [r["skipped_steps"] for r in read_metrics(tmp_path / "run" / "metrics.jsonl") if "skipped_loss" in r]
    assert skipped == [1, 2, 3]
    assert "by noise level" in caplog.text


def test_previews_show_both_weights(data, tmp_path):
    arguments = ["--train.images", "32", "--log.preview_every", "1", "--log.preview_steps", "2"]
    train(
        "--run", str(tmp_path), *data, *SMALL, *arguments, "--log.preview_classes", "[3]", "--log.preview_columns", "2"
    )
    with Image.open(tmp_path / "previews" / "step-00000001.png") as picture:
        width, height = picture.size
    assert width > 2 * 2 * 64 > height


@pytest.mark.slow
def test_a_tracker_that_fails_is_let_go(data, tmp_path, caplog):
    train("--run", str(tmp_path / "run"), *data, *SMALL, "--train.images", "32")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    (tmp_path / "run" / "tensorboard").write_text("a file where the tracker wants a folder")
    train("--run", str(tmp_path / "run"), *data, *SMALL, "--train.images", "32", "--log.tracker", "tensorboard")
    assert "the tracker failed and is off from now on" in caplog.text
    assert len(losses(tmp_path / "run")) == 1


@pytest.mark.slow
def test_a_weights_and_biases_run_without_network(data, tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    train("--run", str(tmp_path), *data, *SMALL, "--train.images", "32", "--log.tracker", "wandb")
    assert len(list(tmp_path.glob("wandb/offline-run-*/*.wandb"))) == 1


@pytest.mark.parametrize("compiled", [True, False])
@pytest.mark.parametrize("kept", [True, False])
def test_a_dry_run_says_what_makes_it_fast(compiled, kept, monkeypatch):
    monkeypatch.setattr(summary, "keeps_freed_memory", lambda: kept)
    options = ["--train.compile_options", '{"max_autotune": true}'] if compiled else []
    config = parse_config(["--config", DIGITS, "--train.compile", str(compiled).lower(), *options])
    blocks, memory = (line for line in describe(config, samples_per_pass=1).splitlines() if line.startswith("speed"))
    expected = compile_options(torch.device("cpu")) | {"max_autotune": True}
    assert (f"options on a CPU: {expected}; on a GPU: {{'max_autotune': True}}" in blocks) == compiled
    assert ("blocks not compiled" in blocks) != compiled
    assert ("MALLOC_TRIM_THRESHOLD_" in memory) == kept
    assert ("left to the C library" in memory) != kept


@pytest.mark.parametrize(
    ("compiled", "options", "message"),
    [
        ("false", '{"max_autotune": true}', "needs train.compile true"),
        ("true", '{"max_autotun": true}', "no 'max_autotun', did you mean max_autotune"),
        ("true", '{"max_autotune": 1}', "compile_options.max_autotune must be of type bool, got 1"),
    ],
)
def test_options_of_the_compiler_that_cannot_work(compiled, options, message, capsys):
    with pytest.raises(SystemExit):
        parse_config(["--config", DIGITS, "--train.compile", compiled, "--train.compile_options", options])
    assert message in capsys.readouterr().err


def test_a_dry_run_trains_nothing(tmp_path, caplog):
    caplog.set_level("INFO")
    train("--run", str(tmp_path / "run"), "--dry-run")
    for word in ("num_layers: 6", "1.12M parameters", "GMACs", "64 per image", "GiB for the activations"):
        assert word in caplog.text
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_mistake_is_one_line(tmp_path):
    """In its own process, as a user sees it."""
    (tmp_path / "thesis.txt").write_text("mine")
    command = [sys.executable, "-W", "ignore", str(ROOT / "train_dit.py"), "--run", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("is not empty and holds no run (no config.json): give another --run")
    assert "Traceback" not in done.stderr
