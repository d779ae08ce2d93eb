"""Frechet distance between two sets of images, in the feature space of a frozen network.

Owns what a feature network must offer, the streaming statistics (torchmetrics, float64, summed over processes) and the
reading of ADM reference files. Must not know a particular network, where images come from, or how results are stored.

Letters: B batch, C channels, H W image axes, D features.
"""

import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


class FeatureNetwork(nn.Module):
    """A frozen network that images are compared in: uint8 `(B, 3, H, W)` to features `(B, D)`.

    Attributes:
        num_features: D.
    """

    num_features: int

    def metric_name(self, n_fake: int) -> str:
        """Name under which a distance in these features may be reported.

        Args:
            n_fake: Number of generated images.

        Returns:
            The name.
        """
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Everything about the features that a number depends on, ready for JSON."""
        raise NotImplementedError


@dataclass(frozen=True)
class FeatureStatistics:
    """Mean and unbiased covariance of a set of feature vectors.

    Attributes:
        mean: `(D,)` float64.
        covariance: `(D, D)` float64.
    """

    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True)
class FrechetResult:
    """A Frechet distance and the sample counts behind it.

    Attributes:
        value: The distance, never negative.
        raw: What the formula gave. Rounding makes it slightly negative for identical sets.
        n_real: Reference images seen, or None where the reference came as statistics.
        n_fake: Generated images seen.
    """

    value: float
    raw: float
    n_real: int | None
    n_fake: int


class FrechetDistance:
    """Streaming Frechet distance (Heusel et al. 2017, eq. 6) between real and generated images.

    Memory does not grow with the number of images. In a distributed run every process updates with its own images,
    possibly none, and every process calls `compute`, which sums the statistics over processes.

    Args:
        features: Network that the images are compared in.
        device: Where features and statistics are computed; it must support float64.

    Raises:
        ImportError: If torchmetrics is not installed.
    """

    def __init__(self, features: FeatureNetwork, device: torch.device | str = "cpu") -> None:
        try:
            from torchmetrics.image.fid import FrechetInceptionDistance
        except ImportError as error:
            raise ImportError('the Frechet distance needs torchmetrics: pip install "iwin-dit[eval]"') from error
        # The reduction over processes happens once, in compute(), where the summed state is inspected first.
        self._metric = FrechetInceptionDistance(feature=features, sync_on_compute=False).to(device)
        self._real_is_given = False

    def update(self, images: Tensor, *, real: bool) -> None:
        """Add a batch of images.

        Args:
            images: `(B, 3, H, W)` uint8, on any device.
            real: Whether the images belong to the reference.

        Raises:
            ValueError: If the images have another shape or dtype, or if the reference came as statistics already.
        """
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"expected uint8 images (B, 3, H, W), got {images.dtype} {tuple(images.shape)}")
        if real and self._real_is_given:
            raise ValueError("the reference was given as statistics; no real images can be added to it")
        self._metric.update(images.to(self._metric.device), real=real)

    def set_real_statistics(self, statistics: FeatureStatistics) -> None:
        """Use statistics instead of reference images; call it on every process.

        Args:
            statistics: Of the reference images, in the same features.

        Raises:
            ValueError: If their size does not fit the network.
        """
        metric, mean, covariance = self._metric, statistics.mean, statistics.covariance
        if mean.shape != metric.real_features_sum.shape:
            expected = len(metric.real_features_sum)
            raise ValueError(f"expected statistics of {expected} features, got {len(mean)}: another feature network")
        self._real_is_given = True
        if torch.distributed.is_initialized() and torch.distributed.get_rank() != 0:
            return  # The sums of all processes are added up: one of them holds the reference.
        # Sums of n vectors that have this mean and covariance. The distance is the same for every n >= 2, and the
        # smallest loses the fewest digits when torchmetrics subtracts the mean again.
        n = 2
        metric.real_features_num_samples.fill_(n)
        metric.real_features_sum.copy_(n * mean)
        metric.real_features_cov_sum.copy_((n - 1) * covariance + n * torch.outer(mean, mean))

    def compute(self) -> FrechetResult:
        """Distance between all real and all generated images; a collective, call it on every process.

        Returns:
            The distance with the counts of all processes.

        Raises:
            ValueError: If either side has fewer than two images, or features that are not finite.
        """
        metric = self._metric
        # torchmetrics casts its result to the dtype of the last features, which a process without images never saw.
        metric.orig_dtype = torch.float64
        with metric.sync_context():
            n_real, n_fake = int(metric.real_features_num_samples), int(metric.fake_features_num_samples)
            if min(n_real, n_fake) < 2:
                raise ValueError(f"expected at least 2 images on each side, got {n_real} real and {n_fake} generated")
            sides = {"real": metric.real_features_cov_sum, "generated": metric.fake_features_cov_sum}
            for side, square_sum in sides.items():
                if not square_sum.isfinite().all():
                    raise ValueError(f"the features of the {side} images are not all finite; no distance exists")
            raw = metric.compute().item()
        return FrechetResult(max(raw, 0.0), raw, None if self._real_is_given else n_real, n_fake)


def load_statistics(path: Path, num_features: int) -> FeatureStatistics:
    """Read `mu` and `sigma` from a reference file of ADM's evaluator, or one of pytorch-fid.

    Nothing is unpickled, and nothing is allocated before shape and dtype are checked. Other arrays in the file, such as
    ADM's sample images, are not read.

    Args:
        path: The `.npz` file.
        num_features: D of the network that the distance is measured in; 2048 for Inception.

    Returns:
        The statistics in float64.

    Raises:
        ValueError: If the file is no such archive, or an array is missing, of another shape or dtype, or not finite.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            mean = _read_array(archive, "mu", (num_features,))
            covariance = _read_array(archive, "sigma", (num_features, num_features))
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"{path} is not a usable reference of {num_features} features: {error}") from error
    if not np.allclose(covariance, covariance.T, rtol=1e-3, atol=1e-6 * np.abs(covariance).max()):
        raise ValueError(f"{path} is not a usable reference: 'sigma' is not symmetric")
    return FeatureStatistics(torch.from_numpy(mean), torch.from_numpy(covariance))


def _read_array(archive: zipfile.ZipFile, key: str, shape: Sequence[int]) -> np.ndarray:
    """Read one finite floating-point array of known shape as float64, looking at its header first."""
    names = [name.removesuffix(".npy") for name in archive.namelist()]
    if key not in names:
        raise ValueError(f"expected the arrays 'mu' and 'sigma', got {names}; give a folder of images instead")
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    with archive.open(f"{key}.npy") as file:
        version = np.lib.format.read_magic(file)
        if version not in readers:
            raise ValueError(f"'{key}' has npy format {version}, expected one of {list(readers)}")
        got_shape, _, dtype = readers[version](file)
    if got_shape != tuple(shape) or dtype.kind != "f":
        raise ValueError(f"expected '{key}' to be floating point {tuple(shape)}, got {dtype} {got_shape}")
    with archive.open(f"{key}.npy") as file:
        array = np.lib.format.read_array(file, allow_pickle=False).astype(np.float64)
    if not np.isfinite(array).all():
        raise ValueError(f"'{key}' holds NaN or infinity")
    return array
