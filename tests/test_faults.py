"""What a run survives: kills, signals, errors and hangs of one process, NaN, a full disk. In processes of their own."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from iwin_dit.training.checkpoint import find_damage, list_checkpoints
from iwin_dit.training.config import OptimConfig
from iwin_dit.training.log import read_metrics
from tests.faults import (
    Started,
    at,
    at_file,
    at_step,
    fsdp2,
    launch,
    nan_latents,
    raises,
    run,
    runs_out_of_space,
    sends,
    sleeps,
    together,
)

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
BATCH = 256  # 5.8 steps per epoch
TIMEOUT = ["--train.timeout", "4"]  # seconds


@pytest.fixture(scope="module")
def base(digits_folder) -> list[str]:
    """Arguments of a run of 8 steps that only trains and saves."""
    return [
        *("--config", str(ROOT / "configs" / "digits.yaml")),
        *("--data.vae", str(digits_folder / "vae"), "--data.latents", str(digits_folder / "latents")),
        *("--model.num_layers", "1", "--train.batch_size", str(BATCH), "--train.images", str(8 * BATCH)),
        *("--optim.schedule", "constant", "--optim.warmup_images", "0", "--log.every", "1"),
        *("--log.validate_every", "0", "--log.preview_every", "0", "--log.checkpoint_every", "4", "--eval.every", "0"),
    ]


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory) -> dict[int, Path]:
    """Uninterrupted runs of two micro-batches per step, with validation, by number of processes."""
    runs = {ranks: tmp_path_factory.mktemp("whole") / "run" for ranks in (1, 2)}
    arguments = [*base, *ACCUMULATE, *VALIDATE, "--run"]
    started = {ranks: launch([*arguments, str(path)], ranks=ranks) for ranks, path in runs.items()}
    for ranks, processes in started.items():
        assert processes.wait(60).exitcodes == [0] * ranks
    return runs


ACCUMULATE = ["--train.gradient_accumulation_steps", "2"]
VALIDATE = ["--log.validate_every", "2"]
PREVIEW = ["--log.preview_every", "2", "--log.preview_steps", "2", "--log.preview_columns", "1"]


def losses(path: Path, name: str = "loss") -> list[float]:
    return [record[name] for record in read_metrics(path / "metrics.jsonl") if name in record]


def assert_same_curves(ours: Path, theirs: Path, steps: int = 8) -> None:
    """But for the order of sums in float32: 1e-5 of the losses, 1e-4 of the gradient norm."""
    for name, tolerance in (("loss", 1e-5), ("validation_loss", 1e-5), ("grad_norm", 1e-4)):
        count = steps // 2 if name == "validation_loss" else steps
        assert len(losses(ours, name)) == count
        assert losses(ours, name) == pytest.approx(losses(theirs, name)[:count], rel=tolerance)


def checkpoints(path: Path) -> list[int]:
    """Steps of the checkpoints, all of which are whole; nothing else is left of a save."""
    folders = list_checkpoints(path / "checkpoints")
    assert [find_damage(folder) for folder in folders] == [None] * len(folders)
    return [int(folder.name.removeprefix("step-")) for folder in folders]


def tensors(path: Path, step: int) -> dict[str, torch.Tensor]:
    folder = path / "checkpoints" / f"step-{step:08d}"
    return {f"{file.stem}.{k}": v for file in sorted(folder.glob("*.safetensors")) for k, v in load_file(file).items()}


def assert_same_run(ours: Path, theirs: Path, step: int = 8) -> None:
    """Bit for bit: weights, average, optimizer, and the loss of every step."""
    a, b = tensors(ours, step), tensors(theirs, step)
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []
    assert losses(ours) == losses(theirs)


def workers(started: Started) -> list[psutil.Process]:
    return psutil.Process(started.pid()).children()


def assert_gone(processes: list[psutil.Process]) -> None:
    _, alive = psutil.wait_procs(processes, timeout=3)
    assert alive == []


def trains(path: Path) -> bool:
    """Whether steps have been done."""
    return (path / "metrics.jsonl").is_file() and len((path / "metrics.jsonl").read_text().splitlines()) >= 2


# --- killed while saving


@pytest.mark.parametrize("operation", [1, 4, 9, 14, 17])
def test_killed_in_a_save(operation, base, whole, tmp_path):
    path = tmp_path / "run"
    arguments = [*base, *ACCUMULATE, "--run", str(path)]
    early = ["--log.checkpoint_every", "2"]
    assert run([*arguments, *early], fault=at_file(operation, sends(signal.SIGKILL), "step-00000004")).exitcodes == [-9]
    assert 2 in checkpoints(path)
    assert run(arguments).exitcodes == [0]
    assert_same_run(path, whole[1])
    assert [child.name for child in (path / "checkpoints").iterdir() if not child.name.startswith("step-")] == []


@pytest.mark.parametrize(("name", "status", "left"), [("step-00000004", 0, [6, 8]), ("step-00000008", 1, [4, 6])])
def test_disk_full_in_a_save(name, status, left, base, tmp_path):
    """Once, and fine afterwards: training goes on. At the last save: the run has failed."""
    path = tmp_path / "run"
    arguments = [*base, "--log.checkpoint_every", "2", "--run", str(path)]
    result = run(arguments, fault=at_file(5, runs_out_of_space(), name))
    assert result.exitcodes == [status]
    assert f"{name} could not be written" in result.output
    assert "bytes are free there" in result.output
    assert len(losses(path)) == 8
    assert checkpoints(path) == left
    assert "Traceback" not in result.output


def test_disk_full_in_a_preview(base, tmp_path):
    path = tmp_path / "run"
    fault = at("PIL.Image:Image.save", 1, runs_out_of_space())
    result = run([*base, *PREVIEW, "--run", str(path)], fault=fault)
    assert result.exitcodes == [0]
    assert "No space left on device" in result.output
    assert [picture.name for picture in sorted((path / "previews").iterdir())] == [
        f"step-0000000{step}.png" for step in (4, 6, 8)
    ]


# --- signals


def test_sigterm_in_a_step_with_workers(base, tmp_path):
    """From outside and to the whole process group, as schedulers and terminals send it."""
    path = tmp_path / "run"
    endless = ["--train.images", "100000000", "--data.num_workers", "2", "--log.checkpoint_every", "1000000"]
    started = launch([*base, *endless, "--run", str(path)])
    started.until(lambda: trains(path))
    children = workers(started)
    assert len(children) == 2
    for process in (*children, psutil.Process(started.pid())):
        process.send_signal(signal.SIGTERM)
    result = started.wait()
    assert result.exitcodes == [143]
    assert "SIGTERM: stopping at the end of this step" in result.output
    [step] = checkpoints(path)
    assert step == len(losses(path))
    assert_gone(children)


def test_sigint_while_the_loader_waits(base, tmp_path):
    fault = at("iwin_dit.training.batches:MicroBatches.__getitem__", 2, interrupt_the_parent_and_sleep)
    result = run([*base, "--data.num_workers", "2", "--run", str(tmp_path / "run")], fault=fault)
    assert result.exitcodes == [130]
    assert len(checkpoints(tmp_path / "run")) == 1


def interrupt_the_parent_and_sleep() -> None:
    """In a worker: the loop waits for its batch when the signal comes, and the worker gets one, too."""
    sends(signal.SIGINT)()
    os.kill(os.getppid(), signal.SIGINT)
    sleeps(1)()


@pytest.mark.parametrize(
    ("where", "rank"),
    [
        ("iwin_dit.training.validation:validation_batch", 1),
        ("diffusers:FlowMatchEulerDiscreteScheduler.step", 0),  # rank 1 waits for the pictures
    ],
    ids=["validation", "sampling"],
)
@pytest.mark.parametrize("ranks", [1, 2])
def test_sigterm_in_validation_and_sampling(ranks, where, rank, base, tmp_path):
    path = tmp_path / "run"
    arguments = [*base, *VALIDATE, *PREVIEW, "--train.micro_batch_size", "64", "--run", str(path)]
    fault = at(where, 2, sends(signal.SIGTERM), rank=rank if ranks == 2 else 0)
    assert run(arguments, ranks=ranks, fault=fault).exitcodes == [143] * ranks
    assert checkpoints(path) == [2]
    assert not (path / "previews").exists()


def test_second_signal_exits_at_once(base, tmp_path):
    path = tmp_path / "run"
    started = launch(
        [*base, "--data.num_workers", "2", "--run", str(path)],
        fault=at_step(3, partial(touch_and_sleep, str(tmp_path))),
    )
    started.until((tmp_path / "asleep").exists)
    children = workers(started)
    started.signal(signal.SIGTERM)
    with pytest.raises(psutil.TimeoutExpired):
        psutil.Process(started.pid()).wait(1.2)
    started.signal(signal.SIGTERM)
    assert started.wait(3).exitcodes == [143]
    assert checkpoints(path) == []
    assert_gone(children)


def touch_and_sleep(folder: str) -> None:
    (Path(folder) / "asleep").touch()
    sleeps(60)()


def test_workers_do_not_survive_a_kill(base, tmp_path):
    started = launch([*base, "--data.num_workers", "2", "--run", str(tmp_path / "run")], fault=at_step(3, sleeps(60)))
    started.until(lambda: trains(tmp_path / "run"))
    children = workers(started)
    assert len(children) == 2
    started.signal(signal.SIGKILL)
    assert started.wait().exitcodes == [-9]
    assert_gone(children)


def test_time_limit(base, tmp_path):
    result = run([*base, "--train.max_time", "1e-9", "--run", str(tmp_path / "run")])
    assert result.exitcodes == [143]
    assert "train.max_time is over: stopping" in result.output
    assert checkpoints(tmp_path / "run") == [1]


# --- resuming


@pytest.mark.parametrize(("ranks", "num_workers"), [(1, 0), (1, 2), (2, 0), (2, 2)])
def test_stopped_and_resumed_is_the_same_run(ranks, num_workers, base, whole, tmp_path):
    """Stopped in the middle of an epoch and of an accumulated step; with two processes, one of them is told."""
    path = tmp_path / "run"
    arguments = [*base, *ACCUMULATE, "--data.num_workers", str(num_workers), "--run", str(path)]
    fault = at("train_dit:batch_losses", 6, sends(signal.SIGTERM), rank=ranks - 1)
    assert run(arguments, ranks=ranks, fault=fault).exitcodes == [143] * ranks
    assert checkpoints(path) == [3]
    assert run(arguments, ranks=ranks).exitcodes == [0] * ranks
    assert_same_run(path, whole[ranks])


def test_two_processes_have_the_curves_of_one(whole):
    assert_same_curves(whole[2], whole[1])


@pytest.mark.parametrize("prepare", [together(), fsdp2], ids=["DDP", "FSDP2"])
def test_resumed_by_another_number_of_processes(prepare, base, whole, tmp_path):
    """The same samples and random numbers, so the same run but for the order of sums; sharded or not."""
    path = tmp_path / "run"
    arguments = [*base, *VALIDATE, "--run", str(path)]
    fault = together(prepare, at_step(5, sends(signal.SIGTERM), rank=0))
    assert run([*arguments, *ACCUMULATE], ranks=2, fault=fault).exitcodes == [143, 143]
    assert checkpoints(path) == [4, 5]
    assert_same_curves(path, whole[2], steps=5)
    assert run(arguments).exitcodes == [0]
    assert_same_curves(path, whole[1])
    ours, theirs = tensors(path, 8), tensors(whole[1], 8)
    assert ours.keys() == theirs.keys()
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], atol=1e-4, rtol=1e-3)

    result = run([*base, "--run", str(path), "--train.batch_size", "128"])
    assert result.exitcodes == [1]
    assert "train.batch_size: 256 before, 128 now" in result.output


def test_all_checkpoints_are_damaged(base, whole, tmp_path):
    """Rank 0 finds out; the other does not wait for it."""
    path = tmp_path / "run"
    shutil.copytree(whole[2], path)
    for folder in list_checkpoints(path / "checkpoints"):
        os.truncate(folder / "model.safetensors", 100)
    result = launch([*base, *ACCUMULATE, "--run", str(path)], ranks=2).wait(5)
    assert result.exitcodes == [1, 1]
    assert f"train_dit.py: error: every checkpoint in {path / 'checkpoints'} is damaged" in result.output
    assert "Traceback" not in result.output


# --- numbers that are not finite


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_step_with_nan_is_skipped(ranks, base, tmp_path):
    """On all ranks, where one has it. Skipped steps are saved only if the run is stopped there, as it is here."""
    path = tmp_path / "run"
    arguments = [*base, "--log.checkpoint_every", "1", "--log.keep_last", "8", "--run", str(path)]
    result = run(arguments, ranks=ranks, fault=together(nan_latents(2), at_step(3, sends(signal.SIGTERM))))
    assert result.exitcodes == [143] * ranks
    assert "step 3: loss nan" in result.output
    assert run(arguments, ranks=ranks).exitcodes == [0] * ranks
    before, skipped, after = (tensors(path, step) for step in (2, 3, 4))
    assert all(torch.equal(before[name], skipped[name]) for name in before)
    assert all(tensor.isfinite().all() for tensor in after.values())
    assert not all(torch.equal(skipped[name], after[name]) for name in after)
    records = read_metrics(path / "metrics.jsonl")
    assert [r["step"] for r in records if "skipped_loss" in r] == [3]
    assert [r["skipped_steps"] for r in records if "loss" in r][-1] == 1
    assert json.loads((path / "checkpoints" / "step-00000008" / "state.json").read_text())["skipped"] == 1


def test_too_many_steps_in_a_row_end_the_run(base, tmp_path):
    path = tmp_path / "run"
    arguments = [*base, "--log.checkpoint_every", "2", "--train.max_skipped_steps", "3", "--run", str(path)]
    result = run(arguments, ranks=2, fault=nan_latents(2, 4, 5, 6))
    assert result.exitcodes == [1, 1]
    assert "3 steps in a row were not finite" in result.output
    assert checkpoints(path)
    assert all(tensor.isfinite().all() for tensor in tensors(path, max(checkpoints(path))).values())


def test_weights_that_are_not_finite_are_not_saved(base, tmp_path):
    """The step that spoils them has a finite loss and gradient, so that a checkpoint of it is due; all later skip."""
    path = tmp_path / "run"
    arguments = [*base, "--log.checkpoint_every", "2", "--train.max_skipped_steps", "9", "--train.images", "100000"]
    result = run([*arguments, "--run", str(path)], fault=partial(diverge_from, 4))
    assert result.exitcodes == [1]
    assert "9 steps in a row were not finite" in result.output
    assert "step-00000004 was not written: its weights are not finite" in result.output
    assert checkpoints(path) == [2]
    assert all(tensor.isfinite().all() for tensor in tensors(path, 2).values())


def diverge_from(step: int) -> None:
    original = OptimConfig.learning_rate

    def learning_rate(self: OptimConfig, images: int, batch_size: int, total: int) -> float:
        return 1e39 if images >= (step - 1) * batch_size else original(self, images, batch_size, total)

    OptimConfig.learning_rate = learning_rate


def test_diverged(base, tmp_path):
    path = tmp_path / "run"
    arguments = ["--optim.lr", "1e38", "--log.checkpoint_every", "2", "--train.max_skipped_steps", "5"]
    result = run([*base, *arguments, "--run", str(path)])
    assert result.exitcodes == [1]
    [message] = [line for line in result.output.splitlines() if "5 steps in a row were not finite" in line]
    for word in ("step 6", "loss ", "grad_norm "):
        assert word in message
    assert math.isfinite(losses(path)[0])
    assert checkpoints(path) == []


# --- one process of two


@pytest.mark.parametrize(
    ("rank", "action", "words"),
    [
        (1, raises("bad data"), ["rank 1 of 2, step 2: RuntimeError: bad data", "rank 0: alive, no error, at step 2"]),
        # no error that the ranks have together
        (0, raises("bad", FloatingPointError), ["rank 0 of 2, step 2: FloatingPointError: bad", "rank 1: alive, no e"]),
        (
            1,
            sleeps(60),
            ["rank 0 of 2", "imed out", "rank 1: alive, no error, at step 2", "ended because", "action()"],
        ),
        (1, sends(signal.SIGKILL), ["rank 0 of 2", "no word from rank 1: killed, or out of reach"]),
    ],
    ids=["rank 1 raises", "rank 0 raises", "rank 1 hangs", "rank 1 is killed"],
)
def test_one_rank_ends_all(rank, action, words, base, tmp_path):
    arguments = [*base, *TIMEOUT, "--data.num_workers", "1", "--run", str(tmp_path / "run")]
    result = launch(arguments, ranks=2, fault=at_step(3, action, rank=rank)).wait(15)
    assert set(result.exitcodes) <= {1, -9}
    for word in words:
        assert word in result.output


def test_a_failure_waits_for_the_checkpoint_that_is_being_written(base, tmp_path):
    path = tmp_path / "run"
    slow, fails = at("iwin_dit.training.checkpoint:_commit", 1, sleeps(4)), at_step(6, raises("bad data"), rank=1)
    result = run([*base, *TIMEOUT, "--run", str(path)], ranks=2, fault=together(slow, fails))
    assert result.exitcodes == [1, 1]
    assert "rank 1 of 2, step 5: RuntimeError: bad data" in result.output
    assert checkpoints(path) == [4]


# --- the place and the surroundings


def test_two_runs_in_one_folder(base, tmp_path):
    arguments = [*base, "--run", str(tmp_path / "run")]
    first = launch(arguments, fault=at_step(3, sleeps(60)))
    first.until(lambda: trains(tmp_path / "run"))
    second = run(arguments)
    assert second.exitcodes == [1]
    assert "is in use by another process" in second.output
    first.signal(signal.SIGKILL)
    first.wait()
    assert run(arguments).exitcodes == [0]  # the lock went with its holder


def test_a_folder_that_cannot_be_written(base, tmp_path):
    """As root every folder can be written, so the system's answer is put in."""
    full = at("tempfile:NamedTemporaryFile", 1, runs_out_of_space())
    for fault, words in ((full, "No space left on device"), (None, "cannot be written")):
        path = tmp_path / "run" if fault else Path("/proc/run")
        result = run([*base, "--run", str(path)], fault=fault)
        assert result.exitcodes == [1]
        assert words in result.output
        assert "give another --run" in result.output
        assert not path.exists()


