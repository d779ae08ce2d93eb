"""Depthwise convolution on channels-last grids of rank 1 to 3; knows nothing of windows or attention.

Every rank runs on torch's 2-D depthwise kernel, fed a channels-last view, so that no axis is ever moved in memory. A
3-D kernel is the sum of its temporal taps, each a 2-D convolution of all frames at once, shifted in time: torch's own
depthwise conv3d takes three times as long (docs/performance.md), and shifted inputs would be kept for the gradient.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import nn

from .windows import MAX_RANK, per_axis


class DepthwiseConv(nn.Module):
    """Depthwise convolution with zero padding, stride 1 and bias, (B, *S, C) -> (B, *S, C).

    In space the kernel is centred. In time (the first axis of a 3-D grid) it is causal by default: K - 1 zero frames
    stand in front and none behind, so that a frame never sees a later one (the published Iwin 3D block; arXiv
    2507.18405).

    Args:
        dim: Channels C.
        kernel_size: Kernel length per axis, or one int per axis of `rank`; odd on centred axes.
        rank: Number of grid axes, 1 to 3.
        causal: Whether a 3-D kernel is causal in time; otherwise it is centred there too. Grids without time have no
            causal axis.

    Raises:
        ValueError: If a kernel length is even on a centred axis, or the kernel does not fit the rank.
    """

    def __init__(self, dim: int, kernel_size: int | Sequence[int] = 3, rank: int = 2, causal: bool = True) -> None:
        super().__init__()
        if not 1 <= rank <= MAX_RANK:
            raise ValueError(f"rank must be 1 to {MAX_RANK}, got {rank}")
        self.kernel_size = per_axis(kernel_size, rank, "kernel_size")
        self.causal = causal
        centred = self.kernel_size[-2:] if causal else self.kernel_size
        if any(k < 1 for k in self.kernel_size) or any(k % 2 == 0 for k in centred):
            where = "in space" if causal else "on every axis, as the convolution is centred in time too"
            raise ValueError(f"kernel lengths must be positive, and odd {where}, got {self.kernel_size}")
        self.weight = nn.Parameter(torch.empty(dim, 1, *self.kernel_size))
        self.bias = nn.Parameter(torch.empty(dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform with the fans of a depthwise kernel: fan in = fan out = its K taps, not K times the width.

        torch counts C * K taps as the fan out of a (C, 1, K, K) weight; the published code used that and started its
        convolutions some 20 times too small.
        """
        bound = math.sqrt(3.0 / math.prod(self.kernel_size))
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.zeros_(self.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve every channel on its own.

        Args:
            x: (B, *S, C), channels last, with the rank given at construction.

        Returns:
            (B, *S, C).

        Raises:
            ValueError: If x has another rank.
        """
        rank = len(self.kernel_size)
        if x.ndim != rank + 2:
            raise ValueError(f"expected (B, *S, C) with {rank} grid axes, got shape {tuple(x.shape)}")
        # Through this view the gradient gets the weight's own strides; the convolution's has those of channels_last,
        # which data-parallel training would copy at every step.
        weight = self.weight.flatten(1).unflatten(1, (1, *self.kernel_size))
        if rank == 1:
            return self._conv2d(x[:, None], weight[:, :, None], self.bias)[:, 0]
        if rank == 2:
            return self._conv2d(x, weight, self.bias)
        return self._conv3d(x, weight)

    @property
    def own_tap(self) -> int:
        """Index of the temporal tap that reads the frame itself: the last one if causal, else the middle one."""
        return self.kernel_size[0] - 1 if self.causal else self.kernel_size[0] // 2

    def _conv3d(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        frames, images = x.shape[1], x.flatten(0, 1)
        taps = weight.unbind(2)  # (C, 1, K, K) each
        y = self._conv2d(images, taps[self.own_tap], self.bias).unflatten(0, x.shape[:2])
        for step, tap in enumerate(taps, start=-self.own_tap):  # frame t reads frame t + step through this tap
            if step and abs(step) < frames:  # a tap that reaches further reads only the zero frames outside
                sums = self._conv2d(images, tap, None).unflatten(0, x.shape[:2])
                y = y + F.pad(sums, (0, 0, 0, 0, 0, 0, -step, step))  # shifted in time: negative padding crops
        return y

    @staticmethod
    def _conv2d(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        padding = (weight.shape[-2] // 2, weight.shape[-1] // 2)
        y = F.conv2d(x.permute(0, 3, 1, 2), weight, bias, padding=padding, groups=x.shape[-1])  # channels_last, no copy
        return y.permute(0, 2, 3, 1)

    def extra_repr(self) -> str:
        """Show width and kernel in the module's printout."""
        time = f", causal={self.causal}" if len(self.kernel_size) == MAX_RANK else ""
        return f"{self.weight.shape[0]}, kernel_size={self.kernel_size}{time}"
