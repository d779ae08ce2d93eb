"""The one latent codec: pixels to stored latents to model latents and back, for any diffusers image VAE.

*Stored latents* are what the encoder gives (posterior mean, or a sample) and what lies on disk; *model latents* are the
same, normalised, and what the transformer sees. Owns where each VAE class keeps its statistics; knows nothing of
models, pipelines or files. Letters: B batch, C latent channels, H W pixels, h w latent cells.
"""

import hashlib
import json
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.utils import BaseOutput


class LatentCodec:
    """Encodes, normalises, denormalises and decodes with a diffusers image VAE.

    Every normalisation in diffusers is `model = (stored - mean) / std` per channel; both vectors are read once, here:

    - `latents_mean` and `latents_std` given: exactly those (a pipeline keeps them in `model_index.json` when the VAE
      class has no such fields); a scaling or shift factor in the VAE's config does not apply on top;
    - a VAE with a latent batch norm (AutoencoderKLFlux2): its running statistics, after a pixel-unshuffle that belongs
      to `encode`, so that stored and model latents have one shape;
    - `latents_mean` and `latents_std` in the VAE's config: `std = latents_std / scaling_factor`;
    - else `shift_factor` and `scaling_factor` of the config: `mean = shift`, `std = 1 / scaling`.

    The codec moves nothing between devices, and computes in the VAE's dtype but for the normalisation (float32).

    Args:
        vae: An image VAE of diffusers.
        latents_mean: Mean of the stored latents, C values.
        latents_std: Standard deviation of the stored latents, C values; given with the mean or not at all.

    Raises:
        ValueError: The VAE is a video VAE, keeps no statistics, contradicts the given ones, or they do not fit its C.
    """

    def __init__(
        self, vae: ModelMixin, latents_mean: Sequence[float] | None = None, latents_std: Sequence[float] | None = None
    ) -> None:
        if any(isinstance(module, torch.nn.Conv3d) for module in vae.modules()):
            raise ValueError(f"expected an image VAE, got {type(vae).__name__}, a video VAE (it has 3D convolutions)")
        self.vae = vae
        self._patch = _patch_size(vae)
        self.stride = _encoder_stride(vae) * self._patch  # pixels per latent cell, both axes
        self.latent_channels: int = vae.config.latent_channels * self._patch**2
        mean, std = _statistics(vae, latents_mean, latents_std)
        if len(mean) != self.latent_channels or len(std) != self.latent_channels or min(std) <= 0:
            raise ValueError(
                f"expected latent statistics of {self.latent_channels} channels, standard deviations above 0; "
                f"got mean {list(mean)}, std {list(std)}"
            )
        self.mean = torch.tensor(mean, dtype=torch.float32)  # (C,), of the stored latents
        self.std = torch.tensor(std, dtype=torch.float32)  # (C,)
        # Arguments that build the same codec again, in a pipeline too; none where the VAE's own statistics serve.
        self.given_statistics: dict[str, list[float]] = {}
        if latents_mean is not None:
            self.given_statistics = {"latents_mean": list(mean), "latents_std": list(std)}

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode pixels to stored latents: the posterior's mean, or all there is where the VAE has no posterior.

        Args:
            pixels: (B, 3, H, W) in [-1, 1], H and W divisible by `stride`, on the VAE's device.

        Returns:
            Stored latents (B, C, H / stride, W / stride), float32.

        Raises:
            ValueError: Wrong shape.
        """
        encoded = self._encoded(pixels)
        if "latent_dist" in encoded:
            latents = encoded.latent_dist.mean
        else:  # AutoencoderDC says `latent`, AutoencoderTiny and VQModel `latents`
            latents = encoded.latent if "latent" in encoded else encoded.latents
        return F.pixel_unshuffle(latents, self._patch).float()

    @torch.no_grad()
    def encode_posterior(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode pixels to the posterior of the stored latents, a normal distribution without covariances.

        Args:
            pixels: As for `encode`.

        Returns:
            Mean and standard deviation, each (B, C, H / stride, W / stride), float32.

        Raises:
            ValueError: Wrong shape, or the VAE has no posterior.
        """
        encoded = self._encoded(pixels)
        if "latent_dist" not in encoded:
            raise ValueError(f"{type(self.vae).__name__} has no posterior to sample from; set data.posterior: mean")
        posterior = encoded.latent_dist
        mean, std = (F.pixel_unshuffle(part, self._patch).float() for part in (posterior.mean, posterior.std))
        return mean, std

    def _encoded(self, pixels: torch.Tensor) -> BaseOutput:
        if pixels.ndim != 4 or pixels.shape[1] != 3 or any(side % self.stride for side in pixels.shape[-2:]):
            raise ValueError(
                f"expected pixels (B, 3, H, W), sides divisible by {self.stride}, got {tuple(pixels.shape)}"
            )
        return self.vae.encode(pixels.to(self.vae.dtype))

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode model latents to pixels.

        Args:
            latents: Model latents (B, C, h, w), on the VAE's device.

        Returns:
            Pixels (B, 3, h * stride, w * stride), about [-1, 1] (not clipped), float32.

        Raises:
            ValueError: A latent is NaN or infinite, which would decode to a black picture.
        """
        finite = latents.isfinite().flatten(1).all(dim=1)
        if not finite.all():
            broken = (~finite).nonzero().flatten().tolist()
            raise ValueError(f"expected finite latents, got NaN or infinity in samples {broken} of {len(latents)}")
        stored = F.pixel_shuffle(self.denormalize(latents), self._patch)
        return self.vae.decode(stored.to(self.vae.dtype)).sample.float()

    def normalize(self, stored: torch.Tensor) -> torch.Tensor:
        """Stored latents to model latents, (B, C, h, w) each: `(stored - mean) / std`."""
        return (stored - _on(self.mean, stored)) / _on(self.std, stored)

    def denormalize(self, latents: torch.Tensor) -> torch.Tensor:
        """Model latents to stored latents, (B, C, h, w) each: `latents * std + mean`."""
        return latents * _on(self.std, latents) + _on(self.mean, latents)

    def stored_fingerprint(self) -> str:
        """Identify all that decides the stored latents: VAE class, weights and the folding of latent patches.

        The config is left out on purpose: a new diffusers release adds fields to it without changing a latent.

        Returns:
            A sha256 in hex. Of the weights as loaded: the same VAE in another dtype has another one.
        """
        digest = hashlib.sha256(f"{type(self.vae).__name__} {self._patch}".encode())
        for name, tensor in sorted(self.vae.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
        return digest.hexdigest()

    def fingerprint(self) -> str:
        """sha256, in hex, of all that decides the model latents: `stored_fingerprint` and the statistics."""
        statistics = json.dumps([self.mean.tolist(), self.std.tolist()])
        return hashlib.sha256(f"{self.stored_fingerprint()} {statistics}".encode()).hexdigest()

    def config_fingerprint(self) -> str:
        """sha256, in hex, of the VAE's config without the fields that say where and by what it was saved."""
        config = {key: value for key, value in self.vae.config.items() if not key.startswith("_")}
        return hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()


