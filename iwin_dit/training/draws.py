"""The random numbers of training: noise, times and label dropout, each a pure function of (seed, global position).

A sample's position counts all samples of the run, over processes and micro-batches, so its numbers depend on neither,
and a resumed run draws what an uninterrupted one would.
"""

from collections.abc import Sequence

import numpy as np
import torch

VALIDATION_STREAM = 1 << 63  # positions from here on belong to validation, which training never reaches


def keyed_draws(
    seed: int, positions: Sequence[int] | np.ndarray, shape: Sequence[int]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draw the random numbers of some samples from a counter-based generator (Philox) keyed by (seed, position).

    Args:
        seed: Of the run.
        positions: B global sample positions.
        shape: Of one sample's latents.

    Returns:
        Noise (B, *shape), standard normal; (B,) uniforms in (0, 1) for the time; (B,) uniforms for label dropout; all
        float32 on the CPU.
    """
    noise = np.empty((len(positions), *shape), dtype=np.float32)
    uniforms = np.empty((len(positions), 2))
    for row, position in enumerate(positions):
        generator = np.random.Generator(np.random.Philox(key=[seed, int(position)]))
        uniforms[row] = generator.random(2)
        generator.standard_normal(out=noise[row], dtype=np.float32)
    # Strictly inside (0, 1) in float32 as well, so that the logit of a time is finite.
    times, drops = torch.from_numpy(uniforms).clamp(1e-7, 1 - 1e-7).float().unbind(1)
    return torch.from_numpy(noise), times, drops
