"""DINOv2 features for FD-DINOv2, as EDM2 computes them from the original code, here through transformers.

Owns finding the weights and the one place where transformers and the original code differ: the interpolation of the
position table. Must not know statistics, references or where images come from.

Letters: B batch, H W image axes, N length of an axis of the position table, D features.
"""

import json
import math
import re
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, is_offline_mode
from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError
from torch import Tensor, nn

from ..files import sha256
from .inputs import exact_float32, expect_images
from .network import FeatureNetwork

INPUT_SIZE = 224
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
_CONFIG, _WEIGHTS = "config.json", "model.safetensors"
_ANSWER_TIMEOUT = 4.0  # seconds


class DINOv2Features(FeatureNetwork):
    """The class token of DINOv2 after the last layer norm, run in float32; D = 1024 for the usual ViT-L/14.

    uint8 images are resized to 224 x 224 (bicubic, antialiased), mapped by x / 255 and ImageNet's mean and deviation.

    Args:
        path_or_id: A folder with `config.json` and `model.safetensors`, or a Hub id.
        download: Whether the network may be tried; it never is where the Hub is switched off.

    Raises:
        ImportError: If transformers is not installed.
        FileNotFoundError: If the files are not there and cannot be fetched.
        ValueError: If they hold no DINOv2, or a file of the Hub's cache is not what the Hub gave.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, path_or_id: str = "facebook/dinov2-large", *, download: bool = True) -> None:
        super().__init__()
        try:
            from transformers import Dinov2Model
        except ImportError as error:
            raise ImportError('DINOv2 features need transformers: pip install "iwin-dit[dinov2]"') from error
        folder = find_dinov2_weights(path_or_id, download=download)
        self.weights_sha256 = _checked_sha256(folder / _WEIGHTS)
        model_type = json.loads((folder / _CONFIG).read_text(encoding="utf-8")).get("model_type")
        if model_type != "dinov2":
            raise ValueError(f"expected {folder / _CONFIG} of model_type dinov2, got {model_type}")
        with torch.random.fork_rng(devices=[]):  # what loading draws must not be missing from a training run
            self.network, report = Dinov2Model.from_pretrained(
                folder,
                local_files_only=True,
                use_safetensors=True,
                dtype=torch.float32,
                ignore_mismatched_sizes=True,  # it then reports them, as it does what is missing: refused below
                output_loading_info=True,
            )
        if report["missing_keys"] or report["mismatched_keys"]:
            wrong = sorted([*report["missing_keys"], *(name for name, *_ in report["mismatched_keys"])])
            raise ValueError(f"{folder / _WEIGHTS} does not fit its {_CONFIG}: missing or misshapen {', '.join(wrong)}")
        self.network.requires_grad_(False).eval()
        self._fit_position_table()
        self.widths = {"dinov2": int(self.network.config.hidden_size)}
        self.register_buffer("mean", torch.tensor(MEAN)[:, None, None])
        self.register_buffer("std", torch.tensor(STD)[:, None, None])

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Features of a batch.

        Args:
            images: `(B, 3, H, W)` uint8.

        Returns:
            `(B, D)` float32, named `dinov2`.

        Raises:
            ValueError: If the batch is not of that kind.
        """
        expect_images(images)
        with exact_float32(images.device):
            x = F.interpolate(images.float(), size=(INPUT_SIZE, INPUT_SIZE), mode="bicubic", antialias=True)
            x = (x / 255 - self.mean) / self.std  # (B, 3, 224, 224)
            return {"dinov2": self.network(pixel_values=x).last_hidden_state[:, 0]}

    def describe(self) -> dict[str, Any]:
        """Everything about the features that a number depends on, ready for JSON."""
        return {
            "name": "dinov2",
            "protocol": "edm2",
            "weights_sha256": self.weights_sha256,
            "resize": f"bicubic to {INPUT_SIZE}, antialias=True",
            "normalisation": f"(x / 255 - {MEAN}) / {STD}",
            "position_table": "as DINOv2's code: bicubic, scale factor (size + 0.1) / length",
            "dtype": "float32",
        }

    def _fit_position_table(self) -> None:
        """Put the table for 224 x 224 pixels in the place of the model's, which transformers would resize otherwise."""
        patch = self.network.config.patch_size
        if INPUT_SIZE % patch:
            raise ValueError(f"expected a DINOv2 whose patch size divides {INPUT_SIZE}, got {patch}")
        embeddings = self.network.embeddings
        table = resize_position_table(embeddings.position_embeddings.detach(), INPUT_SIZE // patch)
        embeddings.position_embeddings = nn.Parameter(table, requires_grad=False)


def resize_position_table(table: Tensor, size: int) -> Tensor:
    """Resize learned positions as DINOv2's own code does: by a scale factor that 0.1 makes slightly too large.

    The sampled positions follow from that factor, and not from the two sizes: it shifts all of them.

    Args:
        table: `(1, 1 + N * N, D)`; the class token's position, then the grid's.
        size: Length of both axes of the new grid.

    Returns:
        `(1, 1 + size * size, D)`.
    """
    length = math.isqrt(table.shape[1] - 1)
    if length == size:
        return table
    grid = table[:, 1:].unflatten(1, (length, length)).permute(0, 3, 1, 2)  # (1, D, N, N)
    factor = (size + 0.1) / length
    grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
    return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)


