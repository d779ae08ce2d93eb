"""Checkpoints: the round trip is exact, damage is found, a failed save harms nothing, sharded models are gathered."""

import errno
import json
import os
import pickle
import resource
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from iwin_dit.training import checkpoint
from iwin_dit.training.checkpoint import (
    CheckpointError,
    CheckpointWriter,
    abandon_after,
    find_checkpoint,
    list_checkpoints,
)
from iwin_dit.training.ema import EMA
from iwin_dit.training.state import TrainState
from tests.tools import relative_error, tiny_model

FILES = ["model.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json"]


def new_state(fused: bool = True) -> TrainState:
    model = tiny_model().train()
    # The large eps keeps AdamW's first steps, gradient / |gradient|, from amplifying the rounding of small gradients.
    return TrainState(model, EMA(model, 100), torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3, fused=fused))


def train(state: TrainState, steps: int = 1, rank: int = 0, ranks: int = 1) -> None:
    """Some steps of batches of 4 (this rank's share of them), keyed by the step."""
    for _ in range(steps):
        x = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(state.step)).chunk(ranks)[rank]
        labels = torch.arange(4).chunk(ranks)[rank]
        state.model(x, 500, labels).sample.square().mean().backward()
        state.optimizer.step()
        state.optimizer.zero_grad()
        state.step += 1
        state.ema.update(state.model, 4 * state.step, 4)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {f"{file}:{name}": t for file in FILES[:3] for name, t in load_file(folder / file).items()}


def assert_equal(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def flat(state: TrainState) -> dict[str, torch.Tensor]:
    """Copies of everything in a state, named as `tensors` does."""
    parts = state.snapshot()
    return {
        f"{file}:{name}": tensor
        for file, part in zip(FILES, (parts.model, parts.ema, parts.optimizer), strict=False)
        for name, tensor in part.items()
    }


@pytest.fixture
def saved(tmp_path) -> tuple[Path, TrainState]:
    """Whole checkpoints of steps 1 and 2 in a root, and the state."""
    state, writer = new_state(), CheckpointWriter(tmp_path / "checkpoints", keep_last=2, asynchronous=False)
    for _ in range(2):
        train(state)
        writer.save(state.snapshot())
    return writer.root, state


@pytest.fixture
def no_pauses(monkeypatch):
    monkeypatch.setattr(checkpoint, "PAUSES", (0.0, 0.0))


# --- the state


def test_writing_in_the_background_leaves_the_threads_of_training_alone(tmp_path):
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    writer = CheckpointWriter(tmp_path, keep_last=1)
    writer.save(new_state().snapshot())
    writer.join()
    with ThreadPoolExecutor(1) as another:
        threads_of = [pool.submit(torch.get_num_threads).result() for pool in (writer._executor, another)]
    assert [*threads_of, torch.get_num_threads()] == [1, 2, 2]
    torch.set_num_threads(threads)


@pytest.mark.parametrize("fused", [True, False])
def test_round_trip_is_exact_and_training_goes_on_alike(fused, tmp_path):
    state = new_state(fused)
    train(state, 2)
    state.skipped = 3
    CheckpointWriter(tmp_path, keep_last=1, asynchronous=False).save(state.snapshot())
    folder = find_checkpoint(tmp_path, "latest")
    other = new_state(fused)
    train(other)  # what it held is replaced
    other.load(folder)
    assert (other.step, other.skipped) == (2, 3)
    assert_equal(flat(other), tensors(folder))
    for ours in (state, other):
        train(ours)
    assert_equal(flat(other), flat(state))
    weights = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in weights.values()} == {torch.float32}
    names = {f"{name}.{key}" for name in weights for key in ("exp_avg", "exp_avg_sq", "step")}
    assert load_file(folder / "optimizer.safetensors").keys() == names
    assert json.loads((folder / "state.json").read_text()) == {"step": 2, "skipped": 3, "scaler": None}


