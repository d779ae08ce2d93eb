"""What a network must offer for sets of images to be compared in its features.

Letters: B batch, T frames, H W image axes, D features.
"""

from typing import Any

from torch import Tensor, nn


class FeatureNetwork(nn.Module):
    """A frozen network in whose features sets of images are compared.

    Attributes:
        widths: The features that it gives: D by name.
    """

    widths: dict[str, int]

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of a batch.

        Args:
            images: `(B, 3, H, W)` uint8; of a video network clips, `(B, T, 3, H, W)`.

        Returns:
            `(B, D)` float32 by name, as in `widths`.
        """
        raise NotImplementedError

    def describe(self) -> dict[str, Any]:
        """Everything about the features that a number depends on, ready for JSON."""
        raise NotImplementedError