def test_offline_and_without_a_vae(base, tmp_path):
    arguments = [*base, "--data.source", "photos", "--data.vae", "someone/some-vae", "--run", str(tmp_path / "run")]
    result = run(arguments, fault=go_offline)
    assert result.exitcodes == [1]
    assert "someone/some-vae" in result.output
    assert "Traceback" not in result.output
    assert not (tmp_path / "run").exists()


def go_offline() -> None:
    """What HF_HUB_OFFLINE=1 does, which is read when the library is imported."""
    import huggingface_hub.constants

    huggingface_hub.constants.HF_HUB_OFFLINE = True


def test_a_tracker_that_fails_and_a_clock_that_jumps(base, tmp_path):
    arguments = [*base, "--log.tracker", "tensorboard", "--run", str(tmp_path / "run")]
    result = run(arguments, fault=break_the_surroundings)
    assert result.exitcodes == [0]
    assert len(losses(tmp_path / "run")) == 8
    assert "tracker" in result.output


def break_the_surroundings() -> None:
    at("torch.utils.tensorboard:SummaryWriter.add_scalar", 2, raises("connection lost"))()
    at("train_dit:optimizer_step", 3, turn_back_the_clock)()


def turn_back_the_clock() -> None:
    now = time.time
    time.time = lambda: now() - 86_400