def test_accelerates_wrapper_of_the_optimizer_is_seen_through(tmp_path):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator, state, other = Accelerator(cpu=True), new_state(), new_state()
    for each in (state, other):
        each.optimizer = accelerator.prepare(each.optimizer)
        assert isinstance(each.optimizer, AcceleratedOptimizer)
    train(state)
    CheckpointWriter(tmp_path, keep_last=1, asynchronous=False).save(state.snapshot())
    other.load(find_checkpoint(tmp_path, "latest"))
    assert_equal(flat(other), flat(state))
    assert any(name.endswith(".exp_avg_sq") for name in flat(other))


def test_before_the_first_step_there_are_no_moments(tmp_path):
    state, other = new_state(), new_state()
    CheckpointWriter(tmp_path, keep_last=1, asynchronous=False).save(state.snapshot())
    train(other)
    other.load(find_checkpoint(tmp_path, "latest"))
    assert_equal(flat(other), flat(state))
    assert len(other.optimizer.state) == 0


def test_the_gradient_scaler_is_kept(tmp_path):
    state, other = new_state(), new_state()
    state.scaler, other.scaler = (torch.amp.GradScaler("cpu", init_scale=scale) for scale in (8.0, 4.0))
    CheckpointWriter(tmp_path, keep_last=1, asynchronous=False).save(state.snapshot())
    other.load(find_checkpoint(tmp_path, "latest"))
    assert other.scaler.get_scale() == 8.0


def test_a_state_of_another_model_is_refused(saved):
    root, _ = saved
    model = tiny_model(num_layers=1, num_classes=11)
    other = TrainState(model, EMA(model, 100), torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match=r"model\.safetensors does not fit this run") as error:
        other.load(find_checkpoint(root, "latest"))
    assert "expected class_embed.weight (12, 16) torch.float32, got class_embed.weight (11, 16)" in str(error.value)
    assert "unexpected: blocks.1." in str(error.value)


def test_ema_closed_form():
    """From 0 towards constant weights w: (1 - prod(decay_i)) w, where decay_i = 2 ** (-batch / half-life_i)."""
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    ema = EMA(model, halflife_images=50, rampup_ratio=0.05)
    torch.nn.init.constant_(model.weight, 2.0)
    remaining = 1.0
    for images in range(100, 2001, 100):  # half-lives of 5, 10, ..., 50, 50, ...
        ema.update(model, images, 100)
        remaining *= 2 ** (-100 / min(50, images / 20))
        assert ema.model.weight.item() == pytest.approx(2.0 * (1 - remaining))
    assert ema.decay(10_000, 50) == 0.5


def test_ema_of_a_bfloat16_model_is_float32_and_buffers_are_copied():
    model = torch.nn.BatchNorm1d(3).bfloat16()
    ema = EMA(model, 100)
    model(torch.randn(8, 3).bfloat16())
    ema.update(model, 8, 8)
    assert {p.dtype for p in ema.model.parameters()} == {torch.float32}
    assert not any(p.requires_grad for p in ema.model.parameters())
    assert torch.equal(ema.model.running_mean, model.running_mean.float())
    assert ema.model.num_batches_tracked == 1


# --- damage


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 100)


def flip_a_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)


DAMAGES = [
    *((name, flip_a_byte, "expected sha256 [0-9a-f]{64}, got [0-9a-f]{64}") for name in FILES),
    ("model.safetensors", truncate, r"expected \d+ bytes, got \d+"),
    ("checkpoint.json", Path.unlink, "No such file"),
    ("checkpoint.json", truncate, "expected step, and size and sha256 by file name"),
    ("checkpoint.json", lambda path: path.write_text("[1]"), "expected step, and size and sha256 by file name"),
    ("optimizer.safetensors", Path.unlink, "No such file"),
    ("state.json", Path.unlink, "No such file"),
]


