"""Frechet distance between two Gaussians.

Must not know the network whose features they are of, nor where they come from.

Letters: D features, m mean, S covariance.
"""

import torch

from .moments import Gaussian, is_finite

_BLOCK = 256  # rows of a product at a time


def frechet_distance(real: Gaussian, fake: Gaussian) -> float:
    """Squared Frechet distance (Heusel et al. 2017, eq. 6): `|m1 - m2|^2 + tr(S1 + S2 - 2 (S1 S2)^(1/2))`.

    `S1 S2` has the eigenvalues of the symmetric `S1^(1/2) S2 S1^(1/2)`, so that two symmetric eigendecompositions in
    float64 are enough: no square root of a general matrix, whose result may be complex or not come at all.

    The raw value is returned. Two identical sets may come out slightly negative, in [-1e-3, 0) for features of common
    scale: where a covariance is singular, an eigenvalue of 0 is computed as about 1e-16 of the largest, and its root,
    1e-8, is subtracted once for every such direction. A report clamps at 0 and keeps this value beside it.

    Memory above that of the arguments: 3 D^2 * 8 bytes at the peak, which is LAPACK's eigendecomposition of S1.

    Args:
        real: Mean and covariance of the reference.
        fake: Of the generated images; the distance is symmetric but for rounding.

    Returns:
        The distance.

    Raises:
        ValueError: The sizes differ, or a number is not finite.
    """
    shapes = [tuple(tensor.shape) for side in (real, fake) for tensor in (side.mean, side.covariance)]
    D = len(real.mean)
    if shapes != [(D,), (D, D)] * 2:
        raise ValueError(f"expected mean (D,) and covariance (D, D) of the same D on both sides, got {shapes}")
    for name, side in (("real", real), ("generated", fake)):  # LAPACK may not return from NaN
        if not (is_finite(side.mean) and is_finite(side.covariance)):
            raise ValueError(f"the statistics of the {name} images are not all finite; no distance exists")
    m1, S1, m2, S2 = (tensor.double().cpu() for tensor in (real.mean, real.covariance, fake.mean, fake.covariance))
    values, root = torch.linalg.eigh(S1)
    root *= values.clamp(min=0).sqrt()  # root root^T = S1; the rotation from here to S1^(1/2) changes no eigenvalue
    product = root.T @ S2
    for rows in product.split(_BLOCK):
        rows.copy_(rows @ root)  # product becomes root^T S2 root in place
    del root
    cross = torch.linalg.eigvalsh(product).clamp(min=0).sqrt().sum()
    return ((m1 - m2).square().sum() + S1.trace() + S2.trace() - 2 * cross).item()
