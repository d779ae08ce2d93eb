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
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import train_dit
from iwin_dit import IwinDiTPipeline
from iwin_dit.training.batches import MicroBatches
from iwin_dit.training.checkpoint import TrainState, check_run, list_checkpoints, open_run
from iwin_dit.training.config import Config, OptimConfig, parse_config
from iwin_dit.training.draws import VALIDATION_STREAM, keyed_draws
from iwin_dit.training.ema import EMA
from iwin_dit.training.log import read_metrics
from iwin_dit.training.plot import plot_losses
from iwin_dit.training.runtime import micro_batch_size, resolve_with_launcher
from iwin_dit.training.summary import describe
from tests.tools import tiny_model

ROOT = Path(__file__).parents[1]
DIGITS = str(ROOT / "configs" / "digits.yaml")

# --- configuration


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_config_builds(path):
    config = parse_config(["--config", str(path)])
    with torch.device("meta"):
        model = config.build_model()
    assert model.global_exchange().borders
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
        (["--optim.lrr", "1"], ["optim.lrr", "Did you mean 'optim.lr'?", "optim.warmup_steps"]),
        (["--optm.lr", "1"], ["optm.lr", "Valid keys: data, ddpm"]),
        (["--runn", "x"], ["Did you mean 'run'?"]),
        (["--optim.lr", "fast"], ["optim.lr", "float", "fast"]),
        (["--model.window_size", "(8,8)"], ["model.window_size", "(8,8)"]),
        (["--train.steps", "0"], ["train.steps must be at least 1, got 0"]),
        (["--train.ema_decay", "1"], ["train.ema_decay must be in [0, 1), got 1.0"]),
        (["--train.gradient_accumulation_steps", "0"], ["train.gradient_accumulation_steps must be at least 1, got 0"]),
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
        ("optim: {lr: !!python/object/apply:os.getcwd []}", []),
    ],
)
def test_mistakes_in_a_file(text, messages, tmp_path, capsys):
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(SystemExit):
        parse_config(["--config", str(tmp_path / "c.yaml")])
    error = capsys.readouterr().err
    for message in messages:
        assert message in error


def test_learned_variance_doubles_the_output():
    config = parse_config(["--config", DIGITS, "--objective", "ddpm", "--ddpm.learned_variance", "true"])
    assert config.build_model().config.out_channels == 8


# --- parts


def test_draws_depend_on_seed_and_position_alone():
    noise, times, drops = keyed_draws(0, [5, 6, VALIDATION_STREAM + 5], (4, 8, 8))
    again, time, drop = keyed_draws(0, [6], (4, 8, 8))
    assert torch.equal(noise[1], again[0])
    assert (times[1], drops[1]) == (time[0], drop[0])
    assert not torch.equal(noise[0], noise[2])
    assert not torch.equal(noise[1], keyed_draws(1, [6], (4, 8, 8))[0][0])


def test_draws_are_distributed_as_they_should():
    noise, times, drops = keyed_draws(0, range(2000), (16,))
    assert noise.mean().abs() < 0.02
    assert noise.std().item() == pytest.approx(1, abs=0.02)
    for uniform in (times, drops):
        assert uniform.min() > 0
        assert uniform.max() < 1
        assert uniform.mean().item() == pytest.approx(0.5, abs=0.02)
    assert abs(np.corrcoef(times, drops)[0, 1]) < 0.06


