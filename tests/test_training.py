"""What train_dit.py is made of, and a short real run: the loss falls, it resumes bit for bit, it refuses mistakes."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from iwin_dit import IwinDiTPipeline
from iwin_dit.training.batches import MicroBatches
from iwin_dit.training.checkpoint import TrainState, list_checkpoints, open_run
from iwin_dit.training.config import OptimConfig, parse_config
from iwin_dit.training.draws import VALIDATION_STREAM, keyed_draws
from iwin_dit.training.ema import EMA
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
        (["--train.ema_decay", "1"], [r"train.ema_decay must be in [0, 1), got 1.0"]),
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
    codec, data, _ = digits_data
    whole = MicroBatches(data, codec, 0, 16, 1, 0)[3]
    parts = [MicroBatches(data, codec, 0, 4, 2, rank)[3 * 2 + micro] for micro in range(2) for rank in range(2)]
    for ours, expected in zip(zip(*parts, strict=True), whole, strict=True):
        assert torch.equal(torch.cat(ours), expected)


# --- the run folder


def test_run_folders(tmp_path):
    run = tmp_path / "run"
    config = parse_config(["--config", DIGITS, "--run", str(run)])
    open_run(config)
    open_run(parse_config(["--config", DIGITS, "--run", str(run), "--train.steps", "7", "--log.every", "3"]))
    with pytest.raises(ValueError, match=r"model\.num_layers: 6 before, 2 now"):
        open_run(parse_config(["--config", DIGITS, "--run", str(run), "--model.num_layers", "2"]))
    (run / "metrics.jsonl").write_text("{}")
    open_run(parse_config(["--config", DIGITS, "--run", str(run), "--model.num_layers", "2", "--overwrite"]))
    assert {path.name for path in run.iterdir()} == {"config.json"}
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    for extra in ([], ["--overwrite"]):
        with pytest.raises(ValueError, match="is not empty and holds no run"):
            open_run(parse_config(["--config", DIGITS, "--run", str(foreign), *extra]))
    assert (foreign / "thesis.txt").exists()


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


def train(*arguments: str) -> subprocess.CompletedProcess:
    """Run train_dit.py in its own process, as a user does."""
    command = [sys.executable, "-W", "ignore", str(ROOT / "train_dit.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


SMALL = ["--model.num_layers", "2", "--train.batch_size", "32", "--log.every", "2", "--log.preview_every", "0"]


def test_short_run_resumes_bit_for_bit(digits_data, digits_folder, tmp_path):
    """train(4) = train(2) + resume(2), with the loss of the fourth step below that of the first."""
    data = ["--data.vae", str(digits_folder / "vae"), "--data.latents", str(digits_folder / "latents")]
    shared = [*data, *SMALL, "--optim.schedule", "constant", "--optim.warmup_steps", "0", "--log.every", "1"]
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    for run, steps in ((whole, 4), (parts, 2), (parts, 4)):
        done = train("--run", str(run), *shared, "--train.steps", str(steps))
        assert done.returncode == 0, done.stderr
    for name in ("model", "ema", "optimizer"):
        a = load_file(whole / "checkpoints" / "step-00000004" / f"{name}.safetensors")
        b = load_file(parts / "checkpoints" / "step-00000004" / f"{name}.safetensors")
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)
    records = [json.loads(line) for line in (parts / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    assert len(losses) == 4
    assert losses[3] < losses[0] < 2.5
    assert [r["step"] for r in records if "validation_loss" in r] == [2, 4]
    assert type(IwinDiTPipeline.from_pretrained(parts / "pipeline")) is IwinDiTPipeline
    plot_losses([parts, whole], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000

    again = train("--run", str(parts), *shared, "--train.steps", "4")
    assert "is done: 4 of 4 steps" in again.stderr
    changed = train("--run", str(parts), *shared, "--train.steps", "4", "--optim.lr", "1")
    assert changed.returncode != 0
    assert "optim.lr: 0.002 before, 1.0 now" in changed.stderr
    assert "Traceback" not in changed.stderr


def test_dry_run_trains_nothing(tmp_path):
    done = train("--run", str(tmp_path / "run"), "--dry-run")
    assert done.returncode == 0
    for word in ("num_layers: 6", "1.12M parameters", "GMACs", "64 per image", "GiB for the activations"):
        assert word in done.stderr
    assert not (tmp_path / "run").exists()
