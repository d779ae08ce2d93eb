"""Denoising diffusion: noise prediction on the linear schedule, optionally with a learned variance."""

import math
from dataclasses import dataclass

import torch
from diffusers import DDPMScheduler, SchedulerMixin

from .objective import Denoiser

T = 1000


@dataclass
class DDPM:
    """Noise prediction with T = 1000 discrete steps (Ho et al., arXiv 2006.11239), as DiT trains.

    T is not a setting: model timesteps and guidance intervals count thousandths everywhere.

    Attributes:
        beta_start: First beta of the linear schedule.
        beta_end: Last beta.
        learned_variance: Predict C more channels that interpolate the log variance between its bounds, trained by the
            variational bound (Nichol and Dhariwal, arXiv 2102.09672).
    """

    beta_start: float = 1e-4
    beta_end: float = 0.02
    learned_variance: bool = False

    def __post_init__(self) -> None:
        if not 0 < self.beta_start <= self.beta_end < 1:
            raise ValueError(f"expected 0 < beta_start <= beta_end < 1, got {self}")
        betas = torch.linspace(self.beta_start, self.beta_end, T, dtype=torch.float64)
        self._betas = betas
        self._alphas_cumprod = (1 - betas).cumprod(0)  # alpha-bar
        self._previous_alphas_cumprod = torch.cat([betas.new_ones(1), self._alphas_cumprod[:-1]])
        # beta-tilde (arXiv 2006.11239, equation 7) is 0 at t = 0, so its logarithm is taken from t = 1 there.
        variance = betas * (1 - self._previous_alphas_cumprod) / (1 - self._alphas_cumprod)
        self._posterior_log_variance = torch.cat([variance[1:2], variance[1:]]).log()

    def time(self, uniform: torch.Tensor) -> torch.Tensor:
        """Map uniform numbers (B,) in (0, 1) to steps over T, (B,) in [0, 1)."""
        return (uniform * T).long() / T

    def loss(
        self,
        model: Denoiser,
        latents: torch.Tensor,
        class_labels: torch.Tensor,
        noise: torch.Tensor,
        uniform: torch.Tensor,
    ) -> torch.Tensor:
        """Squared error of the noise, L_simple (arXiv 2006.11239, equation 14), plus the bound's term if learned.

        Args:
            model: Predicts the noise, and C channels of variance where it is learned.
            latents: (B, C, *sizes) data x_0, normalised.
            class_labels: (B,) integers, null classes included.
            noise: (B, C, *sizes) standard normal epsilon.
            uniform: (B,) in (0, 1), decides the steps.

        Returns:
            (B,) loss of every sample, in the dtype of the latents (float32 in training).
        """
        t = (uniform * T).long()
        signal = self._at(self._alphas_cumprod, t, latents)
        x_t = signal.sqrt() * latents + (1 - signal).sqrt() * noise
        output = model(x_t, t.to(x_t.dtype), class_labels, return_dict=False)[0].to(latents.dtype)
        prediction = output[:, : latents.shape[1]]
        loss = (prediction - noise).square().flatten(1).mean(1)
        if self.learned_variance:
            variance = output[:, latents.shape[1] :]
            loss = loss + self.variational_term(latents, x_t, prediction.detach(), variance, t)
        return loss

    def variational_term(
        self, x_0: torch.Tensor, x_t: torch.Tensor, noise: torch.Tensor, variance: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        """L_vlb of one step (arXiv 2102.09672, equations 4 to 6 and 15), which trains the variance alone.

        At t = 0 the bound's last term is a Gaussian density: latents are continuous, unlike the 8-bit pixels of the
        paper. Its L_hybrid has the sum over T steps with weight 1/1000, so one step drawn at random has weight 1.

        Args:
            x_0: (B, C, *sizes) data.
            x_t: (B, C, *sizes) noisy data.
            noise: (B, C, *sizes) predicted noise, detached.
            variance: (B, C, *sizes) predicted interpolation v, -1 = lower bound, 1 = upper bound.
            t: (B,) steps.

        Returns:
            (B,) in bits per dimension.
        """
        beta, signal = self._at(self._betas, t, x_0), self._at(self._alphas_cumprod, t, x_0)
        previous = self._at(self._previous_alphas_cumprod, t, x_0)
        mean_x0, mean_xt = previous.sqrt() * beta / (1 - signal), (1 - beta).sqrt() * (1 - previous) / (1 - signal)
        true_mean = mean_x0 * x_0 + mean_xt * x_t
        mean = mean_x0 * (x_t - (1 - signal).sqrt() * noise) / signal.sqrt() + mean_xt * x_t
        true_log_var = self._at(self._posterior_log_variance, t, x_0)
        log_var = (variance + 1) / 2 * beta.log() + (1 - variance) / 2 * true_log_var  # equation 15
        squared = (true_mean - mean).square() * torch.exp(-log_var)
        kl = 0.5 * (log_var - true_log_var - 1 + torch.exp(true_log_var - log_var) + squared)
        nll = 0.5 * (math.log(2 * math.pi) + log_var + squared)  # at t = 0 the true mean is x_0
        nats = torch.where(t > 0, kl.flatten(1).mean(1), nll.flatten(1).mean(1))
        return nats / math.log(2)

    def scheduler(self) -> SchedulerMixin:
        """Build the sampler of this convention, to be saved with the model."""
        return DDPMScheduler(
            num_train_timesteps=T,
            beta_start=self.beta_start,
            beta_end=self.beta_end,
            variance_type="learned_range" if self.learned_variance else "fixed_small",
            clip_sample=False,
            timestep_spacing="linspace",
        )

    def out_channels(self, in_channels: int) -> int:
        """Count the channels that the model must predict."""
        return 2 * in_channels if self.learned_variance else in_channels

    @staticmethod
    def _at(values: torch.Tensor, t: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
        """Pick values[t], shaped to broadcast over `like` (B, C, *sizes), in its dtype."""
        return values.to(t.device)[t].to(like.dtype).view(-1, *(1,) * (like.ndim - 1))
