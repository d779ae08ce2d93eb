"""The built-in data set, scikit-learn's handwritten digits, and the small VAE that is trained on them in place.

The only file that imports scikit-learn (extra `digits`). Knows nothing of stored latents, models or training runs.
"""

import logging
import math
from collections.abc import Iterator
from functools import partial
from typing import Protocol

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL
from PIL import Image
from tqdm import tqdm

from .sources import Item, choose_class_names, count_parts, split_indices

logger = logging.getLogger(__name__)

DIGIT_NAMES = tuple("0123456789")
MIN_PSNR = 28.0  # dB, mean over held-out frames; below it samples are judged by the VAE's faults
_BATCH_SIZE = 32
_JUDGED = 2048  # frames at most that tell statistics and PSNR
_LEARNING_RATE = 4e-3
# Weight of the KL term (nats per latent element) against the squared error of pixels in [-1, 1]. It leaves posterior
# noise of 0.1 to 0.4 of a channel's deviation, so the decoder forgives the errors of a diffusion model; from 1e-3 on, a
# channel sinks below its own noise.
_KL_WEIGHT = 3e-4


class Digits:
    """The 1,797 digits of scikit-learn (8x8, 16 grey levels) as an `ImageSource` of 32x32 RGB images.

    Bright strokes on black: 255 * value / 16, enlarged bicubically, clipped to 0..255 and rounded. Unlike other sources
    it is also a sequence of uint8 tensors (3, 32, 32), with `labels` beside it.

    Args:
        part_size: Images per part; the last part holds the rest.
        class_names: Names by label; by default "0" to "9".

    Raises:
        ImportError: scikit-learn is not installed.
        ValueError: `class_names` are not ten.
    """

    def __init__(self, part_size: int = 1797, class_names: tuple[str, ...] | None = None) -> None:
        self.description = "digits"
        self.fingerprint = "scikit-learn's digits, which never change"
        self.num_ignored = 0
        self.resolution = 32
        self.class_names = choose_class_names(class_names, DIGIT_NAMES, self.description)
        self._grey, self.labels = load_digits(self.resolution)  # (1797, 32, 32) uint8
        self._part_size = part_size
        self.num_parts = count_parts(len(self.labels), part_size)

    def __len__(self) -> int:
        return len(self._grey)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self._grey[index].expand(3, -1, -1).clone()

    def items(self, part: int) -> Iterator[Item]:
        """Yield the images of one part, in scikit-learn's order."""
        for index in range(len(self))[part * self._part_size : (part + 1) * self._part_size]:
            yield Item.of_one(f"digits[{index}]", self.labels[index], partial(_read, self._grey[index]))


def _read(grey: torch.Tensor) -> Image.Image:
    """One digit, uint8 (32, 32), as an RGB image."""
    return Image.fromarray(grey.numpy()).convert("RGB")


def load_digits(side: int) -> tuple[torch.Tensor, list[int]]:
    """Load scikit-learn's digits, enlarged.

    Args:
        side: Of the images, in pixels.

    Returns:
        Images (1797, side, side), grey, uint8, as `Digits` says, and their classes, 0 to 9.

    Raises:
        ImportError: scikit-learn is not installed.
    """
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError('the digits need scikit-learn: pip install "iwin-dit[digits]"') from error
    data = datasets.load_digits()
    return torch.stack([_enlarge(values, side) for values in data.images]), data.target.tolist()


def _enlarge(values: np.ndarray, side: int) -> torch.Tensor:
    """One digit (8, 8) with values 0 to 16 as a uint8 image (side, side)."""
    grey = Image.fromarray((255 * values / 16).astype(np.float32))
    pixels = np.asarray(grey.resize((side, side), Image.Resampling.BICUBIC))
    return torch.from_numpy(pixels.clip(0, 255).round().astype(np.uint8))


class FrameSet(Protocol):
    """Labelled samples of 32x32 frames: sample i is uint8 (3, 32, 32), or a clip (T, 3, 32, 32)."""

    @property
    def labels(self) -> list[int]:
        """Class of every sample."""

    def __getitem__(self, index: int) -> torch.Tensor:
        """One sample."""


