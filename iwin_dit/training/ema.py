"""Exponential moving average of a model's weights. Must not know the run: it keeps no count of its own."""

import copy
from typing import Generic, TypeVar

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from .sharding import local

ModelT = TypeVar("ModelT", bound=nn.Module)


class EMA(Generic[ModelT]):
    """A float32 copy of a model whose weights follow those of the training model, at a speed counted in images.

    A weight counts half after `halflife_images`, or after `rampup_ratio` of the images seen so far where that is less,
    so that a short run's average is not dominated by the initial weights: the rule of EDM's training (arXiv
    2206.00364). The decay is a function of the images seen, so the weights are all that there is to save.

    For FSDP2, build it from the whole model, and `shard` it once that is sharded.

    Args:
        model: The training model, not sharded yet; its weights now are the average's first.
        halflife_images: Half-life in images, once warm.
        rampup_ratio: Half-life over images seen, until then.
    """

    def __init__(self, model: ModelT, halflife_images: float, rampup_ratio: float = 0.05) -> None:
        self.model: ModelT = copy.deepcopy(model).float().eval().requires_grad_(False)
        self.halflife_images, self.rampup_ratio = halflife_images, rampup_ratio

    def shard(self, model: nn.Module) -> None:
        """Shard the average over the processes, module by module, as FSDP2 has sharded the training model.

        Args:
            model: The training model, sharded.
        """
        mesh = next(p for p in model.parameters() if isinstance(p, DTensor)).device_mesh
        for name, module in reversed(list(model.named_modules())):  # children before their parents
            if isinstance(module, FSDPModule):
                fully_shard(self.model.get_submodule(name), mesh=mesh)

    def decay(self, images_seen: int, batch_size: int) -> float:
        """Return the weight of the old average in the update that follows a step.

        Args:
            images_seen: Images seen so far, those of the step included.
            batch_size: Images of the step.

        Returns:
            0.5 ** (batch_size / half-life).
        """
        return 0.5 ** (batch_size / min(self.halflife_images, images_seen * self.rampup_ratio))

    @torch.no_grad()
    def update(self, model: nn.Module, images_seen: int, batch_size: int) -> None:
        """Move the average towards the training model: average = decay * average + (1 - decay) * weights.

        Args:
            model: The training model, sharded as the average is; each process moves its own shards. Buffers are copied.
            images_seen: Images seen so far, those of the step included.
            batch_size: Images of the step.
        """
        # state_dict and not parameters(): it first takes FSDP2's root module back to its shards, which stays whole
        # after a forward pass without a backward one (a validation), and whose whole weights are a mere copy.
        averages, weights = self.model.state_dict(keep_vars=True), model.state_dict()
        names = [name for name, tensor in averages.items() if isinstance(tensor, nn.Parameter)]
        torch._foreach_lerp_(
            [local(averages[name]) for name in names],
            [local(weights[name]).float() for name in names],
            1 - self.decay(images_seen, batch_size),
        )
        for name in averages.keys() - set(names):
            averages[name].copy_(weights[name])