def find_dinov2_weights(path_or_id: str, *, download: bool = True) -> Path:
    """Locate a DINOv2: a given folder, the Hub's cache, or a download into that cache.

    Args:
        path_or_id: A folder with `config.json` and `model.safetensors`, or a Hub id.
        download: Whether the network may be tried; it never is where the Hub is switched off.

    Returns:
        A folder with both files.

    Raises:
        FileNotFoundError: If they are not there and cannot be fetched.
    """
    folder = Path(path_or_id) if Path(path_or_id).is_dir() else _cached(path_or_id)
    reason = "neither a folder nor in the Hub's cache, and the download is switched off"
    if folder is None and download and not is_offline_mode():
        try:
            folder = _download(path_or_id)
        except Exception as error:  # the Hub's HTTP library has errors of its own
            reason = f"the download failed: {error}"
    if folder is not None:
        missing = [name for name in (_CONFIG, _WEIGHTS) if not (folder / name).is_file()]
        if not missing:
            return folder
        reason = f"no {' and no '.join(missing)} in it"
    raise FileNotFoundError(
        f"no DINOv2 at {path_or_id} ({reason}): give a folder with {_CONFIG} and {_WEIGHTS} or a Hub id with --dinov2; "
        "where there is a network, `hf download facebook/dinov2-large` fetches the usual one"
    )


def _cached(hub_id: str) -> Path | None:
    """The folder of both files in the Hub's cache; None where one is missing, or where this can be no Hub id."""
    try:
        hf_hub_download(hub_id, _CONFIG, local_files_only=True)
        return Path(hf_hub_download(hub_id, _WEIGHTS, local_files_only=True)).parent
    except (LocalEntryNotFoundError, HFValidationError):
        return None


def _download(hub_id: str) -> Path:
    """Fetch both files into the Hub's cache."""
    # The download itself tries for minutes to reach a Hub that is silent: ask once, and give up where it is.
    get_hf_file_metadata(hf_hub_url(hub_id, _WEIGHTS), timeout=_ANSWER_TIMEOUT)
    hf_hub_download(hub_id, _CONFIG)
    return Path(hf_hub_download(hub_id, _WEIGHTS)).parent


def _checked_sha256(weights: Path) -> str:
    """The file's hash; the Hub's cache names large files by theirs, so there a broken one is refused."""
    digest, name = sha256(weights), weights.resolve().name
    if re.fullmatch(r"[0-9a-f]{64}", name) and name != digest:
        raise ValueError(f"expected {weights} with sha256 {name}, got {digest}: delete {weights.resolve()}")
    return digest
