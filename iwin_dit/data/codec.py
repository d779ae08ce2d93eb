"""The one latent codec: pixels to stored latents to model latents and back, for VAEs of diffusers, images and clips.

*Stored latents* are what the encoder gives (posterior mean, or a sample) and what lies on disk; *model latents* are the
same, normalised, and what the transformer sees. Owns where each VAE class keeps its strides and statistics; knows
nothing of models, pipelines or files. Letters: B batch, C latent channels, T H W frames and pixels, t h w latent cells.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from diffusers import ModelMixin
from diffusers.utils import BaseOutput

FRAMES_PER_CALL = 16  # of one clip, that an image VAE takes at once: its memory grows neither with T nor with B

# The video VAEs that are supported. Each takes the first frame alone, so that 1 + k * stride frames are 1 + k latent
# frames and one frame is an image; diffusers' classes state the stride, but not that. The number says of how many
# latent frames after the first there must be a multiple: CogVideoX decodes 3 of them to 9 frames, but 2 to 8, not to 5.
VIDEO_VAES = {
    "AutoencoderKLCogVideoX": 2,
    "AutoencoderKLHunyuanVideo": 1,
    "AutoencoderKLHunyuanVideo15": 1,
    "AutoencoderKLLTXVideo": 1,
    "AutoencoderKLMochi": 1,
    "AutoencoderKLWan": 1,
}


class LatentCodec:
    """Encodes, normalises, denormalises and decodes with a VAE of diffusers.

    An image VAE takes images (B, 3, H, W), and clips (B, 3, T, H, W) frame by frame; a video VAE takes clips alone, of
    T = 1 + k * temporal_stride frames, where T = 1 is an image. Clips go through the VAE one at a time, an image VAE's
    in runs of `FRAMES_PER_CALL` frames, so that memory does not grow with the batch, nor a clip depend on the others.

    Every normalisation in diffusers is `model = (stored - mean) / std` per channel; both vectors are read once, here:

    - `latents_mean` and `latents_std` given: exactly those (a pipeline keeps them in `model_index.json` when the VAE
      class has no such fields); a scaling or shift factor in the VAE's config does not apply on top;
    - a VAE with a latent batch norm (AutoencoderKLFlux2): its running statistics, after a pixel-unshuffle that belongs
      to `encode`, so that stored and model latents have one shape;
    - `latents_mean` and `latents_std` in the VAE's config, or among its buffers (AutoencoderKLLTXVideo):
      `std = latents_std / scaling_factor`;
    - else `shift_factor` and `scaling_factor` of the config: `mean = shift`, `std = 1 / scaling`. (CogVideoX's
      `invert_scale_latents` concerns the pictures that one of its models is conditioned on, not the latents.)

    The codec moves nothing between devices, and computes in the VAE's dtype but for the normalisation (float32).

    Args:
        vae: An image VAE of diffusers, or one of `VIDEO_VAES`.
        latents_mean: Mean of the stored latents, C values.
        latents_std: Standard deviation of the stored latents, C values; given with the mean or not at all.

    Raises:
        ValueError: The VAE is not supported, keeps no statistics, contradicts the given ones, or they do not fit its C.
    """

    def __init__(
        self, vae: ModelMixin, latents_mean: Sequence[float] | None = None, latents_std: Sequence[float] | None = None
    ) -> None:
        self.is_video = _is_video(vae)
        self.vae = vae
        self._patch = _patch_size(vae)
        self.stride = _encoder_stride(vae) * self._patch  # pixels per latent cell, height and width
        self.temporal_stride = _temporal_stride(vae) if self.is_video else 1  # frames per latent frame after the first
        self.latent_channels: int = encoder_channels(vae) * self._patch**2
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

    @property
    def has_own_statistics(self) -> bool:
        """Whether the VAE keeps a mean and a standard deviation per channel, which no others may take the place of."""
        return _own_channel_statistics(self.vae) is not None

    def latent_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """Size of the latents of samples of a given size.

        Args:
            size: Pixels (H, W) of an image, or frames and pixels (T, H, W) of a clip.

        Returns:
            (h, w) or (t, h, w).

        Raises:
            ValueError: The VAE takes no such samples.
        """
        return tuple(first + (cells - first) // stride for cells, first, stride in self._axes(size, latent=False))

    def pixel_size(self, size: Sequence[int]) -> tuple[int, ...]:
        """The inverse of `latent_size`.

        Args:
            size: Latent cells (h, w) or (t, h, w).

        Returns:
            (H, W) or (T, H, W).

        Raises:
            ValueError: The VAE gives no such latents.
        """
        return tuple(first + (cells - first) * stride for cells, first, stride in self._axes(size, latent=True))

    def _axes(self, size: Sequence[int], latent: bool) -> Iterator[tuple[int, int, int]]:
        """Check a size in latent cells or in pixels; yield (cells, cells alone in front, stride) of each axis."""
        name, kind = type(self.vae).__name__, "latent " if latent else ""
        if len(size) not in ((3,) if self.is_video else (2, 3)):
            expected = "(T, H, W), T = 1 for an image" if self.is_video else "(H, W), or (T, H, W) of a clip"
            raise ValueError(f"expected a {kind}size {expected}, as {name} takes it, got {tuple(size)}")
        group = VIDEO_VAES[name] if self.is_video else 1
        axes = [("frames", 1, self.temporal_stride, group), ("height", 0, self.stride, 1), ("width", 0, self.stride, 1)]
        for cells, (axis, first, stride, group) in zip(size, axes[-len(size) :], strict=True):
            step = group if latent else group * stride
            if cells < 1 or (cells - first) % step:
                below = first + (cells - first) // step * step
                nearest = " and ".join(str(fit) for fit in (below, below + step) if fit > 0)
                raise ValueError(
                    f"expected {kind}{axis} = {'1 + ' if first else ''}k * {step}, as {name} takes them, got {cells}; "
                    f"nearest: {nearest}"
                )
            yield cells, first, stride

    @torch.no_grad()
    def encode(self, pixels: torch.Tensor) -> torch.Tensor:
        """Encode pixels to stored latents: the posterior's mean, or all there is where the VAE has no posterior.

        Args:
            pixels: (B, 3, H, W) or (B, 3, T, H, W) in [-1, 1], of a size that `latent_size` takes, on the VAE's device.

        Returns:
            Stored latents (B, C, h, w) or (B, C, t, h, w), float32.

        Raises:
            ValueError: Wrong shape, or the VAE's stride is not the one it states.
        """

        def mean(encoded: BaseOutput) -> torch.Tensor:
            if "latent_dist" in encoded:
                return encoded.latent_dist.mean
            # AutoencoderDC says `latent`, AutoencoderTiny and VQModel `latents`
            return encoded.latent if "latent" in encoded else encoded.latents

        return self._encode(pixels, mean)

    @torch.no_grad()
    def encode_posterior(self, pixels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Encode pixels to the posterior of the stored latents, a normal distribution without covariances.

        Args:
            pixels: As for `encode`.

        Returns:
            Mean and standard deviation, each (B, C, h, w) or (B, C, t, h, w), float32.

        Raises:
            ValueError: As for `encode`, or the VAE has no posterior.
        """

        def moments(encoded: BaseOutput) -> torch.Tensor:
            if "latent_dist" not in encoded:
                raise ValueError(f"{type(self.vae).__name__} has no posterior to sample from; set data.posterior: mean")
            return torch.cat([encoded.latent_dist.mean, encoded.latent_dist.std], dim=1)

        mean, std = self._encode(pixels, moments).chunk(2, dim=1)
        return mean, std

    def _encode(self, pixels: torch.Tensor, read: Callable[[BaseOutput], torch.Tensor]) -> torch.Tensor:
        """What `read` takes from the encoder's output, (B, one or several times C, h, w) or (B, ..., t, h, w)."""
        if pixels.ndim not in (4, 5) or pixels.shape[1] != 3:
            raise ValueError(f"expected pixels (B, 3, H, W) or (B, 3, T, H, W), got {tuple(pixels.shape)}")
        size = self.latent_size(pixels.shape[2:])

        def encode(batch: torch.Tensor) -> torch.Tensor:
            latents = read(self.vae.encode(batch.to(self.vae.dtype)))
            return F.pixel_unshuffle(latents.contiguous(), self._patch).float()  # Mochi's are not

        return self._checked(self._call_by_call(encode, pixels), size, pixels)

    @torch.no_grad()
    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Decode model latents to pixels.

        Args:
            latents: Model latents (B, C, h, w) or (B, C, t, h, w), on the VAE's device.

        Returns:
            Pixels (B, 3, H, W) or (B, 3, T, H, W) of `pixel_size`, about [-1, 1] (not clipped by us), float32.

        Raises:
            ValueError: Wrong shape, the VAE's stride is not the one it states, or a latent is NaN or infinite, which
                would decode to a black picture.
        """
        channels = self.latent_channels
        if latents.ndim not in (4, 5) or latents.shape[1] != channels:
            shapes = f"(B, {channels}, h, w) or (B, {channels}, t, h, w)"
            raise ValueError(f"expected latents {shapes}, got {tuple(latents.shape)}")
        size = self.pixel_size(latents.shape[2:])
        finite = latents.isfinite().flatten(1).all(dim=1)
        if not finite.all():
            broken = (~finite).nonzero().flatten().tolist()
            raise ValueError(f"expected finite latents, got NaN or infinity in samples {broken} of {len(latents)}")

        def decode(batch: torch.Tensor) -> torch.Tensor:
            stored = F.pixel_shuffle(batch, self._patch).to(self.vae.dtype)
            if self.vae.config.get("timestep_conditioning"):  # LTX 0.9.5: time 0, the default of diffusers' pipeline
                return self.vae.decode(stored, stored.new_zeros(len(stored))).sample.float()
            return self.vae.decode(stored).sample.float()

        return self._checked(self._call_by_call(decode, self.denormalize(latents)), size, latents)

    def _call_by_call(self, function: Callable[[torch.Tensor], torch.Tensor], batch: torch.Tensor) -> torch.Tensor:
        """Apply one call of the VAE to a batch: to images at once, to clips one by one (see the class)."""
        if batch.ndim == 4:
            return function(batch)
        if self.is_video:
            return torch.cat([function(clip) for clip in batch.split(1)])
        clips = []
        for clip in batch:  # (C, T, H, W)
            frames = clip.transpose(0, 1).split(FRAMES_PER_CALL)  # (<= FRAMES_PER_CALL, C, H, W) each
            clips.append(torch.cat([function(part) for part in frames]).transpose(0, 1))
        return torch.stack(clips)

    def _checked(self, result: torch.Tensor, size: tuple[int, ...], given: torch.Tensor) -> torch.Tensor:
        """The result, unless the VAE's config states a stride that its layers do not have."""
        if tuple(result.shape[2:]) != size:
            raise ValueError(
                f"{type(self.vae).__name__} states a stride of {self.stride} in space and {self.temporal_stride} in "
                f"time, so that {tuple(given.shape[2:])} should become {size}, but its layers gave "
                f"{tuple(result.shape[2:])}; correct its config"
            )
        return result

    def normalize(self, stored: torch.Tensor) -> torch.Tensor:
        """Stored latents to model latents, (B, C, ...) each: `(stored - mean) / std`."""
        return (stored - _on(self.mean, stored)) / _on(self.std, stored)

    def denormalize(self, latents: torch.Tensor) -> torch.Tensor:
        """Model latents to stored latents, (B, C, ...) each: `latents * std + mean`."""
        return latents * _on(self.std, latents) + _on(self.mean, latents)

    def stored_fingerprint(self) -> str:
        """Identify all that decides the stored latents: VAE class, weights and the folding of latent patches.

        The config is left out on purpose: a new diffusers release adds fields to it without changing a latent. Of it
        counts what changes latents and no weight: whether an encoder that can be either is causal (LTX).

        Returns:
            A sha256 in hex. Of the weights as loaded: the same VAE in another dtype has another one.
        """
        digest = hashlib.sha256(f"{type(self.vae).__name__} {self._patch}".encode())
        if "encoder_causal" in self.vae.config:
            digest.update(f" encoder_causal {self.vae.config.encoder_causal} ".encode())
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


