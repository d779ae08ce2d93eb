"""What enters and leaves the token grid: patches, diffusion time, class labels, positions.

Knows nothing of attention or blocks. Letters: windows.py; here P is the patch length on an axis.
"""

import math
from collections.abc import Sequence

import torch
from torch import nn

from .windows import per_axis


def patchify(x: torch.Tensor, patch_size: int | Sequence[int]) -> torch.Tensor:
    """Fold every patch into the channels of one token.

    2-D: (B, C, H * P, W * P) is read as (B, C, H, P, W, P) and permuted to (B, H, W, P, P, C).

    Args:
        x: (B, C, *S * P), channels first.
        patch_size: P for every axis or per axis.

    Returns:
        (B, *S, prod(P) * C), the channel index running fastest.

    Raises:
        ValueError: If an axis is not a multiple of its patch.
    """
    batch, channels, *size = x.shape
    patch = per_axis(patch_size, len(size), "patch_size")
    if any(n % p for n, p in zip(size, patch, strict=True)):
        raise ValueError(f"patch_size {patch} must divide the latent size, got {tuple(size)}")
    digits = [d for n, p in zip(size, patch, strict=True) for d in (n // p, p)]
    x = x.reshape(batch, channels, *digits)
    grid_axes, patch_axes = range(2, x.ndim, 2), range(3, x.ndim, 2)
    return x.permute(0, *grid_axes, *patch_axes, 1).flatten(len(size) + 1)


def unpatchify(x: torch.Tensor, patch_size: int | Sequence[int]) -> torch.Tensor:
    """Unfold every token into its patch: the inverse of `patchify`, bit for bit.

    2-D: (B, H, W, P * P * C) is read as (B, H, W, P, P, C) and permuted to (B, C, H, P, W, P).

    Args:
        x: (B, *S, prod(P) * C), the channel index running fastest.
        patch_size: P for every axis or per axis.

    Returns:
        (B, C, *S * P), channels first, contiguous.

    Raises:
        ValueError: If prod(P) does not divide the channels.
    """
    batch, *grid, width = x.shape
    rank = len(grid)
    patch = per_axis(patch_size, rank, "patch_size")
    if width % math.prod(patch):
        raise ValueError(f"the patch {patch} must divide the channels of a token, got {width}")
    x = x.unflatten(-1, (*patch, width // math.prod(patch)))  # (B, *S, *P, C)
    x = x.permute(0, 2 * rank + 1, *(axis for i in range(rank) for axis in (1 + i, 1 + rank + i)))
    return x.reshape(batch, -1, *(n * p for n, p in zip(grid, patch, strict=True))).contiguous()


def timestep_features(timestep: torch.Tensor, dim: int, max_period: float = 10_000.0) -> torch.Tensor:
    """Sinusoidal features of a scalar (arXiv 1706.03762, section 3.5): cosines, then sines.

    Args:
        timestep: (B,) any real number.
        dim: Number of features, even.
        max_period: The longest period is 2 pi times this.

    Returns:
        (B, dim), in float32 (float64 where `timestep` is float64).
    """
    timestep = timestep.to(torch.promote_types(timestep.dtype, torch.float32))
    exponent = torch.arange(dim // 2, dtype=timestep.dtype, device=timestep.device) / (dim // 2)
    angles = timestep[:, None] * torch.exp(-math.log(max_period) * exponent)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class TimestepEmbedding(nn.Module):
    """Embed diffusion time: sinusoidal features, then Linear, SiLU, Linear (DiT, arXiv 2212.09748).

    Args:
        dim: Channels C of the embedding.
        frequency_dim: Number of sinusoidal features.
        scale: Factor on the timestep before the features are taken. 1 is DiT's choice for timesteps up to 1000; 1e-3
            is that of FlashDiT and LightningDiT, whose time lives in [0, 1].
    """

    def __init__(self, dim: int, frequency_dim: int = 256, scale: float = 1.0) -> None:
        super().__init__()
        self.frequency_dim = frequency_dim
        self.scale = scale
        self.linear_1 = nn.Linear(frequency_dim, dim)
        self.act = nn.SiLU()
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, timestep: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Embed one timestep per sample.

        Args:
            timestep: (B,) in [0, 1000], 1000 = pure noise.
            dtype: Of the result; the features themselves are taken in float32 or better.

        Returns:
            (B, C).
        """
        timestep = timestep.to(torch.promote_types(dtype, torch.float32))
        features = timestep_features(timestep * self.scale, self.frequency_dim)
        return self.linear_2(self.act(self.linear_1(features.to(dtype))))


def drop_labels(class_labels: torch.Tensor, null_class: int, probability: float, uniform: torch.Tensor) -> torch.Tensor:
    """Replace labels by the null class, each with the given probability (classifier-free guidance, arXiv 2207.12598).

    Args:
        class_labels: (B,) integers.
        null_class: The label that stands for "no class".
        probability: In [0, 1].
        uniform: (B,) numbers in [0, 1), drawn by the caller, whose generator thus decides.

    Returns:
        (B,) integers.
    """
    return torch.where(uniform < probability, null_class, class_labels)


def sincos_positions(
    grid: Sequence[int], base_grid: Sequence[int], dim: int, device: torch.device | None = None
) -> torch.Tensor:
    """Fixed sine-cosine position embedding, an equal share of channels per axis (DiT, arXiv 2212.09748).

    Args:
        grid: Axis lengths N of the result.
        base_grid: Axis lengths the model was built for: positions run over it whatever the grid, so that another size
            interpolates.
        dim: Channels C, a multiple of twice the rank.
        device: Where the result is made.

    Returns:
        (*S, C) in float32.
    """
    share = dim // len(grid)
    features = []
    for axis, (n, base) in enumerate(zip(grid, base_grid, strict=True)):
        position = torch.arange(n, dtype=torch.float32, device=device) * (base / n)
        shape = [1] * len(grid) + [share]
        shape[axis] = n
        features.append(timestep_features(position, share).view(shape).expand(*grid, share))
    return torch.cat(features, dim=-1)