def _on(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Per-channel values (C,) as (C, 1, 1) on the device of `like`."""
    return values.to(like.device)[:, None, None]


def _patch_size(vae: ModelMixin) -> int:
    """Side of the latent patches that are folded into channels before a latent batch norm; 1 without one."""
    return int(vae.config.patch_size[0]) if "batch_norm_eps" in vae.config else 1


def _encoder_stride(vae: ModelMixin) -> int:
    """Pixels per cell of the encoder's own latents; read and not probed, since an offloaded VAE cannot run here."""
    if "spatial_compression_ratio" in vars(vae):
        return int(vae.spatial_compression_ratio)
    if "block_out_channels" in vae.config:
        return 2 ** (len(vae.config.block_out_channels) - 1)
    raise ValueError(f"{type(vae).__name__} is not supported: it states neither its stride nor block_out_channels")


def _statistics(
    vae: ModelMixin, given_mean: Sequence[float] | None, given_std: Sequence[float] | None
) -> tuple[Sequence[float], Sequence[float]]:
    """Mean and standard deviation of the stored latents, by the rules in `LatentCodec`."""
    own = _own_channel_statistics(vae)
    if given_mean is not None and given_std is not None:
        given = list(given_mean), list(given_std)
        if own is not None and own != given:
            raise ValueError(
                f"{type(vae).__name__} has latent statistics of its own, and other ones were given: keep one. "
                f"Own mean and std {own}, given {given}"
            )
        return given
    if given_mean is not None or given_std is not None:
        raise ValueError(f"expected latents_mean and latents_std together, got {given_mean} and {given_std}")
    if own is not None:
        return own
    scale = vae.config.get("scaling_factor")
    if not scale:
        raise ValueError(
            f"{type(vae).__name__} keeps no latent statistics (latents_mean and latents_std, or scaling_factor, in its "
            "config); pass latents_mean and latents_std"
        )
    channels = vae.config.latent_channels
    return [vae.config.get("shift_factor") or 0.0] * channels, [1.0 / scale] * channels


def _own_channel_statistics(vae: ModelMixin) -> tuple[list[float], list[float]] | None:
    """Per-channel mean and standard deviation that the VAE itself keeps, or None."""
    config = vae.config
    if "batch_norm_eps" in config:
        std = (vae.bn.running_var.float() + config.batch_norm_eps).sqrt()
        return vae.bn.running_mean.float().tolist(), std.tolist()
    mean, std = config.get("latents_mean"), config.get("latents_std")
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise ValueError(f"expected latents_mean and latents_std together in the VAE's config, got {mean} and {std}")
    scale = config.get("scaling_factor") or 1.0
    return list(mean), [value / scale for value in std]