def encoder_channels(vae: ModelMixin) -> int:
    """Channels of a VAE's own latents, for which it keeps statistics; AutoencoderKLWan calls them z_dim.

    Args:
        vae: As for `LatentCodec`.

    Returns:
        How many there are; `LatentCodec.latent_channels` are more where latent patches are folded into channels.
    """
    return int(vae.config.z_dim if "z_dim" in vae.config else vae.config.latent_channels)


def _on(values: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Per-channel values (C,) as (C, 1, ...) on the device of `like`, (B, C, ...)."""
    return values.to(like.device).reshape(-1, *[1] * (like.ndim - 2))


def _is_video(vae: ModelMixin) -> bool:
    """Whether the VAE takes clips alone; a ValueError if it does, but not as we can use it."""
    if not any(isinstance(module, torch.nn.Conv3d) for module in vae.modules()):
        return False
    name = type(vae).__name__
    if name not in VIDEO_VAES:
        # Among them: no stated stride or first frame alone (Allegro, Magvit), statistics per frame (Cosmos).
        raise ValueError(f"expected an image VAE, or a video VAE out of {', '.join(VIDEO_VAES)}, got {name}")
    if any(vae.config.get("decoder_inject_noise") or ()):
        raise ValueError(
            f"this {name} adds random noise while it decodes (decoder_inject_noise), so that a clip would not depend "
            "on its seed alone; take one that does not"
        )
    return True


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


def _temporal_stride(vae: ModelMixin) -> int:
    """Frames per latent frame after the first, as the video VAE states it."""
    if "scale_factor_temporal" in vae.config:  # AutoencoderKLWan
        return int(vae.config.scale_factor_temporal)
    return int(vars(vae).get("temporal_compression_ratio", vae.config.get("temporal_compression_ratio")))


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
    channels = encoder_channels(vae)
    return [vae.config.get("shift_factor") or 0.0] * channels, [1.0 / scale] * channels


def _own_channel_statistics(vae: ModelMixin) -> tuple[list[float], list[float]] | None:
    """Per-channel mean and standard deviation that the VAE itself keeps, or None."""
    config = vae.config
    if "batch_norm_eps" in config:
        std = (vae.bn.running_var.float() + config.batch_norm_eps).sqrt()
        return vae.bn.running_mean.float().tolist(), std.tolist()
    mean, std = config.get("latents_mean"), config.get("latents_std")
    buffers = dict(vae.named_buffers(recurse=False))
    if "latents_mean" in buffers:
        mean, std = (buffers[name].float().tolist() for name in ("latents_mean", "latents_std"))
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise ValueError(f"expected latents_mean and latents_std together in the VAE's config, got {mean} and {std}")
    scale = config.get("scaling_factor") or 1.0
    return list(mean), [value / scale for value in std]
