"""What several test files share: tiny real components, the error measure, the frames of a clip, code
blocks of a page."""

import itertools
import re
from pathlib import Path

import numpy as np
import torch
from diffusers import AutoencoderKL

from iwin_dit import IwinDiTTransformer2DModel, IwinDiTTransformer3DModel
from iwin_dit.data.videos import decode_frames


def relative_error(a: torch.Tensor, b: torch.Tensor) -> float:
    """max |a - b| / max |b|."""
    return ((a - b).abs().max() / b.abs().max()).item()


def all_frames(path: Path) -> np.ndarray:
    """All frames (T, H, W, 3) of a clip."""
    return np.stack(list(decode_frames(path, itertools.count())))


def tiny_model(**overrides) -> IwinDiTTransformer2DModel:
    """A model of 2 blocks on 8 x 8 latents, every weight random so that no branch is silent."""
    torch.manual_seed(0)
    arguments = {
        "sample_size": 8,
        "patch_size": 1,
        "in_channels": 4,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_classes": 10,
    }
    return _randomised(IwinDiTTransformer2DModel(**{**arguments, **overrides}))


def tiny_video_model(**overrides) -> IwinDiTTransformer3DModel:
    """A model of 2 blocks on 4 frames of 6 x 6 latents, every weight random so that no branch is silent."""
    torch.manual_seed(0)
    arguments = {
        "sample_size": (4, 6, 6),
        "patch_size": 1,
        "in_channels": 4,
        "num_layers": 2,
        "num_attention_heads": 2,
        "attention_head_dim": 8,
        "num_classes": 10,
    }
    return _randomised(IwinDiTTransformer3DModel(**{**arguments, **overrides}))


def _randomised(model):
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def tiny_vae(**overrides) -> AutoencoderKL:
    """A random AutoencoderKL of stride 2 with 4 latent channels."""
    torch.manual_seed(1)
    arguments = {
        "block_out_channels": (8, 8),
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "latent_channels": 4,
        "norm_num_groups": 4,
        "mid_block_add_attention": False,
        "sample_size": 16,
    }
    return AutoencoderKL(**{**arguments, **overrides}).eval()


def fenced(page: Path, language: str) -> str:
    """All code blocks of one language in a Markdown page, in order."""
    return "\n".join(re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL))
