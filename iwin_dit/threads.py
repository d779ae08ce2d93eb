"""A thread beside the main one's work, that does not slow it."""

from concurrent.futures import ThreadPoolExecutor

import torch


def background_thread(name: str) -> ThreadPoolExecutor:
    """Start a thread whose torch operators run on one core.

    With more, they would start a second team of OpenMP threads. Once a process has more of these than cores, every
    parallel loop waits longer for its threads, for good: 10 % of a training step on two cores.

    Args:
        name: Of the thread.

    Returns:
        An executor with this one thread.
    """
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(1, name)
    pool.submit(_take_one_core).result()
    torch.set_num_threads(threads)  # nothing new to this thread, but those to come take the number that was last set
    return pool


def _take_one_core() -> None:
    torch.get_num_threads()  # at a thread's first call torch gives it the number that was last set, now and not later
    torch.set_num_threads(1)
