"""The run folder: what may use it, what is checked before anything is written, that one process has it; its numbers."""

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import ProjectConfiguration
from tensorboard.backend.event_processing import event_accumulator

from iwin_dit.training.config import Config, parse_config
from iwin_dit.training.log import MetricsLog, read_metrics
from iwin_dit.training.run import check_run, lock_run, open_run, probe_run

ROOT = Path(__file__).parents[1]
RESOLVED = {"mixed_precision": "no", "latents_manifest_sha256": "a"}
CONSTANT = ["--optim.schedule", "constant", "--optim.warmup_images", "0"]


def configured(run: Path, *arguments: str) -> Config:
    return parse_config(["--config", str(ROOT / "configs" / "digits.yaml"), "--run", str(run), *arguments])


def start(config: Config, **resolved: str) -> Path:
    """Open a run and end it at once."""
    with open_run(config, RESOLVED | resolved, bytes_needed=1) as run:
        return run


@pytest.mark.slow
def test_what_may_change_when_a_run_goes_on(tmp_path):
    run = tmp_path / "runs" / "a"
    check_run(configured(run))
    assert not run.exists()
    assert start(configured(run)) == run
    start(configured(run, "--log.every", "3", "--data.num_workers", "1", "--train.mixed_precision", "no"))
    start(configured(run, "--eval.every", "7", "--eval.num_samples", "9", "--eval.reference", "elsewhere.npz"))
    start(configured(run, "--resume", "step-00000001", "--train.micro_batch_size", "8", "--data.verify", "false"))
    start(configured(run, "--train.compile", "true", "--train.compile_options.layout_optimization", "true"))
    with pytest.raises(ValueError, match=r"model\.num_layers: 6 before, 2 now"):
        check_run(configured(run, "--model.num_layers", "2"))
    with pytest.raises(ValueError, match=r"train\.batch_size: \d+ before, 8 now\n  train\.seed: 0 before, 5 now\nGive"):
        check_run(configured(run, "--train.seed", "5", "--train.batch_size", "8"))
    with pytest.raises(ValueError, match=r"resolved\.mixed_precision: no before, bf16 now\nGive"):
        start(configured(run), mixed_precision="bf16")
    with pytest.raises(ValueError, match=r"train\.images: \d+ before, 7 now\nThe cosine schedule ends with the last"):
        check_run(configured(run, "--train.images", "7"))


def test_folders_may_be_renamed_and_their_content_not(tmp_path):
    moved = ["--data.latents", "/elsewhere/latents", "--data.vae", "/elsewhere/vae"]
    start(configured(tmp_path / "a"))
    (tmp_path / "a").rename(tmp_path / "b")
    start(configured(tmp_path / "b", *moved))
    with pytest.raises(ValueError, match=r"resolved\.latents_manifest_sha256: a before, b now\nGive"):
        start(configured(tmp_path / "b", *moved), latents_manifest_sha256="b")


def test_a_key_that_is_newer_than_the_run_had_its_default(tmp_path):
    record = tmp_path / "a" / "config.json"
    start(configured(tmp_path / "a"))
    content = json.loads(record.read_text())
    del content["optim"]["eps"], content["model"]["window_size"], content["packages"]
    record.write_text(json.dumps(content))
    with pytest.raises(
        ValueError, match=r"\n  model\.window_size: auto before, 4 now\n  optim\.eps: 1e-08 before, 0\.1"
    ):
        check_run(configured(tmp_path / "a", "--optim.eps", "0.1"))
    start(configured(tmp_path / "a", "--model.window_size", "auto"))


def test_other_packages_are_a_warning(tmp_path, caplog):
    record = tmp_path / "a" / "config.json"
    start(configured(tmp_path / "a"))
    content = json.loads(record.read_text())
    assert content["packages"].keys() == {"torch", "numpy", "diffusers", "accelerate", "iwin-dit"}
    start(configured(tmp_path / "a"))
    assert caplog.messages == []
    record.write_text(json.dumps(content | {"packages": content["packages"] | {"torch": "0.1"}}))
    start(configured(tmp_path / "a"))
    [message] = caplog.messages
    assert message == (
        "from here on, the run is not bit for bit what it would have been: torch 0.1 before, "
        f"{content['packages']['torch']} now"
    )


def test_the_length_is_free_under_a_constant_schedule(tmp_path):
    start(configured(tmp_path / "a", *CONSTANT))
    start(configured(tmp_path / "a", *CONSTANT, "--train.images", "7"))


@pytest.mark.slow
def test_overwrite_deletes_the_run_and_nothing_before(tmp_path):
    run, elsewhere = tmp_path / "a", tmp_path / "elsewhere"
    start(configured(run))
    (run / "checkpoints" / "step-00000001").mkdir(parents=True)
    (run / "evaluations").mkdir()
    for name in ("metrics.jsonl", "best.json", "evaluations/step-00000001.json"):
        (run / name).write_text("{}")
    elsewhere.mkdir()
    (run / "previews").symlink_to(elsewhere)
    (run / "notes.txt").write_text("mine")
    check_run(configured(run, "--model.num_layers", "2", "--overwrite"))
    assert (run / "metrics.jsonl").exists()
    start(configured(run, "--model.num_layers", "2", "--overwrite"))
    assert {path.name for path in run.iterdir()} == {"config.json", ".lock", "notes.txt"}
    assert json.loads((run / "config.json").read_text())["model"]["num_layers"] == 2
    assert elsewhere.is_dir()


