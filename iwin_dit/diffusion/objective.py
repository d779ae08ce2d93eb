"""What a training objective is: a loss that is a pure function of data, labels and random numbers given to it."""

from typing import Any, Protocol

import torch
from diffusers import SchedulerMixin


class Denoiser(Protocol):
    """The call that objectives make; `IwinDiTTransformer2DModel` has it."""

    def __call__(
        self, hidden_states: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor, *, return_dict: bool
    ) -> Any:
        """Predict from noisy latents (B, C, *sizes), timesteps (B,) in [0, 1000] and labels (B,)."""


class Objective(Protocol):
    """A training objective and the sampler that goes with it."""

    def loss(
        self,
        model: Denoiser,
        latents: torch.Tensor,
        class_labels: torch.Tensor,
        noise: torch.Tensor,
        uniform: torch.Tensor,
    ) -> torch.Tensor:
        """Compute the loss (B,) of every sample from latents (B, C, *sizes), noise likewise, and uniforms (B,)."""

    def time(self, uniform: torch.Tensor) -> torch.Tensor:
        """Map uniforms (B,) in (0, 1) to the noise levels that `loss` takes them for, timestep / 1000."""

    def scheduler(self) -> SchedulerMixin:
        """Build the sampler of this convention, to be saved with the model."""

    def out_channels(self, in_channels: int) -> int:
        """Count the channels that the model must predict."""
