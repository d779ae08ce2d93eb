"""The random numbers of training, each a pure function of (seed, global position): noise, times, label drop, flips.

A sample's position counts all samples of the run, over processes and micro-batches, so its numbers depend on neither,
and a resumed run draws what an uninterrupted one would.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

VALIDATION_STREAM = 1 << 63  # positions from here on belong to validation, which training never reaches
STEP_STREAM = 1 << 62  # likewise to whole steps


class Draws(NamedTuple):
    """Random numbers of B samples, on the CPU.

    `noise` and `posterior` are (B, *shape) standard normal, `posterior` None where it was not asked for; `times`,
    `drops` and `frames` (B,) uniforms in (0, 1) that decide the noise level, whether the label is dropped, and which
    frame of a clip a step on single frames takes; `flips` (B,) booleans.
    """

    noise: torch.Tensor
    posterior: torch.Tensor | None
    times: torch.Tensor
    drops: torch.Tensor
    flips: torch.Tensor
    frames: torch.Tensor


def is_image_step(seed: int, step: int, share: float) -> bool:
    """Decide whether a step of a video run trains on single frames, by (seed, step) alone.

    Args:
        seed: Of the run.
        step: Optimizer steps done before it.
        share: Of the steps that do, in [0, 1].

    Returns:
        Whether it does.
    """
    key = np.array([seed, STEP_STREAM + step], dtype=np.uint64)
    return np.random.Generator(np.random.Philox(key=key)).random() < share


def keyed_draws(
    seed: int, positions: Sequence[int] | np.ndarray, shape: Sequence[int], posterior: bool = False
) -> Draws:
    """Draw the random numbers of some samples from a counter-based generator (Philox) keyed by (seed, position).

    Args:
        seed: Of the run.
        positions: B global sample positions.
        shape: Of one sample's latents.
        posterior: Draw the noise of the VAE's posterior too.

    Returns:
        The numbers, float32.
    """
    normals = np.empty((1 + posterior, len(positions), *shape), dtype=np.float32)
    uniforms = np.empty((len(positions), 4))
    for row, position in enumerate(positions):
        # An array, for a list of Python integers becomes float64 from 2**63 on, where neighbours are one number.
        key = np.array([seed, position], dtype=np.uint64)
        generator = np.random.Generator(np.random.Philox(key=key))
        uniforms[row, :3] = generator.random(3)
        for kind in normals:
            generator.standard_normal(out=kind[row], dtype=np.float32)
        uniforms[row, 3] = generator.random()  # last, so that the others are what they were before there were clips
    noise, *extra = torch.from_numpy(normals)
    # Strictly inside (0, 1) in float32 as well, so that the logit of a time is finite.
    times, drops, flips, frames = torch.from_numpy(uniforms).clamp(1e-7, 1 - 1e-7).float().unbind(1)
    return Draws(noise, extra[0] if extra else None, times, drops, flips < 0.5, frames)
