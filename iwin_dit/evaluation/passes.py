"""One pass over a set of images by all processes: dealt out, read ahead, with errors and stops agreed on.

Must not know what is done with the images.

Letters: B batch, T frames, H W image axes.
"""

import math
from collections import deque
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import Future
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ..metrics.images import ImageSet
from ..metrics.processes import agree, from_main, gather, rank, world_size
from ..threads import background_thread

Result = TypeVar("Result")

AHEAD = 4  # batches read before they are needed
# Rounds of batches between two agreements: a collective waits for the device, which is nothing beside sampling a batch,
# but something beside the few milliseconds of a network.
ROUNDS_SAMPLED, ROUNDS_READ = 1, 16


class EvaluationError(Exception):
    """An error of one process of several, raised on all of them; it names the rank."""


def never() -> bool:
    """Ask for no stop."""
    return False


def settle(error: Exception | None, *, stop: bool = False) -> bool:
    """Agree over the processes on whether to go on; a collective.

    A process that raised by itself would leave the others waiting for it: it brings its error here, and all raise.

    Args:
        error: What went wrong on this process.
        stop: Whether this process was asked to stop.

    Returns:
        Whether any process was asked to stop.

    Raises:
        EvaluationError: A process has an error; on that one the error is its cause. A single process raises its error
            as it is.
    """
    world = world_size()
    if world == 1:
        if error is not None:
            raise error
        return stop
    status = agree(2 if error is not None else int(stop))
    if status < 2:
        return status == 1
    causes = gather(None if error is None else f"{type(error).__name__}: {error}")
    told = [f"rank {i} of {world} failed: {cause}" for i, cause in enumerate(causes) if cause is not None]
    raise EvaluationError("; ".join(told)) from error


def together(action: Callable[[], Result]) -> Result:
    """Do something on every process, with the errors agreed on; a collective.

    Args:
        action: What to do; it must not be a collective itself.

    Returns:
        What it gave on this process.

    Raises:
        EvaluationError: It failed on a process, see `settle`.
    """
    error: Exception | None = None
    try:
        result = action()
    except Exception as raised:  # whatever it is, the other processes must hear of it
        error = raised
    settle(error)
    return result


def on_main(action: Callable[[], Result]) -> Result:
    """Do something on the main process, and give every process what came of it; a collective.

    Args:
        action: What to do there; it gives a small Python value.

    Returns:
        The main process's result.

    Raises:
        EvaluationError: It failed, see `settle`.
    """
    result: Result = from_main(together(lambda: action() if rank() == 0 else None))
    return result


def run_pass(
    images: ImageSet,
    pending: Sequence[int] | np.ndarray,
    batch_size: int,
    device: torch.device | str,
    work: Callable[[Tensor, list[int]], None],
    *,
    stopping: Callable[[], bool] = never,
    label: str = "images",
    progress: bool = True,
) -> bool:
    """Read images and do something with them, each process with its share; a collective.

    Args:
        images: The set.
        pending: Which of its images, the same on every process; process r takes `pending[r::processes]` in order.
        batch_size: Images per process at a time.
        device: Where the batches are wanted.
        work: Takes a batch, uint8 `(B, 3, H, W)` or clips `(B, T, 3, H, W)`, and the indices of its images.
        stopping: Whether to stop; asked between batches, and one process's answer stops all.
        label: What the progress bar calls them.
        progress: Whether the main process shows a bar.

    Returns:
        Whether the pass ran to its end and was not stopped.

    Raises:
        EvaluationError: A process failed, see `settle`.
    """
    world, device = world_size(), torch.device(device)
    mine = [int(index) for index in pending[rank() :: world]]
    batches = [mine[start : start + batch_size] for start in range(0, len(mine), batch_size)]
    rounds = math.ceil(len(pending) / (world * batch_size))  # of the process with the largest share
    every = ROUNDS_READ if images.prefetch and world > 1 else ROUNDS_SAMPLED
    error: Exception | None = None
    source = _read_ahead(images, batches, device) if images.prefetch else _read_in_place(images, batches, device)
    bar = tqdm(
        total=len(images),
        initial=len(images) - len(pending),
        desc=label,
        unit="img" if getattr(images, "frames", None) is None else "clip",
        disable=not progress or rank() > 0,
    )
    with bar:
        try:
            for turn in range(rounds):
                if error is None and turn < len(batches):
                    try:
                        work(next(source), batches[turn])
                    except Exception as raised:  # whatever it is, the other processes must hear of it
                        error = raised
                seen = min((turn + 1) * world * batch_size, len(pending))  # by all processes together
                bar.update(len(images) - len(pending) + seen - bar.n)
                if ((turn + 1) % every == 0 or turn + 1 == rounds) and settle(error, stop=stopping()):
                    return False
        finally:
            source.close()
    return True


def _read_in_place(
    images: ImageSet, batches: Sequence[list[int]], device: torch.device
) -> Generator[Tensor, None, None]:
    """Read each batch when it is asked for."""
    for indices in batches:
        yield images.read(indices).to(device).contiguous()


def _read_ahead(images: ImageSet, batches: Sequence[list[int]], device: torch.device) -> Generator[Tensor, None, None]:
    """Read a few batches ahead in a thread, so that the device does not wait for the disk."""
    pinned = device.type == "cuda"

    def read(indices: list[int]) -> Tensor:
        batch = images.read(indices)
        return batch.pin_memory() if pinned and batch.device.type == "cpu" else batch

    pool = background_thread("read-ahead")
    waiting: deque[Future[Tensor]] = deque()
    try:
        for indices in [*batches, *[None] * AHEAD]:
            if indices is not None:
                waiting.append(pool.submit(read, indices))
            if waiting and (indices is None or len(waiting) > AHEAD):
                yield waiting.popleft().result().to(device, non_blocking=pinned).contiguous()
    finally:
        pool.shutdown(cancel_futures=True)
