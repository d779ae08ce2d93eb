"""I3D features for the Frechet video distance, from the TorchScript file that StyleGAN-V's evaluation uses.

TorchScript is code: only load a file you trust. Must not know statistics, or where clips come from.

Letters: B batch, T frames, H W image axes.
"""

import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import sha256
from .inputs import exact_float32, expect_clips
from .network import FeatureNetwork

WEIGHTS_NAME = "i3d_torchscript.pt"
NUM_FEATURES = 400


class I3DFeatures(FeatureNetwork):
    """The 400 class scores, before the softmax, of I3D trained on Kinetics-400, run in float32.

    The network itself maps 0..255 to its range and resizes frames to 224 x 224, both as StyleGAN-V asks it to.

    Args:
        path: The TorchScript file. It holds code that runs: only give one that you trust.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is no TorchScript archive; nothing in it is run then.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        if not path.is_file():
            raise FileNotFoundError(
                f"no I3D for the Frechet video distance: {path} does not exist. It is the TorchScript file that the "
                f"evaluation of StyleGAN-V links, usually called {WEIGHTS_NAME}: give its path with --i3d"
            )
        self.weights_sha256 = sha256(path)
        _expect_torchscript(path)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", FutureWarning)  # torch drops TorchScript; I3D comes in nothing else
                self.network = torch.jit.load(str(path), map_location="cpu").eval()
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"expected {path} to be a TorchScript archive, got: {error}") from error
        self.widths = {"i3d": NUM_FEATURES}

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of a batch.

        Args:
            images: Clips `(B, T, 3, H, W)` uint8.

        Returns:
            `(B, 400)` float32, named `i3d`.

        Raises:
            ValueError: If the batch is not of that kind, or the network gives something else.
        """
        expect_clips(images)
        with exact_float32(images.device):
            clips = images.transpose(1, 2).float()  # (B, 3, T, H, W)
            features = self.network(clips, rescale=True, resize=True, return_features=True)
        if features.shape != (len(images), NUM_FEATURES):
            raise ValueError(
                f"expected I3D to give {(len(images), NUM_FEATURES)} features, got {tuple(features.shape)}: "
                "give the TorchScript file that StyleGAN-V's evaluation uses"
            )
        return {"i3d": features.float()}

    def describe(self) -> dict[str, Any]:
        """Everything about the features that a number depends on, ready for JSON."""
        return {
            "name": "i3d",
            "protocol": "stylegan-v",
            "weights_sha256": self.weights_sha256,
            "resize": "inside the network, to 224 x 224",
            "normalisation": "inside the network, from 0..255",
            "covariance": "over n",
            "dtype": "float32",
        }


def _expect_torchscript(path: Path) -> None:
    """Look at the names in the archive only, so that a pickle in the place of the network is never opened."""
    names = []
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    if not any("/code/" in name for name in names) or not any(name.endswith("/constants.pkl") for name in names):
        raise ValueError(f"expected {path} to be a TorchScript archive ({WEIGHTS_NAME}), got another kind of file")