def test_ema_closed_form():
    """From 0 towards constant weights w: (1 - prod(decay_i)) w, where decay_i = min(d, (1 + i) / (10 + i))."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    ema = EMA(model, decay=0.5)
    torch.nn.init.constant_(model.weight, 2.0)
    remaining = 1.0
    for i in range(20):
        ema.update(model)
        remaining *= min(0.5, (1 + i) / (10 + i))
        assert ema.model.weight.item() == pytest.approx(2.0 * (1 - remaining))


def test_ema_of_a_bfloat16_model_is_float32():
    model = tiny_model().bfloat16()
    ema = EMA(model, 0.9)
    ema.update(model)
    assert ema.model.dtype == torch.float32
    assert not any(p.requires_grad for p in ema.model.parameters())


def test_learning_rate():
    optim = OptimConfig(lr=1.0, warmup_steps=4, schedule="cosine", final_lr_factor=0.1)
    rates = [optim.learning_rate(step, 104) for step in (0, 3, 4, 54, 104)]
    assert rates == pytest.approx([0.25, 1.0, 1.0, 0.55, 0.1])
    assert OptimConfig(lr=0.3).learning_rate(10**6, 10) == 0.3


def test_batch_split():
    assert micro_batch_size(256, 4, 2) == 32
    with pytest.raises(
        ValueError, match=r"multiple of 3 processes \* 2 accumulation steps = 6, got 256; nearest: 252 or 258"
    ):
        micro_batch_size(256, 3, 2)


@pytest.mark.parametrize(
    ("value", "launched", "expected"),
    [
        ("auto", None, "no"),
        ("auto", "bf16", "bf16"),
        ("bf16", None, "bf16"),
        ("bf16", "no", "bf16"),
        ("bf16", "bf16", "bf16"),
    ],
)
def test_configuration_and_launcher(value, launched, expected, monkeypatch):
    monkeypatch.delenv("SETTING", raising=False)
    if launched is not None:
        monkeypatch.setenv("SETTING", launched)
    assert resolve_with_launcher(value, "SETTING", "setting", "no") == expected


def test_configuration_and_launcher_disagree(monkeypatch):
    monkeypatch.setenv("SETTING", "4")
    with pytest.raises(ValueError, match="setting is 2 in the configuration but 4 in accelerate launch"):
        resolve_with_launcher(2, "SETTING", "setting", 1)


def test_global_batch_is_the_same_for_any_split(digits_data):
    """Two processes with two micro-batches each see what one process sees at once, sample for sample."""
    _, data, _ = digits_data
    whole = MicroBatches(data, 0, 16, 1, 0)[3]
    parts = [MicroBatches(data, 0, 4, 2, rank)[3 * 2 + micro] for micro in range(2) for rank in range(2)]
    for ours, expected in zip(zip(*parts, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(ours), expected)


# --- the run folder


CONSTANT = ["--optim.schedule", "constant", "--optim.warmup_steps", "0"]
RESOLVED = {"mixed_precision": "no", "latents_manifest_sha256": "a"}


def test_run_folders(tmp_path):
    run = tmp_path / "run"

    def configured(*arguments: str) -> Config:
        return parse_config(["--config", DIGITS, "--run", str(run), *arguments])

    check_run(configured())
    assert not run.exists()
    open_run(configured(), RESOLVED)
    open_run(configured("--log.every", "3", "--data.num_workers", "1", "--train.mixed_precision", "no"), RESOLVED)
    with pytest.raises(ValueError, match=r"model\.num_layers: 6 before, 2 now"):
        check_run(configured("--model.num_layers", "2"))
    with pytest.raises(ValueError, match=r"resolved\.mixed_precision: no before, bf16 now\nGive"):
        open_run(configured(), {**RESOLVED, "mixed_precision": "bf16"})
    with pytest.raises(ValueError, match=r"train\.steps: 450 before, 7 now\nThe cosine schedule ends at the last step"):
        check_run(configured("--train.steps", "7"))
    (run / "metrics.jsonl").write_text("{}")
    check_run(configured("--model.num_layers", "2", "--overwrite"))
    assert (run / "metrics.jsonl").exists()
    open_run(configured("--model.num_layers", "2", "--overwrite", *CONSTANT), RESOLVED)
    assert {path.name for path in run.iterdir()} == {"config.json"}
    check_run(configured("--model.num_layers", "2", *CONSTANT, "--train.steps", "7"))


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    for extra in ([], ["--overwrite"]):
        with pytest.raises(ValueError, match="is not empty and holds no run"):
            check_run(parse_config(["--config", DIGITS, "--run", str(tmp_path), *extra]))
    assert (tmp_path / "thesis.txt").exists()


def test_a_torn_last_line_is_left_out(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert read_metrics(path) == [{"step": 1}, {"step": 2}]
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match="line 2: expected JSON"):
        read_metrics(path)


def test_checkpoints_are_whole_and_pruned_last(tmp_path):
    model = tiny_model().train()
    state = TrainState(model, EMA(model, 0.9), torch.optim.AdamW(model.parameters(), fused=True))
    for step in (1, 2, 3):
        model(torch.randn(2, 4, 8, 8), 500, torch.tensor([1, 2])).sample.square().mean().backward()
        state.optimizer.step()
        state.ema.update(model)
        state.step = step
        state.save(tmp_path, keep=2)
    (tmp_path / ".step-00000004.tmp").mkdir()  # a save that was cut short
    (tmp_path / "step-00000005").mkdir()
    (tmp_path / ".DS_Store").touch()
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000002", "step-00000003"]

    other_model = tiny_model()
    other = TrainState(other_model, EMA(other_model, 0.9), torch.optim.AdamW(other_model.parameters(), fused=True))
    other.load(list_checkpoints(tmp_path)[-1])
    assert (other.step, other.ema.updates) == (3, 3)
    for ours, theirs in ((other.model, model), (other.ema.model, state.ema.model)):
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    ours, theirs = other.optimizer.state_dict(), state.optimizer.state_dict()
    assert ours["param_groups"] == theirs["param_groups"]
    assert ours["state"].keys() == theirs["state"].keys()
    for index, moments in theirs["state"].items():
        assert all(torch.equal(ours["state"][index][name], moments[name]) for name in moments)


# --- the script

SMALL = ["--model.num_layers", "1", "--train.batch_size", "32", "--log.every", "1", "--log.preview_every", "0"]


@pytest.fixture
def data(digits_folder) -> list[str]:
    """Arguments that name the shared VAE and latents."""
    return ["--data.vae", str(digits_folder / "vae"), "--data.latents", str(digits_folder / "latents")]


def train(*arguments: str) -> None:
    """Run train_dit.py in this process, as if it had just started."""
    AcceleratorState._reset_state(reset_partial_state=True)
    train_dit.main(["--config", DIGITS, *arguments])


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
    arguments = [*data, *SMALL, *CONSTANT]
    train("--run", str(whole), *arguments, "--train.steps", "4", "--log.checkpoint_every", "0")
    train("--run", str(parts), *arguments, "--train.steps", "2")
    with (parts / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    train("--run", str(parts), *arguments, "--train.steps", "4")
    assert f"resumed from {parts / 'checkpoints' / 'step-00000002'}" in caplog.text
    assert_same_checkpoint(whole / "checkpoints" / "step-00000004", parts / "checkpoints" / "step-00000004")

    assert losses(whole) == losses(parts)
    records = read_metrics(parts / "metrics.jsonl")
    assert [record["step"] for record in records if "validation_loss" in record] == [2, 4]
    plot_losses([parts, whole], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000

    shutil.rmtree(parts / "pipeline")
    train("--run", str(parts), *arguments, "--train.steps", "4")
    assert "is done: 4 of 4 steps" in caplog.text
    assert type(IwinDiTPipeline.from_pretrained(parts / "pipeline")) is IwinDiTPipeline
    with pytest.raises(SystemExit, match=r"optim\.lr: 0\.002 before, 1\.0 now"):
        train("--run", str(parts), *arguments, "--train.steps", "4", "--optim.lr", "1")


def test_a_killed_run_resumes_bit_for_bit_under_the_cosine_schedule(data, tmp_path):
    run, copy = tmp_path / "run", tmp_path / "copy"
    arguments = ["--run", str(run), *data, *SMALL, "--train.steps", "4", "--log.checkpoint_every", "2"]
    train(*arguments)
    shutil.move(run / "checkpoints" / "step-00000004", copy)
    train(*arguments)
    assert_same_checkpoint(run / "checkpoints" / "step-00000004", copy)
    assert len(losses(run)) == 4


def test_the_loss_falls(data, tmp_path):
    """From 1.1, the cost of the zeros that an untrained model predicts, to 0.21 (over the last five of 40 steps)."""
    arguments = ["--train.steps", "40", "--optim.warmup_steps", "5", "--log.validate_every", "0"]
    train("--run", str(tmp_path), *data, *SMALL, *arguments)
    assert losses(tmp_path)[0] == pytest.approx(1.1, abs=0.05)
    assert np.mean(losses(tmp_path)[-5:]) < 0.3


def test_bfloat16_checkpointing_worker_and_tracker(data, tmp_path):
    arguments = ["--train.steps", "2", "--train.mixed_precision", "bf16", "--train.gradient_checkpointing", "true"]
    train("--run", str(tmp_path), *data, *SMALL, *arguments, "--data.num_workers", "1", "--log.tracker", "tensorboard")
    assert np.isfinite(losses(tmp_path)).all()
    assert len(list(tmp_path.glob("tensorboard/**/events.out.*"))) == 1
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["resolved"]["mixed_precision"] == "bf16"


def test_accumulation_gives_the_same_step(data, tmp_path):
    weights = []
    for accumulation in ("1", "4"):
        run = tmp_path / accumulation
        arguments = ["--train.steps", "2", "--train.gradient_accumulation_steps", accumulation]
        train("--run", str(run), *data, *SMALL, *arguments, "--log.validate_every", "0")
        weights.append(load_file(run / "checkpoints" / "step-00000002" / "model.safetensors"))
    for name in weights[0]:
        torch.testing.assert_close(weights[0][name], weights[1][name], atol=1e-5, rtol=1e-3)


@pytest.mark.slow
def test_two_processes_give_the_weights_of_one(data, tmp_path):
    arguments = [str(ROOT / "train_dit.py"), "--config", DIGITS, *data, *SMALL, "--train.steps", "2"]
    arguments += ["--log.validation_samples", "1", "--run"]  # one process has none of its own
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    two += ["--"]  # else torchrun takes our --run for its own --run-path
    for launch, run in (([sys.executable], "one"), (two, "two")):
        subprocess.run([*launch, *arguments, str(tmp_path / run)], env=environment, check=True, timeout=300)
    one, two = (load_file(tmp_path / run / "checkpoints/step-00000002/model.safetensors") for run in ("one", "two"))
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=0)

    missing = [*launch, *arguments, str(tmp_path / "three"), "--data.latents", str(tmp_path / "missing")]
    done = subprocess.run(missing, env=environment, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode != 0
    assert "missing must be made first, by one process: python" in done.stderr
    assert "--prepare-only" in done.stderr


def test_a_failed_start_leaves_no_run_folder(data, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(SystemExit, match=r"data\.vae: expected a VAE folder .*, got .*nowhere"):
        train("--run", str(run), *data, "--data.source", str(tmp_path), "--data.vae", str(tmp_path / "nowhere"))
    with pytest.raises(SystemExit) as error:
        train("--run", str(run), *data, "--model.num_classes", "7", "--model.sample_size", "16")
    assert "classes: model 7, latents 10" in str(error.value)
    assert "latent size: model (16, 16), latents (8, 8)" in str(error.value)
    with pytest.raises(SystemExit) as error:
        train("--run", str(run), *data, "--data.source", "photos/", "--data.resolution", "64", "--data.holdout", "10")
    assert "data.source: digits there, photos wanted\n  data.resolution: 32 there, 64 wanted" in str(error.value)
    assert "data.holdout: 300 there, 10 wanted\nGive another --data.latents" in str(error.value)
    assert not run.exists()


def test_overwrite_deletes_nothing_before_all_is_in_order(data, tmp_path):
    run = tmp_path / "run"
    open_run(parse_config(["--config", DIGITS, "--run", str(run)]), RESOLVED)
    (run / "metrics.jsonl").write_text("{}")
    missing = ["--data.source", str(tmp_path / "no images"), "--data.latents", str(tmp_path / "no latents")]
    with pytest.raises(SystemExit, match="expected a folder of class folders"):
        train("--run", str(run), *data, *missing, "--overwrite")
    assert (run / "metrics.jsonl").exists()


def test_a_diverged_step_stops_the_run(data, tmp_path):
    with pytest.raises(SystemExit, match=r"This step changed no weights, .*\. Lower optim\.lr"):
        train("--run", str(tmp_path / "run"), *data, *SMALL, *CONSTANT, "--optim.lr", "1e38", "--train.steps", "4")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_dry_run_and_prepare_only_train_nothing(data, tmp_path, caplog):
    caplog.set_level("INFO")
    train("--run", str(tmp_path / "run"), "--dry-run")
    for word in ("num_layers: 6", "1.12M parameters", "GMACs", "64 per image", "GiB for the activations"):
        assert word in caplog.text
    train("--run", str(tmp_path / "run"), *data, "--prepare-only")
    assert "latents are there" in caplog.text
    assert not (tmp_path / "run").exists()


def test_a_mistake_is_one_line(tmp_path):
    """In its own process, as a user sees it."""
    (tmp_path / "thesis.txt").write_text("mine")
    command = [sys.executable, "-W", "ignore", str(ROOT / "train_dit.py"), "--run", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.strip().endswith("is not empty and holds no run (no config.json): give another --run")
    assert "Traceback" not in done.stderr
