"""The Inception network of the FID, with the weights and the preprocessing that published numbers rest on.

The network is pytorch-fid's. This file owns finding and checking its weights, the three protocols that numbers are
published under, and the resize of ADM's evaluator, that of TensorFlow 1. It is the only one that imports pytorch-fid
and clean-fid. Must not know statistics, references or where images come from.

Letters: B batch, C channels, H W image axes, D features.
"""

import pickle
import socket
import textwrap
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..files import sha256
from .inputs import exact_float32, expect_images
from .network import FeatureNetwork

WEIGHTS_NAME = "pt_inception-2015-12-05-6726825d.pth"
WEIGHTS_URL = f"https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/{WEIGHTS_NAME}"
WEIGHTS_SHA256_PREFIX = "6726825d"
INPUT_SIZE = 299
WIDTHS = MappingProxyType({"pool": 2048, "spatial": 7 * 17 * 17, "logits": 1008})
_SPATIAL_CHANNELS = 7
_OTHER_WEIGHTS_NAME = "weights-inception-2015-12-05-6726825d.pth"  # torch-fidelity's name for the same file
_DOWNLOAD_TIMEOUT = 4.0  # seconds without an answer
_UNREADABLE = (pickle.UnpicklingError, RuntimeError, OSError, EOFError, ValueError, KeyError, AttributeError)


@dataclass(frozen=True)
class Protocol:
    """How images become the input of the network.

    Attributes:
        resize: What is done, in words, for the record.
        normalisation: What is done, in words, for the record.
        prepare: uint8 `(B, 3, H, W)` to float32 `(B, 3, 299, 299)`, about -1 to 1.
    """

    resize: str
    normalisation: str
    prepare: Callable[[Tensor], Tensor]


class InceptionFeatures(FeatureNetwork):
    """Features of the FID Inception network, run in float32.

    `pool` is the average over the last grid, what FID, KID, precision and recall compare. `logits` are for the
    Inception score, without the bias, as in ADM's evaluator and torch-fidelity. `spatial` is what sFID compares: the
    first 7 channels of ADM's `mixed_6/conv`, flattened as in TensorFlow, channels last. In the graph that ADM's
    evaluator runs, this node is the ReLU after convolution and batch norm (the convolution alone is called
    `mixed_6/conv/Conv2D`); here it is what `Mixed_6d.branch1x1` returns.

    All protocols run on the same weights. For `clean`, clean-fid itself runs NVIDIA's TorchScript of the same network.

    Args:
        weights: File of pytorch-fid's weights, see `find_inception_weights`.
        protocol: A key of `PROTOCOLS`.
        features: Which of `WIDTHS` to give.
        sha256_prefix: What the file's hash must begin with, checked before the file is read.

    Raises:
        ImportError: If pytorch-fid is not installed, or clean-fid where the protocol needs it.
        ValueError: If the protocol or a feature is unknown, the hash of the file differs, or it holds no such weights.
    """

    logits_weight: Tensor

    def __init__(
        self,
        weights: Path,
        protocol: str = "adm",
        features: Collection[str] = ("pool",),
        sha256_prefix: str = WEIGHTS_SHA256_PREFIX,
    ) -> None:
        super().__init__()
        if protocol not in PROTOCOLS:
            raise ValueError(f"expected a protocol of {', '.join(PROTOCOLS)}, got {protocol}")
        if not features or not set(features) <= WIDTHS.keys():
            raise ValueError(f"expected features of {', '.join(WIDTHS)}, got {', '.join(features) or 'none'}")
        if protocol == "clean":
            _clean_resizer()  # that it is missing is said now, and not at the first image
        self.protocol = protocol
        self.widths = {name: WIDTHS[name] for name in WIDTHS if name in features}
        self.weights_sha256 = sha256(weights)
        if not self.weights_sha256.startswith(sha256_prefix):
            raise ValueError(
                f"expected Inception weights whose sha256 begins with {sha256_prefix}, but that of {weights} is "
                f"{self.weights_sha256}. It is a broken download or another file: replace it by {WEIGHTS_URL}"
            )
        self.network = _load_network(weights)
        if "logits" in features:
            self.register_buffer("logits_weight", self.network.get_parameter("fc.weight").detach())
        self.network.fc = nn.Identity()  # torchvision's forward then ends at the pooled features

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of a batch.

        Args:
            images: `(B, 3, H, W)` uint8.

        Returns:
            `(B, D)` float32 by name, as in `widths`.

        Raises:
            ValueError: If the batch is not of that kind.
        """
        expect_images(images)
        with exact_float32(images.device):
            return self.features_of_input(PROTOCOLS[self.protocol].prepare(images))

    def features_of_input(self, x: Tensor) -> dict[str, Tensor]:
        """Features of what a protocol made of a batch, or something else did that is to be compared with it.

        Args:
            x: `(B, 3, 299, 299)` float32.

        Returns:
            `(B, D)` float32 by name, as in `widths`.
        """
        kept: dict[str, Tensor] = {}

        def keep_spatial(module: nn.Module, inputs: Any, output: Tensor) -> None:  # noqa: ARG001 - torch's signature
            kept["spatial"] = output[:, :_SPATIAL_CHANNELS].permute(0, 2, 3, 1).flatten(1)  # (B, 17 * 17 * 7)

        hooks = []
        if "spatial" in self.widths:
            hooks.append(self.network.get_submodule("Mixed_6d.branch1x1").register_forward_hook(keep_spatial))
        try:
            with exact_float32(x.device):
                kept["pool"] = self.network(x)
                if "logits" in self.widths:
                    kept["logits"] = kept["pool"] @ self.logits_weight.T
        finally:
            for hook in hooks:
                hook.remove()
        return {name: kept[name] for name in self.widths}

    def describe(self) -> dict[str, Any]:
        """Everything about the features that a number depends on, ready for JSON."""
        return {
            "name": "inception",
            "protocol": self.protocol,
            "weights_sha256": self.weights_sha256,
            "resize": PROTOCOLS[self.protocol].resize,
            "normalisation": PROTOCOLS[self.protocol].normalisation,
            "dtype": "float32",
        }


def _load_network(weights: Path) -> nn.Module:
    """pytorch-fid's network with the weights of a file, which may only hold tensors; frozen."""
    from_pytorch_fid = _pytorch_fid()
    try:
        state = torch.load(weights, map_location="cpu", weights_only=True)
    except _UNREADABLE as error:
        # After its first sentence torch's text tells how to unpickle the file all the same.
        reason = str(error).partition(". ")[0] or type(error).__name__
        raise ValueError(f"expected {weights} to be a file of tensors that torch.save wrote, got: {reason}") from error
    # pytorch-fid takes no weights: it downloads them and unpickles what it got. Hand it ours in that place.
    download = from_pytorch_fid.load_state_dict_from_url
    from_pytorch_fid.load_state_dict_from_url = lambda *_, **__: state
    try:
        with torch.random.fork_rng(devices=[]):  # the weights it draws first must not be missing from a training run
            network: nn.Module = from_pytorch_fid.fid_inception_v3()
    except (RuntimeError, TypeError) as error:
        reason = textwrap.shorten(str(error), 200)
        raise ValueError(f"expected {weights} to hold the weights of the FID Inception, got: {reason}") from error
    finally:
        from_pytorch_fid.load_state_dict_from_url = download
    return network.requires_grad_(False).eval()


