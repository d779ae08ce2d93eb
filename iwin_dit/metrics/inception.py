"""The Inception network of the FID, with the weights and the preprocessing that published numbers rest on.

The network is pytorch-fid's. This file owns finding and checking its weights, and the resize of ADM's evaluator, that
of TensorFlow 1, which pytorch-fid does not use. Must not know statistics, references or where images come from.

Letters: B batch, C channels, H W image axes, D features.
"""

import socket
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..files import sha256
from .frechet import FeatureNetwork

WEIGHTS_NAME = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS_NAME}"
WEIGHTS_SHA256_PREFIX = "6726825d"
INPUT_SIZE = 299
_OTHER_WEIGHTS_NAME = "weights-inception-2015-12-05-6726825d.pth"  # torch-fidelity's name for the same file
_DOWNLOAD_TIMEOUT = 10.0  # seconds without an answer


class InceptionFeatures(FeatureNetwork):
    """The 2048 pooled features of the FID Inception network, protocol `adm`.

    uint8 images are resized to 299 x 299 as TensorFlow 1 does (bilinear, corner-anchored, no antialias), mapped by
    (x - 128) / 128, and run in float32.

    Args:
        weights: File of pytorch-fid's weights, see `find_inception_weights`.
        sha256_prefix: What the file's hash must begin with, checked before the file is read.

    Raises:
        ImportError: If pytorch-fid is not installed.
        ValueError: If the hash of the file differs.
    """

    num_features = 2048

    def __init__(self, weights: Path, sha256_prefix: str = WEIGHTS_SHA256_PREFIX) -> None:
        super().__init__()
        try:
            from pytorch_fid import inception
        except ImportError as error:
            raise ImportError('Inception features need pytorch-fid: pip install "iwin-dit[eval]"') from error
        self.weights_sha256 = sha256(weights)
        if not self.weights_sha256.startswith(sha256_prefix):
            raise ValueError(
                f"expected Inception weights whose sha256 begins with {sha256_prefix}, but that of {weights} is "
                f"{self.weights_sha256}. It is a broken download or another file: replace it by {WEIGHTS_URL}"
            )
        state = torch.load(weights, map_location="cpu", weights_only=True)
        # pytorch-fid takes no weights: it downloads them and unpickles what it got. Hand it ours in that place.
        download = inception.load_state_dict_from_url
        inception.load_state_dict_from_url = lambda *_, **__: state
        try:
            self.network = inception.InceptionV3(resize_input=False, normalize_input=False)
        finally:
            inception.load_state_dict_from_url = download
        self.network.eval()

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """Features of a batch.

        Args:
            images: `(B, 3, H, W)` uint8.

        Returns:
            `(B, 2048)` float32.
        """
        x = (resize_bilinear_tf1(images.float(), INPUT_SIZE) - 128) / 128  # (B, 3, 299, 299) in [-1, 1)
        return self.network(x)[0].flatten(1)

    def metric_name(self, n_fake: int) -> str:
        """`fid` from 50,000 images on, as papers report it; below that the number is part of the name."""
        return "fid" if n_fake >= 50_000 else f"fid_{n_fake}"

    def describe(self) -> dict[str, Any]:
        """Everything about the features that a number depends on, ready for JSON."""
        return {
            "name": "inception",
            "protocol": "adm",
            "num_features": self.num_features,
            "weights_sha256": self.weights_sha256,
            "resize": f"TF1 bilinear to {INPUT_SIZE}, antialias=False",
            "dtype": "float32",
        }


def resize_bilinear_tf1(images: Tensor, size: int) -> Tensor:
    """Bilinear resize of TensorFlow 1: output i samples position i * in / out, without half-pixel offset or antialias.

    Args:
        images: `(B, C, H, W)`, floating point.
        size: Height and width of the result.

    Returns:
        `(B, C, size, size)`.
    """
    for axis in (-1, -2):
        length = images.shape[axis]
        position = torch.arange(size, device=images.device, dtype=images.dtype) * (length / size)
        low = position.long()
        high = (low + 1).clamp(max=length - 1)
        weight = position - low
        if axis == -2:
            weight = weight[:, None]
        start = images.index_select(axis, low)
        images = start + (images.index_select(axis, high) - start) * weight
    return images


def find_inception_weights(path: Path | None = None, *, download: bool = True) -> Path:
    """Locate the Inception weights: a given file, torch's cache, or a download into that cache.

    Args:
        path: The file, where it is not in torch's cache.
        download: Whether the network may be tried.

    Returns:
        An existing file; its hash is checked by whoever reads it.

    Raises:
        FileNotFoundError: If the file is not there and cannot be fetched; the text says where to put it.
    """
    cache = Path(torch.hub.get_dir()) / "checkpoints"
    candidates = [cache / WEIGHTS_NAME, cache / _OTHER_WEIGHTS_NAME] if path is None else [path]
    for candidate in candidates:
        if candidate.is_file():
            return candidate
    reason = "the download is switched off"
    if path is not None:
        reason = f"{path} does not exist"
    elif download:
        try:
            return _download_weights(cache)
        except (OSError, RuntimeError) as error:  # no network, no disk, or torch.hub's "invalid hash value"
            reason = f"the download failed: {error}"
    raise FileNotFoundError(
        f"no Inception weights for the FID ({reason}): expected {WEIGHTS_NAME}, sha256 {WEIGHTS_SHA256_PREFIX}..., "
        f"from {WEIGHTS_URL} : put it at {cache / WEIGHTS_NAME} or give its path with --inception-weights"
    )


def _download_weights(folder: Path) -> Path:
    """Fetch the weights, checked, into `folder`; a silent server is an error after `_DOWNLOAD_TIMEOUT`."""
    target = folder / WEIGHTS_NAME
    folder.mkdir(parents=True, exist_ok=True)
    timeout = socket.getdefaulttimeout()
    socket.setdefaulttimeout(_DOWNLOAD_TIMEOUT)  # torch.hub passes none of its own and would wait for ever
    try:
        torch.hub.download_url_to_file(WEIGHTS_URL, str(target), hash_prefix=WEIGHTS_SHA256_PREFIX)
    finally:
        socket.setdefaulttimeout(timeout)
    return target