@pytest.mark.parametrize(("name", "damage", "message"), DAMAGES)
def test_a_damaged_checkpoint_is_passed_over_or_refused(name, damage, message, saved, caplog):
    root, _ = saved
    damage(root / "step-00000002" / name)
    assert find_checkpoint(root, "latest") == root / "step-00000001"
    assert f"{root / 'step-00000002'} is damaged and passed over: {root / 'step-00000002' / name}: " in caplog.text
    with pytest.raises(ValueError, match=f"step-00000002 is damaged: .*{name}: .*{message}"):
        find_checkpoint(root, "step-00000002")


def test_a_run_whose_checkpoints_are_all_damaged_does_not_start_afresh(saved):
    root, _ = saved
    for folder in list_checkpoints(root):
        truncate(folder / "ema.safetensors")
    with pytest.raises(ValueError, match=r"every checkpoint in .* is damaged:\n.*step-00000002/ema.*\n.*step-00000001"):
        find_checkpoint(root, "latest")


def test_a_copy_under_another_step_is_damaged(saved):
    root, _ = saved
    (root / "step-00000001").rename(root / "step-00000009")
    with pytest.raises(ValueError, match="expected step 9, got 1"):
        find_checkpoint(root, "step-00000009")


def test_what_is_no_checkpoint_is_left_alone(tmp_path, saved):
    assert find_checkpoint(tmp_path / "none", "latest") is None
    root, state = saved
    for folder in (".tmp/step-00000007", "step-00000007.abandoned", "best", "step-7"):
        (root / folder).mkdir(parents=True)
    (root / ".DS_Store").touch()
    (root / "step-00000008").touch()
    (root / "step-00000009").symlink_to("nowhere")
    for step in (1, 2):  # a clock that jumps back makes the newest look old
        os.utime(root / f"step-0000000{step}", (1e9 - step, 1e9 - step))
    assert find_checkpoint(root, "latest") == root / "step-00000002"
    train(state)
    CheckpointWriter(root, keep_last=1, asynchronous=False).save(state.snapshot())
    left = {path.name for path in root.iterdir()}
    assert left >= {"step-00000003", "step-00000007.abandoned", "best", "step-7", ".DS_Store", "step-00000008"}
    assert not left & {".tmp", "step-00000001", "step-00000002"}


def test_going_on_from_an_earlier_one_abandons_the_later(saved, tmp_path, monkeypatch, caplog):
    root, _ = saved
    monkeypatch.chdir(tmp_path)
    for resume in ("step-00000001", "checkpoints/step-00000001", str(root / "step-00000001")):
        assert find_checkpoint(root, resume).resolve() == root / "step-00000001"
    for resume in ("step-00000003", "elsewhere/step-00000001", "1", str(tmp_path), ""):
        with pytest.raises(ValueError, match=r"\(step-00000001, step-00000002\), got " + resume):
            find_checkpoint(root, resume)
    (root / "step-00000002.abandoned").mkdir()
    (root / "step-00000002.abandoned-2").mkdir()
    abandon_after(root, 1)
    assert find_checkpoint(root, "latest") == root / "step-00000001"
    assert (root / "step-00000002.abandoned-3" / "checkpoint.json").is_file()
    assert (root / "step-00000002.abandoned-2").is_dir()  # nothing is deleted
    assert "renamed to step-00000002.abandoned-3. " in caplog.text
    assert "use --resume latest from now on" in caplog.text