def test_a_damaged_record_is_an_error(tmp_path):
    start(configured(tmp_path / "a"))
    for content in ('{"run": ', "[]"):
        (tmp_path / "a" / "config.json").write_text(content)
        with pytest.raises(ValueError, match=r"config\.json is damaged"):
            check_run(configured(tmp_path / "a"))
    start(configured(tmp_path / "a", "--overwrite"))


def test_a_folder_of_something_else_is_left_alone(tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    for extra in ([], ["--overwrite"]):
        with pytest.raises(ValueError, match="is not empty and holds no run"):
            start(configured(tmp_path, *extra))
    with pytest.raises(ValueError, match=r"thesis\.txt is not empty and holds no run"):
        start(configured(tmp_path / "thesis.txt"))
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_one_process_has_the_run(tmp_path):
    """Even --overwrite waits for the other one, and a run that ended, however it did, is free again."""
    run = tmp_path / "a"
    with open_run(configured(run), RESOLVED, bytes_needed=1):
        (run / "metrics.jsonl").write_text("{}")
        for extra in ([], ["--overwrite"]):
            with pytest.raises(ValueError, match=f"run folder {run} is in use by another process: wait for it"):
                start(configured(run, *extra))
        assert (run / "metrics.jsonl").exists()
    start(configured(run))
    with pytest.raises(ZeroDivisionError), open_run(configured(run), RESOLVED, bytes_needed=1):
        raise ZeroDivisionError
    start(configured(run))


def test_a_killed_process_frees_the_run(tmp_path):
    code = "import sys, filelock; lock = filelock.FileLock(sys.argv[1]).acquire(); print('held', flush=True); input()"
    command = [sys.executable, "-c", code, str(tmp_path / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"held\n"
        with pytest.raises(ValueError, match="is in use"), lock_run(tmp_path):
            pass
        other.kill()
    with lock_run(tmp_path):
        pass


def test_a_folder_that_cannot_be_written_is_found_first(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"cannot be written: {tmp_path / 'file'}: Not a directory"):
        probe_run(tmp_path / "file" / "runs" / "a", bytes_needed=1)
    with pytest.raises(ValueError, match=r"run folder /proc/runs/a cannot be written: /proc: "):
        start(configured(Path("/proc/runs/a")))

    def fail(descriptor):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(ValueError, match="Read-only file system"):
        start(configured(tmp_path / "runs" / "a"))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_disk_that_is_too_small_is_found_first(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**6, 0, 123_456)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    probe_run(tmp_path / "a", bytes_needed=123_456)
    with pytest.raises(ValueError, match=r"needs 123,457 bytes for checkpoints, and .* has 123,456 bytes free"):
        probe_run(tmp_path / "a", bytes_needed=123_457)
    assert list(tmp_path.iterdir()) == []


# --- metrics.jsonl and the tracker


def new_log(run: Path, step: int, *arguments: str) -> MetricsLog:
    AcceleratorState._reset_state(reset_partial_state=True)
    options = ProjectConfiguration(project_dir=str(run), logging_dir=str(run))
    config = configured(run, *arguments)
    tracker = None if config.log.tracker == "none" else config.log.tracker
    return MetricsLog(config, Accelerator(cpu=True, log_with=tracker, project_config=options), run, step)


def test_unreadable_lines_are_dropped_when_a_run_goes_on(tmp_path, caplog):
    """Torn by a power cut, in the middle; in a tool that only reads them they stay an error."""
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 2.0}\n{"step": 2, "lo\xff\x00\n[3]\n{"step": 3}\n{"step": 4}\n')
    with pytest.raises(ValueError, match="line 2: expected JSON"):
        read_metrics(path)
    new_log(tmp_path, 3)
    assert [record["step"] for record in read_metrics(path)] == [1, 3]
    assert [message.partition(" is dropped")[0] for message in caplog.messages] == [f"{path}, line {n}" for n in (2, 3)]


def test_a_line_after_one_that_failed_is_whole(tmp_path, caplog):
    log = new_log(tmp_path, 0)
    log.write(1, loss=1.0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.path.stat().st_size + 5, limits[1]))
    try:
        log.write(2, loss=1.0)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "the line of step 2 is lost" in caplog.text
    assert log.path.read_text().endswith('{"ste')
    log.write(3, loss=1.0)
    log.write(4, loss=1.0)
    assert [record["step"] for record in read_metrics(log.path)] == [1, 3, 4]
    assert len(log.path.read_text().splitlines()) == 3


def test_tensorboards_curves_do_not_double_back(tmp_path):
    for start_at, steps in ((0, range(1, 7)), (3, range(4, 6))):
        log = new_log(tmp_path, start_at, "--log.tracker", "tensorboard")
        for step in steps:
            log.write(step, loss=float(step))
        log.close()
    events = event_accumulator.EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 2, 3, 4, 5]
