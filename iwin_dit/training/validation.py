"""Losses by noise level, and the loss on held-out latents at fixed noise and times, so that curves of runs compare."""

from collections.abc import Callable

import torch
from accelerate import Accelerator

from ..data.latents import LatentDataset
from ..data.sources import keyed_permutation
from .batches import Batch, validation_batch
from .config import Config

TIME_BINS = 5  # of equal width in noise level, 0 = data, 1 = noise


def by_time(losses: torch.Tensor, times: torch.Tensor) -> torch.Tensor:
    """Sum losses by noise level.

    Args:
        losses: (B,) one per sample.
        times: (B,) noise levels in [0, 1].

    Returns:
        (2, TIME_BINS) sums and counts.
    """
    bins = (times * TIME_BINS).long().clamp(max=TIME_BINS - 1)
    values = torch.stack([losses, torch.ones_like(losses)])
    return values.new_zeros(2, TIME_BINS).index_add_(1, bins, values)


def loss_summary(sums: torch.Tensor, prefix: str = "") -> dict[str, float | list[float]]:
    """Turn sums of `by_time`, over all processes, into what is logged.

    Args:
        sums: (2, TIME_BINS).
        prefix: Of the names.

    Returns:
        The mean loss, and the mean of every bin; NaN for one without samples.
    """
    total, count = sums.sum(dim=1)
    return {f"{prefix}loss": (total / count).item(), f"{prefix}loss_by_time": (sums[0] / sums[1]).tolist()}


@torch.no_grad()
def validate(
    config: Config,
    accelerator: Accelerator,
    data: LatentDataset,
    micro_batch: int,
    losses: Callable[[Batch], tuple[torch.Tensor, torch.Tensor]],
    stopping: Callable[[], bool],
) -> torch.Tensor | None:
    """Measure the loss on held-out latents.

    Every process runs the model equally often, with weight 0 where it has no samples left: sharded weights are gathered
    by all processes together.

    Args:
        config: Says how many samples, and where they lie.
        accelerator: The processes.
        data: Held-out latents of this process's share.
        micro_batch: Samples per pass.
        losses: Gives losses (B,) and noise levels (B,) of a batch.
        stopping: Asked before every pass, by all processes together; true ends the validation.

    Returns:
        (2, TIME_BINS) sums and counts over all processes; None if it was ended.
    """
    shares = config.data.shares
    member = accelerator.process_index % (accelerator.num_processes // shares)
    count = min(len(data), -(-config.log.validation_samples // shares))
    chosen = keyed_permutation(len(data), config.data.split_seed)[:count]  # of all classes: a folder's come one by one
    mine = chosen[member :: accelerator.num_processes // shares]
    passes = torch.tensor(-(-len(mine) // micro_batch), device=accelerator.device)
    sums = torch.zeros(2, TIME_BINS, device=accelerator.device)
    for i in range(int(accelerator.reduce(passes, "max").item())):
        if stopping():
            return None
        chunk = mine[i * micro_batch : (i + 1) * micro_batch]
        indices = chunk if len(chunk) else chosen[:1]
        batch = validation_batch(data, config.data.split_seed, indices).to(accelerator.device)
        with accelerator.autocast():
            values, times = losses(batch)
        if len(chunk):
            sums += by_time(values.float(), times)
    return accelerator.reduce(sums, "sum")