def _pytorch_fid() -> Any:
    try:
        from pytorch_fid import inception
    except ImportError as error:
        raise ImportError('Inception features need pytorch-fid: pip install "iwin-dit[eval]"') from error
    return inception


def _clean_resizer() -> Callable[[np.ndarray], np.ndarray]:
    """clean-fid's own resize: `(H, W, 3)` uint8 to `(299, 299, 3)` float32 in 0..255."""
    try:
        from cleanfid.resize import build_resizer
    except ImportError as error:
        raise ImportError('the protocol "clean" needs clean-fid: pip install "iwin-dit[clean]"') from error
    resizer: Callable[[np.ndarray], np.ndarray] = build_resizer("clean")
    return resizer


def _prepare_adm(images: Tensor) -> Tensor:
    return (resize_bilinear_tf1(images.float(), INPUT_SIZE) - 128) / 128


def _prepare_pytorch_fid(images: Tensor) -> Tensor:
    x = F.interpolate(images.float() / 255, size=(INPUT_SIZE, INPUT_SIZE), mode="bilinear", align_corners=False)
    return 2 * x - 1


def _prepare_clean(images: Tensor) -> Tensor:
    resize = _clean_resizer()
    resized = [resize(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
    x = torch.from_numpy(np.stack(resized)).to(images.device).permute(0, 3, 1, 2).contiguous()
    return (x - 128) / 128


PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        "adm": Protocol(f"TF1 bilinear to {INPUT_SIZE}, antialias=False", "(x - 128) / 128", _prepare_adm),
        "pytorch-fid": Protocol(
            f"bilinear to {INPUT_SIZE}, half-pixel, antialias=False", "2 * (x / 255) - 1", _prepare_pytorch_fid
        ),
        "clean": Protocol(
            f"Pillow bicubic on floats to {INPUT_SIZE}, clipped to 0..255", "(x - 128) / 128", _prepare_clean
        ),
    }
)


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
