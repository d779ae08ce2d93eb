"""Training batches as a pure function of the step: latents, labels and the random numbers that go with them.

They hold *stored* latents: the step normalises them, on its device, so that no worker process carries the VAE.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..data.latents import LatentDataset, positions_to_indices
from .draws import VALIDATION_STREAM, keyed_draws


class Batch(NamedTuple):
    """B samples and their random numbers.

    `latents` and `noise` are (B, C, *sizes), stored latents and standard normal; `class_labels` (B,) integers; `times`
    and `drops` (B,) uniforms that decide the noise level and whether the label is dropped.
    """

    latents: torch.Tensor
    class_labels: torch.Tensor
    noise: torch.Tensor
    times: torch.Tensor
    drops: torch.Tensor

    def to(self, device: torch.device) -> "Batch":
        """Move every tensor."""
        return Batch(*(tensor.to(device, non_blocking=True) for tensor in self))


class MicroBatches(Dataset[Batch]):
    """Micro-batch i of one process: i counts the micro-batches of the run, so a resumed loader starts at any i.

    Global positions of step s are [s * B, (s + 1) * B), laid out as (accumulation, processes, micro-batch).

    Args:
        data: Training latents.
        seed: Of the run.
        micro_batch: Samples per micro-batch and process.
        num_processes: Processes in the run.
        rank: This process.
    """

    def __init__(self, data: LatentDataset, seed: int, micro_batch: int, num_processes: int, rank: int) -> None:
        self.data, self.seed = data, seed
        self.micro_batch, self.num_processes, self.rank = micro_batch, num_processes, rank

    def __getitem__(self, index: int) -> Batch:
        start = (index * self.num_processes + self.rank) * self.micro_batch
        positions = np.arange(start, start + self.micro_batch)
        indices = positions_to_indices(positions, len(self.data), self.seed)
        return make_batch(self.data, self.seed, indices, positions)

    def loader(self, first: int, last: int, num_workers: int) -> DataLoader[Batch]:
        """Build a loader of the micro-batches first to last - 1, in order."""
        pin_memory = torch.cuda.is_available()
        order = range(first, last)
        return DataLoader(self, batch_size=None, sampler=order, num_workers=num_workers, pin_memory=pin_memory)


def validation_batch(data: LatentDataset, seed: int, indices: np.ndarray) -> Batch:
    """Build a batch of held-out latents whose noise and times are the same at every validation.

    Args:
        data: Held-out latents.
        seed: Of the run.
        indices: (B,) which latents.

    Returns:
        The batch; `drops` is 1, so that no label is dropped.
    """
    positions = indices.astype(np.uint64) + np.uint64(VALIDATION_STREAM)
    return make_batch(data, seed, indices, positions)._replace(drops=torch.ones(len(indices)))


def make_batch(data: LatentDataset, seed: int, indices: np.ndarray, positions: np.ndarray) -> Batch:
    """Read latents and draw the random numbers of their positions.

    Args:
        data: Stored latents.
        seed: Of the run.
        indices: (B,) which latents.
        positions: (B,) keys of their random numbers.

    Returns:
        The batch, on the CPU.
    """
    latents, class_labels = data.get(indices)
    return Batch(latents, class_labels, *keyed_draws(seed, positions, latents.shape[1:]))