# --- launchers, for real

STATUS = """
import os, sys
from pathlib import Path
import train_dit
try:
    train_dit.main()
except SystemExit as end:
    Path(os.environ["STATUS"] + os.environ.get("RANK", "")).write_text(str(end.code))
    raise
"""


@pytest.mark.parametrize("launcher", ["python", "accelerate", "torchrun"])
def test_sigterm_to_a_launcher(launcher, base, tmp_path):
    """The launcher is told, or killed; the training process ends with a checkpoint and 143."""
    path, script = tmp_path / "run", tmp_path / "script.py"
    script.write_text(STATUS)
    endless = ["--train.images", "100000000", "--log.checkpoint_every", "1000000", "--run", str(path)]
    command = {
        "python": [sys.executable],
        "accelerate": [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--cpu"],
        "torchrun": [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--"],
    }[launcher]
    variables = {"STATUS": str(tmp_path / "status"), "PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "true"}
    variables |= {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(os.cpu_count())}  # one thread each
    environment = {**os.environ, **variables}
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            [*command, str(script), *base, *endless], env=environment, stdout=log, stderr=log, start_new_session=True
        )
    started = Started([], [tmp_path / "log"])
    try:
        started.until(lambda: trains(path), 60)
        process.send_signal(signal.SIGTERM)
        status = [tmp_path / f"status{rank}" for rank in ((0, 1) if launcher == "torchrun" else ("",))]
        started.until(lambda: all(file.is_file() and file.read_text() for file in status), 20)
        assert [file.read_text() for file in status] == ["143"] * len(status)
        assert process.wait(20) != 0
        assert len(checkpoints(path)) == 1
        assert ("the launcher has ended" in started.output) == (launcher == "accelerate")
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
