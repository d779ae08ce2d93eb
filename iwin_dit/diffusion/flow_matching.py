"""Flow matching with the linear path, in the scheduler's language: time is the noise level, 0 = data, 1 = noise."""

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from diffusers import FlowMatchEulerDiscreteScheduler, SchedulerMixin

from .objective import Denoiser


@dataclass
class FlowMatching:
    """Velocity prediction on straight paths from data to noise (Lipman et al., arXiv 2210.02747).

    Attributes:
        time_distribution: "logit_normal" (arXiv 2403.03206, equation 19) or "uniform".
        logit_mean: Mean of the logit of time; positive trains more on noise.
        logit_std: Standard deviation of the logit of time.
        cosine_weight: Weight of the term 1 - cos(prediction, velocity) over channels (LightningDiT, arXiv 2501.01423).
        shift: Timestep shift of the sampler that is saved with the model; training does not depend on it.
    """

    time_distribution: Literal["logit_normal", "uniform"] = "logit_normal"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    cosine_weight: float = 0.0
    shift: float = 1.0

    def __post_init__(self) -> None:
        if self.time_distribution not in ("logit_normal", "uniform"):
            raise ValueError(f"time_distribution must be 'logit_normal' or 'uniform', got {self.time_distribution!r}")
        if self.logit_std <= 0 or self.shift <= 0 or self.cosine_weight < 0:
            raise ValueError(f"logit_std and shift must be positive, cosine_weight not negative, got {self}")

    def time(self, uniform: torch.Tensor) -> torch.Tensor:
        """Map uniform numbers to noise levels, (B,) in (0, 1) each, by the inverse distribution function."""
        if self.time_distribution == "uniform":
            return uniform
        return torch.sigmoid(self.logit_mean + self.logit_std * torch.special.ndtri(uniform))

    def loss(
        self,
        model: Denoiser,
        latents: torch.Tensor,
        class_labels: torch.Tensor,
        noise: torch.Tensor,
        uniform: torch.Tensor,
    ) -> torch.Tensor:
        """Squared error of the velocity (arXiv 2210.02747, equation 23 with sigma_min = 0, time reversed).

        Args:
            model: Predicts the velocity.
            latents: (B, C, *sizes) data x_0, normalised.
            class_labels: (B,) integers, null classes included.
            noise: (B, C, *sizes) standard normal epsilon.
            uniform: (B,) in (0, 1), decides the noise levels.

        Returns:
            (B,) loss of every sample, in the dtype of the latents (float32 in training).
        """
        time = self.time(uniform)
        t = time.view(-1, *(1,) * (latents.ndim - 1))
        x_t = (1 - t) * latents + t * noise
        velocity = noise - latents  # d x_t / d t
        prediction = model(x_t, 1000 * time, class_labels, return_dict=False)[0].to(latents.dtype)
        loss = (prediction - velocity).square().flatten(1).mean(1)
        if self.cosine_weight > 0:
            loss = loss + self.cosine_weight * (1 - F.cosine_similarity(prediction, velocity, dim=1)).flatten(1).mean(1)
        return loss

    def scheduler(self) -> SchedulerMixin:
        """Build the sampler of this convention, to be saved with the model."""
        return FlowMatchEulerDiscreteScheduler(shift=self.shift)

    def out_channels(self, in_channels: int) -> int:
        """Count the channels that the model must predict."""
        return in_channels
