"""When one process of several fails: all end soon, with a non-zero code, and the log names the one.

It must not know what is trained.
"""

import contextlib
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from typing import NoReturn, Protocol, TypeVar

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list
from torch import distributed as dist

from .stop import kill_workers

Result = TypeVar("Result")

logger = logging.getLogger(__name__)

# Seconds: between two looks at the store, for the others' answers, and for the others to read ours.
POLL, PATIENCE, LINGER = 0.5, 3.0, 1.5
LAST_SAVE = 60.0  # seconds, at most, for what is still being written before a process ends
STORE_GONE = "the store by which the processes found each other is gone, and so is its holder: rank 0 or the launcher"


class DivergedError(Exception):
    """Training diverged, which all processes have found out together, from numbers that they share."""


def main_first(accelerator: Accelerator, action: Callable[[], Result]) -> Result:
    """Do something on the main process, and then on the others; an error of the main process is raised on all.

    Args:
        accelerator: The processes.
        action: What to do.

    Returns:
        What it gave on this process.

    Raises:
        ValueError: The action's, or the main process's; without this, the others would wait for it until the timeout.
        ImportError: Likewise.
    """
    error: Exception | None = None
    if accelerator.is_main_process:
        try:
            result = action()
        except (ValueError, ImportError) as raised:
            error = raised
    [error] = broadcast_object_list([error])
    if error is not None:
        raise error
    return result if accelerator.is_main_process else action()


def largest(accelerator: Accelerator, *values: torch.Tensor | float) -> list[float]:
    """The largest of each value over all processes, which call this together; on one process the values themselves."""
    stacked = torch.stack([torch.as_tensor(value, dtype=torch.float32, device=accelerator.device) for value in values])
    return accelerator.reduce(stacked, "max").tolist()


class HasStep(Protocol):
    """Something that knows the step at which training is."""

    step: int


@contextlib.contextmanager
def named_rank(
    accelerator: Accelerator, state: HasStep, before_exit: Callable[[], object] | None = None
) -> Iterator[None]:
    """Make the failure of one process end all of them soon, and say which it was.

    Without it the others wait in their next collective until the timeout, and then name nobody. DivergedError passes,
    since all processes raise it together; with a single process every error does.

    Args:
        accelerator: Of this process.
        state: Knows the step that this process is at.
        before_exit: Returns when what this process still writes, a checkpoint, is on the disk. It is called in a
            thread, waited for up to `LAST_SAVE` seconds, and its errors are ignored.

    Yields:
        Nothing; the block ends when all processes are through with it.
    """
    if accelerator.num_processes == 1:
        yield
        return
    watch = RankWatch(accelerator.process_index, accelerator.num_processes, state, before_exit)
    try:
        yield
        accelerator.wait_for_everyone()  # from here on, a process that is gone has not failed
    except DivergedError:
        raise
    except Exception as error:
        watch.fail(error)
    finally:
        watch.close()


class RankWatch:
    """Tells the other processes of a failure through the store by which they found each other.

    A thread looks there for the failure of another, answers, and ends this process whatever its main thread waits for.
    Processes end by `os._exit`: an orderly exit destroys the process group, which can wait for the broken collective,
    and DataLoader workers, which can wait for theirs.

    Under NCCL a collective that times out is ended by NCCL's own watchdog, which logs rank and collective; what is told
    here then are the processes that raised an error, or are gone.

    Args:
        rank: Of this process.
        world: Number of processes.
        state: Knows the step that this process is at.
        before_exit: As for `named_rank`.
    """

    def __init__(self, rank: int, world: int, state: HasStep, before_exit: Callable[[], object] | None = None) -> None:
        self.rank, self.world, self.state, self.before_exit = rank, world, state, before_exit
        # A connection of its own: the process group's may be waiting for a peer, under its lock.
        store = dist.distributed_c10d._get_default_store().clone()
        self._store = dist.PrefixStore("named_rank", store)  # type: ignore[attr-defined]
        self._closed = threading.Event()
        threading.Thread(target=self._watch, name="named_rank", daemon=True).start()

    def close(self) -> None:
        """Watch no more."""
        self._closed.set()

    def fail(self, error: Exception) -> NoReturn:
        """Log the error that ended the work of this process, tell the others, and exit.

        Args:
            error: What was raised.
        """
        self._closed.set()
        what = f"{type(error).__name__}: {error}"
        try:
            self._store.set(str(self.rank), f"{type(error).__name__} at step {self.state.step}")
            first = self._store.compare_set("first", "", str(self.rank)).decode()
            if first == str(self.rank):
                self._log(what, error)
                self._log(f"the others: {'; '.join(self._answers())}")
            else:  # most likely because that one is gone; its log has the rest
                self._log(f"ended after rank {first} failed: {what}")
        except dist.DistError:
            self._log(what, error)
            self._log(STORE_GONE)
        self._exit()

    def _answers(self) -> list[str]:
        """Wait for the other ranks, and return what each has to say."""
        others, deadline = [str(rank) for rank in range(self.world) if rank != self.rank], time.monotonic() + PATIENCE
        while not self._store.check(others) and time.monotonic() < deadline:
            time.sleep(0.1)
        answered = [rank for rank in others if self._store.check([rank])]
        silent = [rank for rank in others if rank not in answered]
        answers = [f"rank {rank}: {self._store.get(rank).decode()}" for rank in answered]
        return [*answers, f"no word from rank {', '.join(silent)}: killed, or out of reach"] if silent else answers

    def _watch(self) -> None:
        while not self._closed.wait(POLL):
            try:
                if not self._store.check(["first"]):
                    continue
                reason = f"ended because rank {self._store.get('first').decode()} failed"
                self._store.set(str(self.rank), f"alive, no error, at step {self.state.step}")
            except dist.DistError:
                reason = STORE_GONE
            if self._closed.wait(2 * POLL):  # the main thread had an error of its own to report, or was through
                return
            frame = sys._current_frames()[threading.main_thread().ident or 0]
            self._log(f"{reason}; this process was at\n{''.join(traceback.format_stack(frame)[-3:])}")
            self._exit()

    def _log(self, message: str, error: Exception | None = None) -> None:
        logger.error("rank %d of %d, step %d: %s", self.rank, self.world, self.state.step, message, exc_info=error)

    def _exit(self) -> NoReturn:
        if self.rank == 0:  # which holds the store, unless a launcher does
            time.sleep(LINGER)
        last = threading.Thread(target=self._finish_writing, daemon=True)
        last.start()
        last.join(LAST_SAVE)
        kill_workers()
        logging.shutdown()
        os._exit(1)

    def _finish_writing(self) -> None:
        if self.before_exit is not None:
            with contextlib.suppress(Exception):  # the run has failed already, and says why
                self.before_exit()
