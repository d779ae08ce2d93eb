"""When a run must end early: signals, a launcher that died, a time limit.

A request is only noted here; the training loop asks for it at step boundaries, agrees on it over the ranks, writes its
checkpoint and leaves.
"""

import logging
import multiprocessing
import os
import signal
import threading
import time
from multiprocessing.process import BaseProcess
from types import FrameType, TracebackType
from typing import Self

logger = logging.getLogger(__name__)

# Both as early as they can be known: opening the data can take minutes, in which a launcher can die.
STARTED = time.monotonic()
PARENT = os.getppid()
# What torchrun and `accelerate launch` leave in the environment of the processes that they start.
LAUNCHER_VARIABLES = ("TORCHELASTIC_RUN_ID", "ACCELERATE_DYNAMO_BACKEND")
STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT)
# A scheduler signals every process of the job, and torchrun passes the same signal on to its own: one request, not two.
SAME_REQUEST = 1.0  # seconds


class StopRequest:
    """Notes that the run must end, as a context manager around the training loop, in the main thread.

    Three things request it: SIGTERM or SIGINT; the death of the launcher (`accelerate launch` leaves its process behind
    when it is ended) and the time limit, which both count as SIGTERM. Another signal, a second or more after the first,
    ends the process at once.

    Python runs a handler between two bytecodes of the main thread. `time.sleep`, a read or a wait is interrupted for
    it and then goes on (PEP 475), so the stop still waits for its end; a kernel or a collective is not interrupted, and
    a second signal has no effect before it returns. What takes long in Python, validation and sampling, must ask
    `requested` in between.

    Args:
        max_time: Hours since this process started (its imports) after which a stop is requested; None sets no limit.
    """

    def __init__(self, max_time: float | None = None) -> None:
        self.signal: int | None = None
        self._deadline = None if max_time is None else STARTED + max_time * 3600
        self._launched = any(variable in os.environ for variable in LAUNCHER_VARIABLES)
        self._noted = 0.0
        self._announced = False

    def __enter__(self) -> Self:
        self._previous = {number: signal.signal(number, self._note) for number in STOP_SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        # torch's handler of SIGCHLD raises for a worker that was killed
        previous = signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        for worker in kill_workers():
            worker.join()
        signal.signal(signal.SIGCHLD, previous)

    @property
    def requested(self) -> bool:
        """Whether the run must end; cheap enough for every step and batch."""
        if self.signal is None:
            if self._launched and os.getppid() != PARENT:
                self._request("the launcher has ended")
            elif self._deadline is not None and time.monotonic() > self._deadline:
                self._request("train.max_time is over")
        elif not self._announced:
            # Here and not in the handler, which may have interrupted a write to the same stream.
            self._announce(signal.Signals(self.signal).name)
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """128 + the signal, as shells and schedulers expect of a process that a signal ended; 0 without a request."""
        return 0 if self.signal is None else 128 + self.signal

    def _note(self, number: int, frame: FrameType | None) -> None:  # noqa: ARG002  (signal's signature)
        if self.signal is None:
            self.signal, self._noted = number, time.monotonic()
        elif time.monotonic() - self._noted > SAME_REQUEST:
            kill_workers()
            os._exit(128 + number)

    def _request(self, reason: str) -> None:
        self.signal, self._noted = int(signal.SIGTERM), time.monotonic()
        self._announce(reason)

    def _announce(self, reason: str) -> None:
        self._announced = True
        logger.warning("%s: stopping at the end of this step; another signal exits at once", reason)


def ignore_stop_signals(worker_id: int) -> None:  # noqa: ARG001  (DataLoader's signature)
    """Let a DataLoader worker outlive the signal, until the checkpoint is written; for `worker_init_fn`.

    Schedulers and terminals signal the whole process group, and a loop whose workers died has no next batch to reach
    its step boundary with. The workers end with their loader, with `StopRequest`, or with the process, however it dies:
    torch's own watch takes the fork server for the parent, where that is the way to start processes.

    Args:
        worker_id: The worker's number.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # a worker is a process of its own
    parent.join()
    os._exit(1)


def kill_workers() -> list[BaseProcess]:
    """Kill the DataLoader workers that still run.

    They ignore the SIGTERM that `multiprocessing` sends before it waits for them at exit, which would then take for
    ever. An error's traceback is enough to keep a loader, and with it the workers, until then.

    Returns:
        The workers.
    """
    workers = [child for child in multiprocessing.active_children() if child.daemon]
    for worker in workers:
        worker.kill()
    return workers