class Payload:
    """Its pickle, when it is loaded, makes a file."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("name", FILES[:3])
@pytest.mark.parametrize("dump", [lambda what, path: path.write_bytes(pickle.dumps(what)), torch.save])
def test_a_pickle_is_never_loaded(name, dump, saved, tmp_path):
    """Even where the manifest vouches for it."""
    root, state = saved
    folder, marker = root / "step-00000002", tmp_path / "marker"
    dump(Payload(marker), folder / name)
    with pytest.raises(ValueError, match="is damaged"):
        find_checkpoint(root, "step-00000002")
    manifest = json.loads((folder / "checkpoint.json").read_text())
    manifest["files"][name] = {"size": (folder / name).stat().st_size, "sha256": checkpoint.sha256(folder / name)}
    (folder / "checkpoint.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match=f"{name} is not a safetensors file"):
        state.load(find_checkpoint(root, "step-00000002"))
    assert not marker.exists()


# --- writing (cases 2 and 3)


def save_steps(root: Path, steps: range, **arguments: int) -> None:
    state, writer = new_state(), CheckpointWriter(root, asynchronous=False, **arguments)
    for state.step in steps:
        writer.save(state.snapshot())


def names(root: Path) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in sorted(root.iterdir())]


def test_what_is_kept(tmp_path):
    save_steps(tmp_path / "a", range(5), keep_last=1)
    assert names(tmp_path / "a") == [4]
    save_steps(tmp_path / "b", range(1, 9), keep_last=2, keep_every=3)
    assert names(tmp_path / "b") == [3, 6, 7, 8]
    (tmp_path / "b" / "step-00000007" / "checkpoint.json").unlink()  # what is not whole is not counted
    save_steps(tmp_path / "b", range(9, 10), keep_last=2, keep_every=3)
    assert names(tmp_path / "b") == [3, 6, 8, 9]


def test_a_checkpoint_that_cannot_be_removed_is_a_warning(tmp_path, monkeypatch, caplog):
    def fail(path, **arguments):
        if path.name == "step-00000000":
            raise OSError(errno.EBUSY, "Device or resource busy", str(path))

    monkeypatch.setattr(checkpoint.shutil, "rmtree", fail)
    save_steps(tmp_path, range(2), keep_last=1)
    assert "could not remove the old checkpoint" in caplog.text


def failing(function, error: int, calls: set[int]):
    """The function, but raising an OSError in the calls of these numbers."""
    count = iter(range(10**9))

    def wrapped(*arguments):
        if next(count) in calls:
            raise OSError(error, os.strerror(error))
        return function(*arguments)

    return wrapped


@pytest.mark.parametrize("call", [0, 1, 3, 9])
def test_a_full_disk(call, saved, monkeypatch):
    """From the file of this number on, with keep_last=1: the one before is only removed once the new one is there."""
    root, state = saved
    before = {path.name: tensors(path) for path in list_checkpoints(root)}
    train(state)
    writer = CheckpointWriter(root, keep_last=1, asynchronous=False)
    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", failing(os.fsync, errno.ENOSPC, set(range(call, 100))))
        writer.save(state.snapshot())
        with pytest.raises(CheckpointError, match="No space left on device") as error:
            writer.wait()
    needed = state.snapshot().nbytes()
    assert str(root / "step-00000003") in str(error.value)
    assert f" bytes are free there, {needed:,} needed" in str(error.value)
    assert sorted(path.name for path in root.iterdir()) == sorted(before)
    for name, content in before.items():
        assert_equal(tensors(find_checkpoint(root, name)), content)
    writer.save(state.snapshot())
    writer.wait()
    assert names(root) == [3]


def test_an_error_inside_safetensors_is_understood(saved, no_pauses):
    """It comes without its number; here from a limit of the system's on the size of files."""
    root, state = saved
    train(state)
    writer = CheckpointWriter(root, keep_last=1, asynchronous=False)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        writer.save(state.snapshot())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    with pytest.raises(CheckpointError, match="File too large"):
        writer.wait()
    assert names(root) == [1, 2]


