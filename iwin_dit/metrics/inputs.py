"""What every network does before it runs: refuse what is no batch of uint8 images, and make float32 mean float32.

Must not know a particular network.

Letters: B batch, T frames, H W image axes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def expect_images(images: Tensor) -> None:
    """Refuse a batch that is not uint8 `(B, 3, H, W)`.

    Args:
        images: The batch.

    Raises:
        ValueError: If it is anything else, such as floats, on whose scaling and rounding a number would depend.
    """
    if images.dtype != torch.uint8 or images.dim() != 4 or images.shape[1] != 3:
        raise ValueError(f"expected uint8 images (B, 3, H, W), got {images.dtype} {tuple(images.shape)}")


def expect_clips(clips: Tensor) -> None:
    """Refuse a batch that is not uint8 `(B, T, 3, H, W)`.

    Args:
        clips: The batch.

    Raises:
        ValueError: If it is anything else.
    """
    if clips.dtype != torch.uint8 or clips.dim() != 5 or clips.shape[2] != 3:
        raise ValueError(f"expected uint8 clips (B, T, 3, H, W), got {clips.dtype} {tuple(clips.shape)}")


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Run without gradients, autocast and TF32, whatever the caller has switched on.

    TF32 is cuDNN's default for convolutions; with it the features of an image depend on the batch it is in.

    Args:
        device: Where the network runs.
    """
    cudnn: Any = torch.backends.cudnn
    mkldnn: Any = torch.backends.mkldnn
    flags = cudnn.conv, torch.backends.cuda.matmul, mkldnn.conv, mkldnn.matmul
    before = [flag.fp32_precision for flag in flags]
    try:
        for flag in flags:
            flag.fp32_precision = "ieee"
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            yield
    finally:
        for flag, precision in zip(flags, before, strict=True):
            flag.fp32_precision = precision
