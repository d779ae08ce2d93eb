"""Evaluation while training: the numbers are those of the checkpoint, training is as without; the best checkpoint."""

import dataclasses
import itertools
import json
import math
import os
import shutil
import signal
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors.torch import load_file

import evaluate_fid
import train_dit
from iwin_dit.evaluation.evaluator import Evaluator, Request
from iwin_dit.evaluation.samples import SampledImages, Sampling, generator_seed
from iwin_dit.metrics.digits import DigitsFeatures
from iwin_dit.metrics.images import ImageTensor
from iwin_dit.pipelines import identify, load_pipeline
from iwin_dit.training.best import Score, drop_evaluations_after, restore_best
from iwin_dit.training.checkpoint import find_damage, list_checkpoints
from iwin_dit.training.config import parse_config
from iwin_dit.training.evaluation import open_evaluator, score
from iwin_dit.training.log import read_metrics
from iwin_dit.training.plot import plot_runs
from tests.faults import at, fsdp2, launch, raises, run, sends, together

ROOT = Path(__file__).parents[1]
DIGITS = str(ROOT / "configs" / "digits.yaml")
NAME = "frechet_digits"
EVAL = [
    *("--eval.metrics", NAME, "--eval.reference", "digits", "--eval.num_samples", "12", "--eval.batch_size", "8"),
    *("--eval.num_inference_steps", "2", "--eval.seed", "3"),
]
OFF = ["--eval.every", "0"]


@pytest.fixture
def arguments(digits_folder, tmp_path) -> list[str]:
    """Of a run of 4 small steps, for a folder in which the digits classifier is, with random weights."""
    torch.manual_seed(0)
    DigitsFeatures().save(tmp_path / "data" / "digits" / "classifier", {})
    return [
        *(
            "--config",
            DIGITS,
            "--data.vae",
            str(digits_folder / "vae"),
            "--data.latents",
            str(digits_folder / "latents"),
        ),
        *("--model.num_layers", "1", "--train.batch_size", "32", "--train.images", "128"),
        *("--optim.schedule", "constant", "--optim.warmup_images", "0", "--log.every", "1"),
        *("--log.validate_every", "0", "--log.preview_every", "0", "--log.checkpoint_every", "2", *EVAL),
    ]


