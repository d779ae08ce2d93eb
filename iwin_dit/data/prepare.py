"""From the names in a configuration to an open VAE, made where it is that of a built-in source and missing.

Knows nothing of the configuration itself: it takes the values, and names them as the user does (`data.source`).
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Literal, TypedDict

import diffusers
import torch
from diffusers import AutoencoderKL, ModelMixin
from filelock import FileLock
from safetensors import SafetensorError, safe_open

from ..files import write_json
from .digits import Digits, train_digits_vae
from .manifest import differences
from .moving_digits import MovingDigits

logger = logging.getLogger(__name__)

SPLIT = "split.json"  # in the digits VAE's folder: which digits it has not seen
# Steps that bring held-out frames to 29 dB or more: 250 leave moving digits at 28.9 dB, 500 give them 32.1.
_VAE_STEPS = {"digits": 250, "moving_digits": 500}


class ModelSizes(TypedDict):
    """What a model takes: latent channels, cells (h, w) or (t, h, w), classes without the null class."""

    latent_channels: int
    sample_size: tuple[int, ...]
    num_classes: int


def open_vae(path_or_id: str) -> ModelMixin:
    """Load a VAE.

    Args:
        path_or_id: A VAE folder, a pipeline folder (its `vae/` is taken), a Hub id "user/name", or
            "user/name/subfolder".

    Returns:
        The VAE in float32, in evaluation mode, without gradients.

    Raises:
        ValueError: If there is no VAE, or its weights are no safetensors, damaged, or not those of its class.
    """
    path, subfolder = Path(path_or_id), None
    if path.exists():
        if (path / "vae" / "config.json").is_file():
            path = path / "vae"
        if not (path / "config.json").is_file():
            raise ValueError(f"expected a VAE folder with config.json and weights, got {path}")
        _check_weights(path)
    elif path_or_id.count("/") == 2:
        path_or_id, subfolder = path_or_id.rsplit("/", 1)
    name = str(path) if path.exists() else path_or_id
    try:
        # Not by AutoModel: it has no output_loading_info, and what it reads depends on what it has read before. The
        # class here only reads config.json; the VAE's own is the one named there.
        class_name = str(AutoencoderKL.load_config(name, subfolder=subfolder).get("_class_name"))
        vae_class = getattr(diffusers, class_name, None)
        if vae_class is None or not issubclass(vae_class, ModelMixin):
            raise ValueError(f"its config is of {class_name!r}, which is no model of diffusers")
        vae, info = vae_class.from_pretrained(
            name, subfolder=subfolder, dtype=torch.float32, use_safetensors=True, output_loading_info=True
        )
    except (OSError, RuntimeError, ValueError) as error:
        # OSError is what the Hub client raises for an unknown id, a missing network or weights that are no safetensors;
        # the others come from weights of wrong shapes.
        what = "a VAE folder" if path.exists() else "a VAE folder, or a reachable Hub id with safetensors weights"
        raise ValueError(f"expected {what}, got {path_or_id!r}: {error}") from error
    wrong = [f"{kind}: {info[kind]}" for kind in ("missing_keys", "unexpected_keys", "mismatched_keys") if info[kind]]
    if wrong:
        raise ValueError(f"the weights in {path_or_id!r} are not those of {type(vae).__name__}: {'; '.join(wrong)}")
    return vae.eval().requires_grad_(False)


def _check_weights(folder: Path) -> None:
    """Raise a ValueError for a VAE folder whose weights are no safetensors, or damaged ones."""
    files = sorted(folder.glob("*.safetensors"))
    pickles = [path for path in folder.iterdir() if path.suffix in (".bin", ".ckpt", ".pt", ".pth")]
    if not files and pickles:
        raise ValueError(
            f"{pickles[0]} is a pickle, which can run code, and is not read. If you trust it, convert it: python -c "
            f"\"import torch; from safetensors.torch import save_file; save_file(torch.load('{pickles[0]}', "
            f"weights_only=True), '{folder / 'diffusion_pytorch_model.safetensors'}')\""
        )
    for file in files:
        try:
            with safe_open(file, framework="pt"):
                pass
        except SafetensorError as error:
            raise ValueError(f"{file} is damaged ({error}, {file.stat().st_size} bytes): get it again") from error


def make_digits_vae(
    folder: Path, source: Literal["digits", "moving_digits"], holdout: int | float, split_seed: int
) -> None:
    """Train the VAE of a built-in source into a folder, unless one is there; then check that it was trained on this.

    Args:
        folder: Where it goes, whole or not at all.
        source: What it is trained on: the digits, or the frames of clips of moving ones.
        holdout: Held-out digits or clips, as for `split_indices`. (Clips of which one digit gives several are held out
            by the digit, and of a VAE that holds out as many digits, it has seen none of them.)
        split_seed: Key of the split.

    Raises:
        ValueError: The VAE there was trained on another source, or on digits that are to be held out now.
    """
    split = {"data.source": source, "data.holdout": holdout, "data.split_seed": split_seed}
    if not folder.exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(f".{folder.name}.lock")):  # of two runs that start together, one trains it
            if not folder.exists():
                logger.info("training the VAE of the %s into %s", source.replace("_", " "), folder)
                staging = folder.with_name(f".{folder.name}.tmp")
                shutil.rmtree(staging, ignore_errors=True)
                frames = Digits() if source == "digits" else MovingDigits()
                train_digits_vae(frames, holdout, split_seed, _VAE_STEPS[source]).save_pretrained(staging)
                write_json(staging / SPLIT, split)
                staging.rename(folder)
    if (folder / SPLIT).is_file():  # a VAE that came from elsewhere has seen no digits of ours
        made = json.loads((folder / SPLIT).read_text(encoding="utf-8"))
        differing = differences({"data.source": "digits", **made}, split)  # which older ones do not name
        if differing:
            raise ValueError(
                f"the digits VAE in {folder} was trained on something else:\n  " + "\n  ".join(differing) + "\nGive "
                "another --data.vae and --data.latents, or delete both folders to have them made again"
            )