@pytest.mark.parametrize("operation", ["fsync", "replace"])
def test_a_passing_error_is_tried_again(operation, saved, no_pauses, monkeypatch, caplog):
    root, state = saved
    train(state)
    target = os if operation == "fsync" else Path
    monkeypatch.setattr(target, operation, failing(getattr(target, operation), errno.EIO, {1, 6}))
    CheckpointWriter(root, keep_last=1, asynchronous=False).save(state.snapshot())
    assert caplog.text.count("Trying again") == 2
    assert_equal(tensors(find_checkpoint(root, "step-00000003")), flat(state))
    assert names(root) == [3]


def test_a_disk_that_stores_something_else_is_found(saved, no_pauses, monkeypatch):
    """Before the older checkpoint, the last good one, is removed."""
    root, state = saved
    train(state)

    def spoil(descriptor, *arguments):
        path = Path(f"/proc/self/fd/{descriptor}").readlink()
        if path.name == "ema.safetensors":
            flip_a_byte(path)

    monkeypatch.setattr(os, "posix_fadvise", spoil)
    writer = CheckpointWriter(root, keep_last=1, asynchronous=False)
    writer.save(state.snapshot())
    with pytest.raises(CheckpointError, match=r"the disk holds something else than was written, .*ema\.safetensors"):
        writer.wait()
    assert names(root) == [1, 2]


@pytest.mark.parametrize("part", ["model", "ema", "optimizer"])
def test_what_is_not_finite_is_not_written(part, saved, caplog):
    """Neither is it tried again, nor does it push out a good checkpoint."""
    root, state = saved
    train(state)
    snapshot = state.snapshot()
    name, tensor = list(getattr(snapshot, part).items())[-1]
    tensor.view(-1)[-1] = float("inf")
    writer = CheckpointWriter(root, keep_last=1)
    writer.save(snapshot, lambda snapshot: pytest.fail("nothing is exported"))
    with pytest.raises(
        CheckpointError, match=f"its weights are not finite, first {name} of {part}.safetensors; earlier"
    ):
        writer.wait()
    assert "Trying again" not in caplog.text
    assert names(root) == [1, 2]


def test_a_damaged_one_is_replaced_and_a_whole_one_kept(saved):
    root, state = saved
    flip_a_byte(root / "step-00000002" / "model.safetensors")
    inode = (root / "step-00000001").stat().st_ino
    writer = CheckpointWriter(root, keep_last=2, asynchronous=False)
    writer.save(state.snapshot())
    assert_equal(tensors(find_checkpoint(root, "step-00000002")), flat(state))
    state.step = 1
    writer.save(state.snapshot())
    assert (root / "step-00000001").stat().st_ino == inode
    assert names(root) == [1, 2]


# --- in the background


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    state, writer, resumed = new_state(), CheckpointWriter(tmp_path, keep_last=1), threading.Event()
    train(state)
    expected, exported = flat(state), []
    original = checkpoint._commit
    monkeypatch.setattr(checkpoint, "_commit", lambda *arguments: (resumed.wait(30), original(*arguments)))
    writer.save(state.snapshot(), lambda snapshot: exported.append((snapshot.step, list_checkpoints(tmp_path))))
    assert not tmp_path.joinpath("step-00000001").exists()
    train(state, 2)
    resumed.set()
    writer.wait()
    assert_equal(tensors(find_checkpoint(tmp_path, "latest")), expected)
    assert exported == [(1, [tmp_path / "step-00000001"])]
    assert state.step == 3


@pytest.mark.parametrize("asynchronous", [True, False])
def test_training_outlives_failed_saves_until_there_are_three_in_a_row(asynchronous, tmp_path, monkeypatch, caplog):
    state, writer = new_state(), CheckpointWriter(tmp_path, keep_last=9, asynchronous=asynchronous)
    syncs, full = os.fsync, failing(os.fsync, errno.ENOSPC, set(range(100)))

    def save(fsync) -> None:
        monkeypatch.setattr(os, "fsync", fsync)
        writer.save(state.snapshot())
        writer.join()
        state.step += 1

    for fsync in (full, full, syncs, full, full, full):
        save(fsync)
        assert caplog.text.count("could not be written") == state.step - (state.step > 2)  # as it happens
    assert names(tmp_path) == [2]
    with pytest.raises(
        CheckpointError, match=r"3 checkpoints in a row .* The last: .*step-00000005 could not .*No space"
    ):
        save(syncs)
    with pytest.raises(CheckpointError, match=r"^checkpoint .*step-00000005 could not"):
        writer.wait()


