"""Mean and covariance of features that come in batches, by attempts and on several processes.

Owns the streaming statistics; memory is that of one D x D matrix, whatever the number of images. Must not know where
features come from or what is computed from their statistics.

Letters: B batch, D features.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .processes import sum_over_processes, world_size


@dataclass(frozen=True)
class Gaussian:
    """Mean and covariance of a set of feature vectors.

    Attributes:
        mean: `(D,)` float64.
        covariance: `(D, D)` float64.
    """

    mean: Tensor
    covariance: Tensor


def is_finite(tensor: Tensor) -> bool:
    """Whether no element is NaN or infinite, found without a copy of the tensor, which `isfinite` makes."""
    smallest, largest = tensor.aminmax()  # both are NaN if any element is
    return math.isfinite(smallest.item()) and math.isfinite(largest.item())


class Moments:
    """Count, mean and scatter matrix of feature vectors, in float64.

    Sets are merged by the pairwise formula of Chan, Golub and LeVeque (1979), which never subtracts two large sums:
    any order, batch size or split over processes gives the same up to rounding, also where means are large beside
    deviations.

    Args:
        num_features: D.
        device: Where the statistics are kept; it must support float64, which MPS does not.

    Attributes:
        count: Vectors seen.
        mean: `(D,)` float64.
        scatter: `(D, D)` float64, the sum of `(x - mean)(x - mean)^T`.
    """

    def __init__(self, num_features: int, device: torch.device | str = "cpu") -> None:
        self.count = 0
        self.mean = torch.zeros(num_features, dtype=torch.float64, device=device)
        self.scatter = torch.zeros(num_features, num_features, dtype=torch.float64, device=device)

    @torch.no_grad()
    def update(self, features: Tensor, indices: Sequence[int] = ()) -> None:  # noqa: ARG002 - as the other statistics
        """Add a batch.

        Args:
            features: `(B, D)`, any floating point dtype, on any device.
            indices: Which images they are; moments don't depend on it.

        Raises:
            ValueError: The features have another shape.
        """
        if features.shape[1:] != self.mean.shape:
            raise ValueError(f"expected features (B, {len(self.mean)}), got {tuple(features.shape)}")
        if len(features) == 0:
            return
        features = features.to(self.mean.device, torch.float64)
        mean = features.mean(dim=0)
        centred = features - mean
        self.scatter.addmm_(centred.T, centred)
        self._merge(len(features), mean)

    @torch.no_grad()
    def reduce(self) -> None:
        """Make these the statistics of all processes' vectors, on every process; a collective, to be called once."""
        if world_size() == 1:
            return
        sums = torch.cat([self.count * self.mean, self.mean.new_tensor([self.count])])  # counts are exact to 2^53
        sum_over_processes(sums)
        total = round(sums[-1].item())
        mean = sums[:-1] / max(total, 1)
        # About the common mean every process's scatter is larger by this; an error e of that mean counts as e^2 only.
        deviation = self.mean - mean
        self.scatter.addr_(deviation, deviation, alpha=self.count)
        sum_over_processes(self.scatter)
        self.count, self.mean = total, mean

    def state(self) -> dict[str, Tensor]:
        """Copies of the statistics on the CPU, for safetensors: `count`, `mean` and `scatter`."""
        return {
            "count": torch.tensor(self.count, dtype=torch.int64),
            "mean": self.mean.to("cpu", copy=True),
            "scatter": self.scatter.to("cpu", copy=True),
        }

    @torch.no_grad()
    def add_state(self, state: Mapping[str, Tensor]) -> None:
        """Merge what another attempt or process saw.

        Args:
            state: What `state` gave there.

        Raises:
            ValueError: It is of another number of features.
        """
        expected, got = self.scatter.shape, state["scatter"].shape
        if got != expected or state["mean"].shape != self.mean.shape:
            raise ValueError(f"expected statistics of {len(self.mean)} features, got a scatter of {tuple(got)}")
        self.scatter.add_(state["scatter"].to(self.scatter))
        self._merge(int(state["count"]), state["mean"].to(self.mean))

    def gaussian(self, *, unbiased: bool = True) -> Gaussian:
        """Mean and covariance.

        Args:
            unbiased: Divide the scatter by the count less one; otherwise, as StyleGAN-V does, by the count.

        Returns:
            Both on the CPU, where those of a reference file are; no other `(D, D)` memory is taken.

        Raises:
            ValueError: There are fewer than two vectors, or not all are finite.
        """
        if self.count < 2:
            raise ValueError(f"expected the features of at least 2 images, got {self.count}")
        if not (is_finite(self.mean) and is_finite(self.scatter)):
            raise ValueError("the features are not all finite, so they have no mean and covariance: look at the images")
        covariance = self.scatter.to("cpu", copy=True).div_(self.count - unbiased)
        return Gaussian(self.mean.to("cpu", copy=True), covariance)

    def _merge(self, count: int, mean: Tensor) -> None:
        """Merge the count and mean of vectors whose own scatter has been added already."""
        if count == 0:
            return
        total = self.count + count
        deviation = mean - self.mean
        self.scatter.addr_(deviation, deviation, alpha=self.count * count / total)
        self.mean += deviation * (count / total)
        self.count = total