def train_digits_vae(digits: FrameSet, holdout: float | int, seed: int, steps: int = 250) -> AutoencoderKL:
    """Train the small VAE of the digits on the CPU, 32x32 pixels to 4 x 8 x 8 latents: 250 steps in 20 s on two cores.

    Its loss is squared error plus a small KL term. It sees the training samples of `split_indices` alone. Statistics of
    their latents go into its config (`latents_mean`, `latents_std`), where `LatentCodec` finds them.

    Args:
        digits: The data set; of clips, every frame counts as an image.
        holdout: Held-out samples, as for `split_indices`; those of the latents must be the same.
        seed: Key of the split, the initialisation, the batches and the noise; the global generator is left alone.
        steps: Optimizer steps.

    Returns:
        The VAE, float32, in evaluation mode.

    Raises:
        ValueError: Held-out frames (those of training, where none are held out) come back with less than 28 dB.
    """
    train_indices, val_indices = split_indices(digits.labels, holdout, seed)
    if not len(val_indices):
        val_indices = train_indices  # nothing was held out to judge it by
    train, val = (_frames(digits, indices) for indices in (train_indices, val_indices))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        vae = _build_vae()
        _fit(vae, train, steps)
    vae.eval().requires_grad_(False)
    means = torch.cat([vae.encode(batch).latent_dist.mode() for batch in _pixel_batches(train)])  # (N, 4, 8, 8)
    std, mean = torch.std_mean(means, dim=(0, 2, 3))
    vae.register_to_config(latents_mean=mean.tolist(), latents_std=std.tolist())
    psnr = _reconstruction_psnr(vae, val)
    if psnr < MIN_PSNR:
        raise ValueError(f"the digits VAE reconstructs held-out frames at {psnr:.1f} dB, expected {MIN_PSNR} or more")
    logger.info(
        "digits VAE: %.1f dB PSNR on held-out frames (%d steps, %d threads)", psnr, steps, torch.get_num_threads()
    )
    return vae


def _frames(digits: FrameSet, indices: np.ndarray) -> torch.Tensor:
    """The frames (N, 3, 32, 32) uint8 of the samples of `indices`."""
    return torch.cat([digits[i].reshape(-1, 3, 32, 32) for i in indices.tolist()])


def _to_pixels(frames: torch.Tensor) -> torch.Tensor:
    """Uint8 as what a VAE takes, float32 in [-1, 1]."""
    return frames / 127.5 - 1


def _pixel_batches(frames: torch.Tensor) -> Iterator[torch.Tensor]:
    """Pixels of frames (N, 3, 32, 32) uint8 in batches; of too many, evenly spaced ones."""
    for batch in frames[:: -(-len(frames) // _JUDGED)].split(256):
        yield _to_pixels(batch)


def _build_vae() -> AutoencoderKL:
    """A VAE of 0.23M parameters, stride 4, 4 latent channels, drawn from the global generator."""
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=8,
        sample_size=32,
        scaling_factor=1.0,
        force_upcast=False,
        mid_block_add_attention=False,
    )


def _fit(vae: AutoencoderKL, frames: torch.Tensor, steps: int) -> None:
    """Train in place on `frames` (N, 3, 32, 32) uint8, drawing from the global generator."""
    optimizer = torch.optim.AdamW(vae.parameters(), lr=_LEARNING_RATE, betas=(0.9, 0.99))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, _LEARNING_RATE, total_steps=steps, pct_start=0.1)
    for _ in (bar := tqdm(range(steps), desc="digits VAE", unit="step")):
        batch = _to_pixels(frames[torch.randint(len(frames), (_BATCH_SIZE,))])
        posterior = vae.encode(batch).latent_dist
        error = F.mse_loss(vae.decode(posterior.sample()).sample, batch)
        kl = posterior.kl().sum() / posterior.mean.numel()
        optimizer.zero_grad()
        (error + _KL_WEIGHT * kl).backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        bar.set_postfix(mse=f"{error.item():.4f}", refresh=False)


def _reconstruction_psnr(vae: AutoencoderKL, frames: torch.Tensor) -> float:
    """Mean over frames (N, 3, 32, 32) uint8 of the PSNR in dB, peak to peak 2, decoded from the posterior mean."""
    errors = []  # per frame
    for batch in _pixel_batches(frames):
        decoded = vae.decode(vae.encode(batch).latent_dist.mode()).sample.clamp(-1, 1)
        errors.append((decoded - batch).square().mean(dim=(1, 2, 3)))
    return (10 * (math.log10(4) - torch.cat(errors).log10())).mean().item()