def test_a_failed_export_leaves_the_checkpoint(tmp_path, caplog):
    """Training goes on, however often; the end of the run is an error."""

    def export(snapshot):
        raise OSError(errno.ENOSPC, "No space left on device")

    state, writer = new_state(), CheckpointWriter(tmp_path, keep_last=1)
    for state.step in range(5):
        writer.save(state.snapshot(), export)
    with pytest.raises(CheckpointError, match=r"the export of checkpoint .*step-00000004 could not be written"):
        writer.wait()
    assert {record.levelname for record in caplog.records} == {"WARNING"}
    assert find_checkpoint(tmp_path, "latest") == tmp_path / "step-00000004"
    writer.save(state.snapshot())
    writer.wait()


# --- FSDP2


def sharded_state() -> TrainState:
    """As `new_state`, its model sharded as Accelerate does it: blocks, then the root."""
    model = tiny_model().train()
    ema = EMA(model, 100)
    for block in model.blocks:
        fully_shard(block)
    fully_shard(model)
    ema.shard(model)
    return TrainState(model, ema, torch.optim.AdamW(model.parameters(), lr=0.01, eps=1e-3))


def fsdp_rank(rank: int, folder: Path) -> None:
    """Train 2 steps on 2 ranks and save; load that into a fresh state, save it again."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    state = sharded_state()
    for _ in range(2):
        train(state, rank=rank, ranks=2)
        with torch.no_grad():  # a preview and a validation: the root modules stay whole after them
            for model in (state.model, state.ema.model):
                model(torch.zeros(1, 4, 8, 8), 500, torch.tensor([0]))
    writer = CheckpointWriter(folder / "saved", keep_last=1, asynchronous=False)
    snapshot = state.snapshot()
    assert bool(snapshot.model) == (rank == 0)
    if rank == 0:
        writer.save(snapshot)
    torch.distributed.barrier()
    other = sharded_state()
    other.load(find_checkpoint(folder / "saved", "latest"))
    parameters = [*other.model.parameters(), *other.ema.model.parameters(), *other.optimizer.state]
    assert all(isinstance(parameter, DTensor) for parameter in parameters)
    snapshot = other.snapshot()
    if rank == 0:
        CheckpointWriter(folder / "again", keep_last=1, asynchronous=False).save(snapshot)
    for ours in (state, other):
        train(ours, rank=rank, ranks=2)
    assert_equal(flat(other), flat(state))
    torch.distributed.barrier()
    os._exit(0)  # gloo's threads abort, now and then, a Python that shuts down in good order


@pytest.mark.slow
def test_a_sharded_run_saves_what_an_unsharded_one_does(tmp_path):
    torch.multiprocessing.set_forkserver_preload([__name__])  # torch is imported once for both
    torch.multiprocessing.start_processes(fsdp_rank, args=(tmp_path,), nprocs=2, start_method="forkserver")
    saved = find_checkpoint(tmp_path / "saved", "latest")
    assert_equal(tensors(find_checkpoint(tmp_path / "again", "latest")), tensors(saved))

    whole = new_state(fused=False)
    train(whole, 2)
    ours, theirs = tensors(saved), flat(whole)
    assert ours.keys() == theirs.keys()
    errors = {name: relative_error(ours[name], theirs[name]) for name in theirs}
    assert max(errors.values()) < 1e-5, max(errors.items(), key=lambda item: item[1])
    other = new_state()
    other.load(saved)
    assert other.step == 2
    assert_equal(flat(other), tensors(saved))