@pytest.fixture
def base(arguments, tmp_path, monkeypatch) -> list[str]:
    """The same, in that folder, and on one thread: two that spin for more are slow on a machine that is in use."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(os.cpu_count()))
    return arguments


def train(*arguments: str) -> None:
    """Run train_dit.py in this process, as if it had just started."""
    AcceleratorState._reset_state(reset_partial_state=True)
    train_dit.main([*arguments])


def values(path: Path, name: str = f"eval_{NAME}") -> dict[int, float]:
    """What was logged, by step."""
    return {record["step"]: record[name] for record in read_metrics(path / "metrics.jsonl") if name in record}


def checkpoints(path: Path) -> list[int]:
    folders = list_checkpoints(path / "checkpoints")
    assert [find_damage(folder) for folder in folders] == [None] * len(folders)
    return [int(folder.name.removeprefix("step-")) for folder in folders]


def best(path: Path) -> dict:
    return json.loads((path / "best.json").read_text())


def assert_same_checkpoint(ours: Path, theirs: Path) -> None:
    for name in ("model", "ema", "optimizer"):
        a, b = (load_file(folder / "checkpoints/step-00000004" / f"{name}.safetensors") for folder in (ours, theirs))
        assert a.keys() == b.keys()
        assert all(torch.equal(a[key], b[key]) for key in a)


def scripted(monkeypatch, numbers: dict[int, float]) -> None:
    """Let the evaluations of these steps come out as these numbers, all else being what it is."""
    original = train_dit.score

    def score(config, step, measurement) -> Score:
        return dataclasses.replace(original(config, step, measurement), value=numbers[step])

    monkeypatch.setattr(train_dit, "score", score)


# --- configuration


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--eval.metrics", "fidd"], "eval.metrics 'fidd': expected metrics of fid, sfid, is"),
        (["--eval.metrics", "fid,fid"], "each once, got fid, fid"),
        (["--eval.metrics", "fvd", "--eval.every", "5"], "eval.metrics 'fvd' cannot be of images"),
        (["--eval.metrics", "fid,is", "--eval.protocol", "clean"], "is is defined under protocol adm, got 'clean'"),
        (["--eval.every", "5"], "eval.reference must be given for fid: 'digits', or a file"),
        (["--eval.every", "-1"], "eval.every must be at least 0, got -1"),
        (["--eval.num_samples", "1"], "eval.num_samples must be from 2 to 2**20, got 1"),
        (["--eval.guidance_scale", "0.5"], "eval.guidance_scale must be from 1 to 10**4, got 0.5"),
        (["--eval.seed", "-1"], "eval.seed must be in [0, 4096), got -1"),
        (["--eval.seed", "4096"], "eval.seed must be in [0, 4096), got 4096"),
        (["--eval.protocol", "adn"], "eval.protocol"),
    ],
)
def test_mistakes_name_the_field(arguments, message, capsys):
    plain = ["--eval.metrics", "fid", "--eval.reference", "null", "--eval.every", "0"]
    with pytest.raises(SystemExit):
        parse_config(["--config", DIGITS, *plain, *arguments])
    assert message in capsys.readouterr().err


def test_digits_features_are_of_small_images():
    with pytest.raises(ValueError, match=r"data\.resolution: .* 32 x 32, got 64 x 64; give other --eval\.metrics"):
        open_evaluator(
            *(parse_config(["--config", DIGITS, "--data.resolution", "64"]), Accelerator(cpu=True)),
            *(None, None, ("0", "1")),  # which it does not get to
        )


def test_the_inception_score_needs_no_reference():
    arguments = ["--eval.metrics", "is", "--eval.reference", "null", "--eval.every", "5"]
    assert parse_config(["--config", DIGITS, *arguments]).eval.metric_names == ("is",)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--eval.reference", "nowhere.npz"], r"got nowhere\.npz: no such file\. Without evaluation: --eval\.every 0"),
        (["--eval.metrics", "fid", "--eval.inception_weights", "nowhere.pth"], r"nowhere\.pth"),
        (
            ["--objective", "ddpm", "--eval.num_inference_steps", "2000"],
            r"2000.*\. Without evaluation: --eval\.every 0",
        ),
    ],
)
def test_what_cannot_be_measured_is_found_before_training(extra, message, base, tmp_path):
    with pytest.raises(SystemExit, match=message):
        train(*base, "--run", str(tmp_path / "run"), "--eval.every", "2", *extra)
    assert not (tmp_path / "run").exists()


# --- the numbers


@pytest.mark.slow
def test_training_is_the_same_with_and_without(base, tmp_path, caplog):
    """Bit for bit; and the numbers are those of the checkpoint."""
    with_it, without = tmp_path / "with", tmp_path / "without"
    train(*base, "--run", str(with_it), "--eval.every", "1")
    train(*base, "--run", str(without), *OFF)
    assert_same_checkpoint(with_it, without)
    assert values(without, "loss") == values(with_it, "loss")
    assert not (without / "evaluations").exists()
    assert caplog.text.count("the distance is biased upwards") == 1

    measured = values(with_it)
    assert list(measured) == [1, 2, 3, 4]
    step = min(measured, key=measured.__getitem__)
    checkpoint = with_it / best(with_it)["checkpoint"]
    assert (best(with_it)["step"], best(with_it)["value"]) == (step, measured[step])
    AcceleratorState._reset_state(reset_partial_state=True)
    evaluate_fid.main(
        [
            *("--model", str(checkpoint), "--metrics", NAME, "--reference", "digits", "--num-samples", "12"),
            *("--guidance", "1", "--steps", "2", "--seed", "3", "--batch-size", "8", "--out", "again.json"),
        ]
    )
    again = json.loads(Path("again.json").read_text())
    assert again["metrics"][NAME]["value"] == measured[step]

    record = json.loads((with_it / "evaluations" / f"step-{step:08d}.json").read_text())
    assert record["step"] == step
    assert record["metrics"][NAME]["value"] == measured[step]
    assert record["metrics"][NAME]["floor"]["n"] == 12
    assert record["generated"]["weights"] == "ema"
    assert record["generated"]["seeds"] == [generator_seed(3, 0), generator_seed(3, 11)]
    assert record["statistics"]["seed"] == 0  # whatever that of the noise
    assert record["score"]["settings"]["reference_sha256"] == record["reference"]["sha256"]
    assert len(record["reference"]["sha256"]) == 64
    assert "reference" not in record["score"]["settings"]
    plot_runs([with_it, without], tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_resumed_run_has_the_same_evaluations(base, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(*base, "--run", str(whole), "--eval.every", "1")
    train(*base, "--run", str(parts), "--eval.every", "1", "--train.images", "64")
    train(*base, "--run", str(parts), "--eval.every", "1")
    assert_same_checkpoint(whole, parts)
    assert values(parts) == values(whole)
    assert best(parts) == best(whole)


@pytest.mark.slow
@pytest.mark.parametrize("train_on", [True, False], ids=["midway", "finished"])
def test_an_evaluation_that_was_stopped_is_made_up_for(train_on, base, tmp_path, monkeypatch):
    """By the run that goes on, before it trains: the same values, the same bits, the same best."""
    from iwin_dit.evaluation import samples

    whole, parts = tmp_path / "whole", tmp_path / "parts"
    train(*base, "--run", str(whole), "--eval.every", "2")
    arguments = [*base, "--run", str(parts), "--eval.every", "2"]
    read, calls = samples.SampledImages.read, itertools.count(1)

    def signalled(self, indices):
        if next(calls) == (1 if train_on else 3):  # of two batches per evaluation
            os.kill(os.getpid(), signal.SIGTERM)
        return read(self, indices)

    monkeypatch.setattr(samples.SampledImages, "read", signalled)
    with pytest.raises(SystemExit) as stopped:
        train(*arguments)
    assert stopped.value.code == 143
    assert list(values(parts)) == ([] if train_on else [2])
    assert checkpoints(parts)[-1] == (2 if train_on else 4)
    train(*arguments)
    assert_same_checkpoint(whole, parts)
    assert values(parts) == values(whole)
    assert list(values(parts)) == [2, 4]
    assert best(parts) == best(whole)
    seen = next(calls)
    train(*arguments)  # all is there now
    assert next(calls) == seen + 1
    assert values(parts) == values(whole)


@pytest.mark.slow
def test_samples_that_are_not_finite_are_logged(base, tmp_path, caplog):
    """A learning rate of 1e38 spoils all weights in the first step; training ends for that, and not before."""
    arguments = ["--optim.lr", "1e38", "--train.max_skipped_steps", "3", "--eval.every", "1"]
    with pytest.raises(SystemExit, match="3 steps in a row were not finite"):
        train(*base, "--run", str(tmp_path / "run"), *arguments)
    assert "there is no evaluation of step 3" in caplog.text
    assert not (tmp_path / "run" / "best.json").exists()


@pytest.mark.slow
def test_a_record_that_cannot_be_written_is_logged(base, tmp_path, caplog):
    run = tmp_path / "run"
    train(*base, "--run", str(run), *OFF, "--train.images", "64")
    (run / "evaluations").write_text("a file where the run wants a folder")
    train(*base, "--run", str(run), "--eval.every", "4")
    assert "step-00000004.json could not be written" in caplog.text
    assert best(run)["step"] == 4


# --- the best checkpoint


def test_a_score_beats_what_it_compares_with():
    score = Score(1, "fid_10", 5.0, greater_is_better=False, settings={"seed": 0})
    assert score.beats(None)
    assert not score.beats(score)  # the earlier one stays
    assert dataclasses.replace(score, value=4.0).beats(score)
    assert not dataclasses.replace(score, value=6.0).beats(score)
    assert dataclasses.replace(score, value=6.0, settings={"seed": 1}).beats(score)
    assert dataclasses.replace(score, value=6.0, metric="fid_20").beats(score)
    up = dataclasses.replace(score, greater_is_better=True)
    assert dataclasses.replace(up, value=6.0).beats(up)


@pytest.mark.slow
def test_the_best_is_kept_and_former_ones_are_not(base, tmp_path, monkeypatch):
    """keep_last=1: of steps 1 to 8, the best are 1, 2, then 3 until 7, whose checkpoint none else asks for."""
    path = tmp_path / "run"
    arguments = [*base, "--run", str(path), "--eval.every", "1", "--log.keep_last", "1"]
    scripted(monkeypatch, {1: 9.0, 2: 8.0, 3: 2.0, 4: 3.0, 5: 4.0, 6: 2.0, 7: 1.0, 8: 5.0})
    train(*arguments, "--train.images", str(6 * 32))
    assert checkpoints(path) == [3, 6]
    assert best(path) == {
        **{"step": 3, "metric": NAME, "value": 2.0, "greater_is_better": False},
        **{"checkpoint": "checkpoints/step-00000003", "settings": best(path)["settings"]},
    }
    train(*arguments, "--train.images", str(8 * 32))
    assert checkpoints(path) == [7, 8]
    assert best(path)["step"] == 7
    assert identify(path / best(path)["checkpoint"])["step"] == 7


@pytest.mark.slow
def test_a_best_that_cannot_be_saved_is_none(base, tmp_path, monkeypatch, caplog):
    """best.json follows the checkpoint, never the other way round."""
    from iwin_dit.training import checkpoint

    path, original = tmp_path / "run", checkpoint._commit

    def commit(snapshot, final: Path) -> None:
        if snapshot.step == 3:
            raise OSError(28, "No space left on device")
        original(snapshot, final)

    monkeypatch.setattr(checkpoint, "_commit", commit)
    scripted(monkeypatch, {1: 9.0, 2: 8.0, 3: 2.0, 4: 3.0})
    train(*base, "--run", str(path), "--eval.every", "1", "--log.keep_last", "1")
    assert "step-00000003 could not be written" in caplog.text
    assert best(path)["step"] == 4
    assert checkpoints(path) == [4]


@pytest.mark.slow
def test_the_best_of_a_run_that_goes_back(base, tmp_path, monkeypatch, caplog):
    path = tmp_path / "run"
    arguments = [*base, "--run", str(path), "--eval.every", "1", "--log.keep_last", "9", "--log.asynchronous", "false"]
    scripted(monkeypatch, {1: 5.0, 2: 6.0, 3: 1.0, 4: 7.0})
    train(*arguments)
    assert best(path)["step"] == 3
    scripted(monkeypatch, {3: 5.5, 4: 5.0})
    train(*arguments, "--resume", "step-00000002", "--log.keep_last", "1")
    assert best(path)["step"] == 1  # not 3, which is of another future, nor 4, which is only as good
    assert checkpoints(path) == [1, 4]
    assert list(values(path)) == [1, 2, 3, 4]


@pytest.mark.slow
def test_best_json_is_restored(base, tmp_path, monkeypatch, caplog):
    """Where the run was killed before it was written, or it names a checkpoint that is gone or damaged."""
    path = tmp_path / "run"
    scripted(monkeypatch, {2: 5.0, 4: 3.0})
    train(*base, "--run", str(path), "--eval.every", "2", "--log.keep_last", "9")
    standing = {step: path / "checkpoints" / f"step-{step:08d}" for step in (2, 4)}
    written = best(path)
    (path / "best.json").unlink()
    assert restore_best(path, standing).step == 4
    assert best(path) == written
    (path / "best.json").write_text("{torn")
    assert restore_best(path, standing).step == 4
    assert restore_best(path, {2: standing[2]}).step == 2
    assert best(path)["checkpoint"] == "checkpoints/step-00000002"
    for stray in ("step-latest.json", "step-2.json", "step-00000002 (copy).json"):
        (path / "evaluations" / stray).write_text("mine")
    caplog.clear()
    drop_evaluations_after(path, 2)
    assert restore_best(path, {2: standing[2]}).step == 2
    assert caplog.messages == []
    assert sorted(file.name for file in (path / "evaluations").iterdir()) == [
        *("step-00000002 (copy).json", "step-00000002.json", "step-2.json", "step-latest.json")
    ]
    shutil.rmtree(path / "evaluations")
    assert restore_best(path, standing).step == 2  # best.json is enough
    assert restore_best(path, {}) is None
    assert not (path / "best.json").exists()


def test_the_content_of_the_reference_counts(base, tmp_path):
    """A file that was renamed is the same reference; another one in its place is not."""
    grey, scores = ImageTensor(torch.zeros(2, 3, 32, 32, dtype=torch.uint8), "grey"), []
    for name, size in (("a.npz", 20), ("b.npz", 20), ("a.npz", 21)):
        images = np.random.default_rng(0).integers(256, size=(size, 32, 32, 3), dtype=np.uint8)
        np.savez(tmp_path / name, arr_0=images)
        measured = Evaluator(Request((NAME,), name)).measure(grey, progress=False)
        scores.append(score(parse_config([*base, "--run", "run", "--eval.reference", name]), 4, measured))
    same, renamed, other = (dataclasses.replace(ours, value=float(i)) for i, ours in enumerate(scores))
    assert not renamed.beats(same)
    assert other.beats(same)


@pytest.mark.slow
def test_other_settings_start_anew(base, tmp_path, monkeypatch):
    path = tmp_path / "run"
    scripted(monkeypatch, {2: 1.0, 4: 3.0})
    arguments = [*base, "--run", str(path), "--eval.every", "2", "--log.keep_last", "1"]
    train(*arguments, "--train.images", "64")
    train(*arguments, "--eval.guidance_scale", "2")
    assert (best(path)["step"], best(path)["settings"]["guidance_scale"]) == (4, 2.0)
    assert checkpoints(path) == [4]


# --- several processes, signals


@pytest.mark.slow
@pytest.mark.parametrize("prepare", [together(), fsdp2], ids=["DDP", "FSDP2"])
def test_two_processes_measure_what_one_does(prepare, arguments, tmp_path, monkeypatch):
    """13 samples over two processes that train alike; and a resumed run has the same best."""
    arguments = [*arguments, "--eval.every", "2", "--eval.num_samples", "13"]
    one, two = tmp_path / "one", tmp_path / "two"
    started = [
        launch([*arguments, "--run", str(one)], fault=partial(in_folder, tmp_path)),
        launch([*arguments, "--run", str(two)], ranks=2, fault=together(partial(in_folder, tmp_path), prepare)),
    ]
    for processes in started:
        result = processes.wait(40)
        assert set(result.exitcodes) == {0}, result.output
    assert values(two) == pytest.approx(values(one), rel=1e-3)  # of weights that differ by the order of sums
    assert list(values(two)) == [2, 4]
    assert best(two)["step"] == best(one)["step"]
    record = json.loads((two / "evaluations" / "step-00000004.json").read_text())
    assert record["run"]["processes"] == 2
    monkeypatch.chdir(tmp_path)
    pipe = load_pipeline(two / "checkpoints" / "step-00000004")
    images = SampledImages(pipe, 13, Sampling(2, 1.0, seed=3), {})
    again = Evaluator(Request((NAME,), "digits")).measure(images, progress=False)
    assert again.values[NAME]["value"] == pytest.approx(values(two)[4], rel=1e-5)


def in_folder(folder: Path) -> None:
    """Start where the classifier is."""
    os.chdir(folder)


@pytest.mark.slow
def test_a_stop_ends_an_evaluation(arguments, tmp_path):
    """On one of two processes, between two batches; both leave it, and there is a checkpoint to go on from."""
    path = tmp_path / "run"
    arguments = [*arguments, "--run", str(path), "--eval.every", "2", "--eval.batch_size", "1"]
    signalled = at("iwin_dit.evaluation.samples:SampledImages.read", 3, sends(signal.SIGTERM), rank=1)
    result = run(arguments, ranks=2, fault=together(partial(in_folder, tmp_path), signalled))
    assert result.exitcodes == [143, 143], result.output
    assert values(path) == {}
    assert checkpoints(path) == [2]
    result = run(arguments, ranks=2, fault=partial(in_folder, tmp_path))
    assert result.exitcodes == [0, 0], result.output
    assert list(values(path)) == [2, 4]
    assert math.isfinite(best(path)["value"])


@pytest.mark.slow
@pytest.mark.parametrize("failing", [None, 1], ids=["all", "one"])
def test_an_evaluation_that_fails_on_several_processes_is_logged(failing, arguments, tmp_path):
    """Where the samples are set up, by all processes or by one; training goes on, and the next evaluation is made."""
    path = tmp_path / "run"
    arguments = [*arguments, "--run", str(path), "--eval.every", "2"]
    broken = at("iwin_dit.evaluation.samples:SampledImages.__init__", 2, raises("no samples"), rank=failing)
    result = run(arguments, ranks=2, fault=together(partial(in_folder, tmp_path), broken))
    assert result.exitcodes == [0, 0], result.output
    assert "there is no evaluation of step 2" in result.output
    assert "rank 1 of 2 failed: RuntimeError: no samples" in result.output
    assert list(values(path)) == [4]
    assert checkpoints(path) == [2, 4]
