"""Runs train_dit.py in processes of its own, with faults: signals, errors, a full disk, NaN, at a chosen place.

A fault is a picklable callable, called in the process before `train_dit.main`. A new one is usually a line:
`at("train_dit:optimizer_step", 3, raises("bad data"))` raises on the third call of that function.
"""

import atexit
import errno
import functools
import importlib
import itertools
import multiprocessing
import os
import shutil
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin

Fault = Callable[[], None]
Action = Callable[[], None]

# Its server imports torch, diffusers and train_dit once, and each process that it forks starts in no time.
FORKSERVER = multiprocessing.get_context("forkserver")
FORKSERVER.set_forkserver_preload(["__main__", "train_dit", "tests.faults"])
LAUNCHERS = ("ACCELERATE_", "TORCHELASTIC_", "FSDP_", "MASTER_", "WORLD_SIZE", "RANK", "LOCAL_", "OMP_")


# --- starting


@dataclass(frozen=True)
class Result:
    """How the processes ended: exit codes by rank (-9: killed), and what they wrote, rank after rank."""

    exitcodes: list[int]
    output: str


class Started:
    """Processes of one training that run."""

    def __init__(self, processes: list[BaseProcess], logs: list[Path]) -> None:
        self.processes, self.logs = processes, logs

    @property
    def output(self) -> str:
        """What they have written so far."""
        return "\n".join(log.read_text() for log in self.logs)

    def signal(self, number: int, rank: int = 0) -> None:
        """Send a signal to one of them."""
        os.kill(self.pid(rank), number)

    def pid(self, rank: int = 0) -> int:
        """Return a rank's process id."""
        pid = self.processes[rank].pid
        assert pid is not None
        return pid

    def until(self, condition: Callable[[], bool], timeout: float = 15) -> None:
        """Wait for something to become true."""
        deadline = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > deadline:
                self._fail(f"nothing after {timeout} s")
            time.sleep(0.02)

    def wait(self, timeout: float = 18) -> Result:
        """Wait for their end; those that go on are killed, which fails the test."""
        deadline = time.monotonic() + timeout
        for process in self.processes:
            process.join(max(0.0, deadline - time.monotonic()))
            if process.is_alive():
                self._fail(f"a process still runs after {timeout} s")
        return Result([process.exitcode or 0 for process in self.processes], self.output)

    def _fail(self, reason: str) -> None:
        for process in self.processes:
            process.kill()
        raise AssertionError(f"{reason}:\n{self.output}")


