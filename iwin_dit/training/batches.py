"""Training batches as a pure function of the step: latents, labels and the random numbers that go with them.

They hold *stored* latents: the step normalises them, on its device, so that no worker process carries the VAE.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from ..data.latents import LatentDataset, positions_to_indices
from .draws import VALIDATION_STREAM, is_image_step, keyed_draws


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


@dataclass(frozen=True)
class ImageSteps:
    """Training on clips and on single frames of them: in some steps, one latent frame of every clip stands for it.

    Attributes:
        share: Of the steps that train on single frames.
        batch_size: Global batch, which tells the step of a position.
        first: Always the first frame, the only one that a video VAE encodes as an image; else any, by position.
    """

    share: float
    batch_size: int
    first: bool

    def apply(self, seed: int, position: int, frames: torch.Tensor, *clips: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Cut single frames out of clips, where the step is one of images.

        Args:
            seed: Of the run.
            position: Global position of one of the samples.
            frames: (B,) uniforms in (0, 1) that choose the frame.
            clips: (B, C, t, h, w) tensors, all of which lose the same frames.

        Returns:
            The tensors, (B, C, 1, h, w) in a step on images.
        """
        if not is_image_step(seed, position // self.batch_size, self.share):
            return clips
        chosen = torch.zeros_like(frames) if self.first else frames * clips[0].shape[2]
        rows = torch.arange(len(frames))
        return tuple(clip[rows, :, chosen.long()].unsqueeze(2) for clip in clips)


class MicroBatches(Dataset[Batch]):
    """Micro-batch i of one process: i counts the micro-batches of the run, so a resumed loader starts at any i.

    Global positions of step s are [s * B, (s + 1) * B), laid out as (accumulation, position in the micro-batches of all
    processes). Position p reads from share p % K of the latents, whose image p // K it is; the processes of a share
    divide its positions into consecutive runs. So a position's sample depends on the seed and K alone.

    Args:
        data: Training latents, of this process's share.
        seed: Of the run.
        micro_batch: Samples per micro-batch and process.
        num_processes: Processes in the run; K divides it.
        rank: This process.
        shares: Number of shares K.
        flips: Take the mirror image of half the samples, where it is stored.
        posterior: Sample the VAE's posterior, where its deviation is stored; else take its mean.
        image_steps: Which steps of a video run train on single frames; None: no step.
    """

    def __init__(
        self,
        data: LatentDataset,
        seed: int,
        micro_batch: int,
        num_processes: int,
        rank: int,
        *,
        shares: int = 1,
        flips: bool = False,
        posterior: bool = False,
        image_steps: ImageSteps | None = None,
    ) -> None:
        self.data, self.seed, self.shares = data, seed, shares
        self.flips, self.posterior, self.image_steps = flips, posterior, image_steps
        self.micro_batch, self.num_processes = micro_batch, num_processes
        self.share, self.member = divmod(rank, num_processes // shares)

    def positions(self, index: int) -> np.ndarray:
        """Return the global positions of micro-batch `index`, (micro_batch,) int64."""
        first = index * self.num_processes * self.micro_batch  # of the micro-batches of all processes
        places = self.member * self.micro_batch + np.arange(self.micro_batch)  # among those of this share
        return first + places * self.shares + self.share

    def __getitem__(self, index: int) -> Batch:
        positions = self.positions(index)
        indices = positions_to_indices(positions // self.shares, len(self.data), self.seed, self.share)
        draws = keyed_draws(self.seed, positions, self.data.manifest.latent_shape, posterior=self.posterior)
        flips = draws.flips if self.flips else None
        latents, class_labels = self.data.get(indices, flips=flips, noise=draws.posterior)
        noise = draws.noise
        if self.image_steps is not None:
            latents, noise = self.image_steps.apply(self.seed, int(positions[0]), draws.frames, latents, noise)
        return Batch(latents, class_labels, noise, draws.times, draws.drops)

    def loader(
        self, first: int, last: int, num_workers: int, worker_init_fn: Callable[[int], None] | None = None
    ) -> DataLoader[Batch]:
        """Build a loader of the micro-batches first to last - 1, in order.

        Args:
            first: First micro-batch.
            last: The one after the last.
            num_workers: Processes that read ahead; 0 reads in this one.
            worker_init_fn: Called in each of them.

        Returns:
            The loader.
        """
        return DataLoader(
            self,
            batch_size=None,
            sampler=range(first, last),
            num_workers=num_workers,
            pin_memory=torch.cuda.is_available(),
            worker_init_fn=worker_init_fn,
        )


def validation_batch(data: LatentDataset, seed: int, indices: np.ndarray) -> Batch:
    """Build a batch of held-out latents, at the posterior's mean and unflipped, with the same numbers every time.

    Args:
        data: Held-out latents of a share.
        seed: Of the held-out split, and not of the run, so that runs compare.
        indices: (B,) which of them; an image's random numbers are keyed by its place in the store.

    Returns:
        The batch; `drops` is 1, so that no label is dropped.
    """
    latents, class_labels = data.get(indices)
    positions = data.images[indices].astype(np.uint64) + np.uint64(VALIDATION_STREAM)
    draws = keyed_draws(seed, positions, latents.shape[1:])
    return Batch(latents, class_labels, draws.noise, draws.times, torch.ones(len(indices)))
