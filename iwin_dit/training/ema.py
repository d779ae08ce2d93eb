"""Exponential moving average of a model's weights."""

import copy
from typing import Generic, TypeVar

import torch
from torch import nn

ModelT = TypeVar("ModelT", bound=nn.Module)


class EMA(Generic[ModelT]):
    """A float32 copy of a model whose weights follow those of the training model.

    After n updates the decay is min(decay, (1 + n) / (10 + n)), so that a short run's average is not dominated by the
    initial weights. Buffers are copied.

    Args:
        model: The training model; its weights now are the average's first.
        decay: Decay per update once warm.
    """

    def __init__(self, model: ModelT, decay: float) -> None:
        self.model: ModelT = copy.deepcopy(model).float().eval().requires_grad_(False)
        self.decay = decay
        self.updates = 0

    def current_decay(self) -> float:
        """Return the decay of the next update."""
        return min(self.decay, (1 + self.updates) / (10 + self.updates))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Move the average towards the training model: average = decay * average + (1 - decay) * weights."""
        averages: list[torch.Tensor] = list(self.model.parameters())
        torch._foreach_lerp_(averages, [p.float() for p in model.parameters()], 1 - self.current_decay())
        for average, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            average.copy_(buffer)
        self.updates += 1