def launch(
    arguments: Iterable[str], *, ranks: int = 1, fault: Fault | None = None, environment: dict[str, str] | None = None
) -> Started:
    """Start train_dit.py, in `ranks` processes that join on the CPU.

    Args:
        arguments: Command line.
        ranks: Number of processes.
        fault: Called first in each of them.
        environment: Variables to set besides, for what reads them after the imports.

    Returns:
        The processes.
    """
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(LAUNCHERS)}
    joined = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_free_port())}
    processes, logs = [], []
    for rank in range(ranks):
        # as many processes as cores make one thread each: two that spin for more are slow on a machine that is in use
        own = {"LOCAL_WORLD_SIZE": str(os.cpu_count()), "OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
        if ranks > 1:
            own |= {**joined, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        log = folder / f"rank{rank}.txt"
        log.touch()
        variables = {**inherited, **own, **(environment or {})}
        process = FORKSERVER.Process(target=_run, args=([*arguments], variables, fault, str(log)))
        process.start()
        atexit.register(process.kill)  # a test that failed may leave it, and multiprocessing would wait for its end
        processes.append(process)
        logs.append(log)
    return Started(processes, logs)


def run(arguments: Iterable[str], **options: Any) -> Result:
    """Start as `launch` does and wait for the end."""
    return launch(arguments, **options).wait()


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _run(arguments: list[str], environment: dict[str, str], fault: Fault | None, log: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    descriptor = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(descriptor, stream)
    multiprocessing.set_start_method("fork", force=True)  # as in a process that was started by hand
    if fault is not None:
        fault()
    importlib.import_module("train_dit").main(arguments)


# --- faults: where


def together(*faults: Fault) -> Fault:
    """Several faults in one process."""
    return functools.partial(_install_all, faults)


def _install_all(faults: tuple[Fault, ...]) -> None:
    for fault in faults:
        fault()


def at(where: str, call: int, action: Action, rank: int | None = None) -> Fault:
    """Do something just before the given call (1 is the first) of "module:function", or of "module:Class.method"."""
    return functools.partial(_install, where, call, action, rank)


def _install(where: str, call: int, action: Action, rank: int | None) -> None:
    if rank is not None and rank != int(os.environ.get("RANK", "0")):
        return
    module, _, path = where.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    original, calls = getattr(owner, name), itertools.count(1)

    @functools.wraps(original)
    def faulty(*args: Any, **kwargs: Any) -> Any:
        if next(calls) == call:
            action()
        return original(*args, **kwargs)

    setattr(owner, name, faulty)


def at_step(call: int, action: Action, rank: int | None = None) -> Fault:
    """Do something before the given optimizer step of this start (1 is the first)."""
    return at("train_dit:optimizer_step", call, action, rank)


def at_file(call: int, action: Action, within: str) -> Fault:
    """Do something before the given operation (folder made, file synced or renamed) on a path that names `within`."""
    return functools.partial(_install_at_file, call, action, within)


def _install_at_file(call: int, action: Action, within: str) -> None:
    calls = itertools.count(1)

    def watched(original: Callable[..., Any]) -> Callable[..., Any]:
        def faulty(path: Any, *args: Any, **kwargs: Any) -> Any:
            name = Path(f"/proc/self/fd/{path}").readlink() if isinstance(path, int) else path
            if within in str(name) and next(calls) == call:
                action()
            return original(path, *args, **kwargs)

        return faulty

    for name in ("mkdir", "fsync", "rename", "replace"):
        setattr(os, name, watched(getattr(os, name)))


def nan_latents(*indices: int) -> Fault:
    """Make the latents of these micro-batches NaN, on rank 0."""
    return functools.partial(_install_nan, indices)


def _install_nan(indices: tuple[int, ...]) -> None:
    if os.environ.get("RANK", "0") != "0":
        return
    batches = importlib.import_module("iwin_dit.training.batches").MicroBatches
    original = batches.__getitem__

    def faulty(self: Any, index: int) -> Any:
        batch = original(self, index)
        return batch._replace(latents=batch.latents * float("nan")) if index in indices else batch

    batches.__getitem__ = faulty


def fsdp2() -> None:
    """Shard by FSDP2. Accelerate has none on CPUs, so its state is told of it; all that follows is the real thing."""
    train_dit = importlib.import_module("train_dit")
    original = train_dit.make_accelerator

    def make_accelerator(config: Any) -> Any:
        accelerator = original(config)
        accelerator.state.fsdp_plugin = FullyShardedDataParallelPlugin(
            fsdp_version=2,
            reshard_after_forward=True,
            auto_wrap_policy="transformer_based_wrap",
            transformer_cls_names_to_wrap=["IwinDiTBlock"],
        )
        for state in (PartialState, AcceleratorState):  # Accelerate copies the one's to the other's, every now and then
            state._shared_state["distributed_type"] = DistributedType.FSDP
        assert accelerator.is_fsdp2
        return accelerator

    train_dit.make_accelerator = make_accelerator


# --- faults: what


def sends(number: signal.Signals) -> Action:
    """The process sends itself a signal."""
    return functools.partial(_send, number)


def _send(number: signal.Signals) -> None:
    os.kill(os.getpid(), number)


def raises(message: str, kind: type[Exception] = RuntimeError) -> Action:
    """An error."""
    return functools.partial(_raise, kind(message))


def runs_out_of_space() -> Action:
    """The system's error of a full disk."""
    return functools.partial(_raise, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))


def _raise(error: Exception) -> None:
    raise error


def sleeps(seconds: float) -> Action:
    """A process that hangs."""
    return functools.partial(time.sleep, seconds)
