"""Features kept by image index, for the metrics that compare images one by one.

Memory grows with the number of images. Must not know where features come from or what is computed from them.

Letters: B batch, D features.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .processes import sum_over_processes


class FeatureTable:
    """A row of features per image, float32 on the CPU: `count * num_features * 4` bytes on every process.

    Args:
        count: Number of images.
        num_features: D.
    """

    def __init__(self, count: int, num_features: int) -> None:
        self._features = torch.zeros(count, num_features)
        self._times = torch.zeros(count, dtype=torch.int32)  # that each image came

    @torch.no_grad()
    def update(self, features: Tensor, indices: Sequence[int]) -> None:
        """Add a batch.

        Args:
            features: `(B, D)`, any floating point dtype, on any device.
            indices: Which images they are of, each in [0, count) and new.

        Raises:
            ValueError: The features have another shape, or an index is out of range or came before.
        """
        expected, got = (len(indices), self._features.shape[1]), tuple(features.shape)
        if got != expected:
            raise ValueError(f"expected features {expected} of {len(indices)} images, got {got}")
        count = len(self._times)
        if not all(0 <= index < count for index in indices):
            raise ValueError(f"expected image indices in [0, {count}), got {min(indices)} to {max(indices)}")
        rows = torch.tensor(indices, dtype=torch.int64)
        self._times.index_add_(0, rows, torch.ones_like(rows, dtype=torch.int32))
        self._check_times(rows)
        self._features[rows] = features.to("cpu", torch.float32)

    def reduce(self) -> None:
        """Make this the table of all processes' images, on every process; a collective, to be called once."""
        sum_over_processes(self._features)  # a row that another process has is zero here
        sum_over_processes(self._times)

    def state(self) -> dict[str, Tensor]:
        """Copies of the rows that came, for safetensors: `features` and the `indices` of their images."""
        indices = self._times.nonzero()[:, 0]
        return {"features": self._features[indices], "indices": indices}

    def add_state(self, state: Mapping[str, Tensor]) -> None:
        """Add the rows that another attempt or process saw.

        Args:
            state: What `state` gave there.

        Raises:
            ValueError: It is of another number of images or features, or has an image that came before.
        """
        self.update(state["features"], state["indices"].tolist())

    def features(self) -> Tensor:
        """Features of all images.

        Returns:
            `(count, D)` float32 on the CPU, the table itself.

        Raises:
            ValueError: An image came not at all or more than once, or its features are not finite.
        """
        missing = (self._times == 0).nonzero()[:, 0].tolist()
        if missing:
            raise ValueError(f"expected the features of {len(self._times)} images, {_some(missing)} did not come")
        self._check_times(torch.arange(len(self._times)))
        finite = torch.cat([part.isfinite().all(dim=1) for part in self._features.split(1024)])  # with little memory
        bad = (~finite).nonzero()[:, 0].tolist()
        if bad:
            raise ValueError(f"the features of {_some(bad)} are not finite: look at the images")
        return self._features

    def _check_times(self, rows: Tensor) -> None:
        twice = sorted(set(rows[self._times[rows] > 1].tolist()))
        if twice:
            raise ValueError(f"expected each image once, {_some(twice)} came more often")


def _some(images: list[int]) -> str:
    """Name the first few of some images."""
    return f"{len(images)} images ({', '.join(map(str, images[:3]))}{', ...' if len(images) > 3 else ''})"
