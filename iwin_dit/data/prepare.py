"""From the names in a configuration to an open VAE, made where it is the digits' and missing; checks of latents.

Knows nothing of the configuration itself: it takes the values, and names them as the user does (`data.source`).
"""

import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

import torch
from diffusers import AutoModel, ModelMixin

from .digits import Digits, train_digits_vae
from .manifest import Manifest, differences, write_json

logger = logging.getLogger(__name__)

SPLIT = "split.json"  # in the digits VAE's folder: which digits it has not seen


class ModelSizes(TypedDict):
    """What a model takes: latent channels, (height, width) of its latents, classes without the null class."""

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
        ValueError: If there is no VAE.
    """
    path, subfolder = Path(path_or_id), None
    if path.exists():
        if (path / "vae" / "config.json").is_file():
            path = path / "vae"
        if not (path / "config.json").is_file():
            raise ValueError(f"expected a VAE folder with config.json and weights, got {path}")
    elif path_or_id.count("/") == 2:
        path_or_id, subfolder = path_or_id.rsplit("/", 1)
    name = str(path) if path.exists() else path_or_id
    try:
        vae = AutoModel.from_pretrained(name, subfolder=subfolder, dtype=torch.float32)
    except OSError as error:  # what the Hub client raises for an unknown id or a missing network
        raise ValueError(f"expected a VAE folder or a reachable Hub id, got {path_or_id!r}: {error}") from error
    return vae.eval().requires_grad_(False)


def make_digits_vae(folder: Path, holdout: int | float, split_seed: int) -> None:
    """Train the VAE of the digits into a folder, unless one is there; then check that it has not seen other digits.

    Args:
        folder: Where it goes, whole or not at all.
        holdout: Held-out digits, as for `split_indices`.
        split_seed: Key of the split.

    Raises:
        ValueError: The VAE there was trained on digits that are to be held out now.
    """
    split = {"data.holdout": holdout, "data.split_seed": split_seed}
    if not folder.exists():
        logger.info("training the digits VAE into %s", folder)
        staging = folder.with_name(f".{folder.name}.tmp")
        shutil.rmtree(staging, ignore_errors=True)
        train_digits_vae(Digits(), holdout, split_seed).save_pretrained(staging)
        write_json(staging / SPLIT, split)
        staging.rename(folder)
    elif (folder / SPLIT).is_file():  # a VAE that came from elsewhere has seen no digits of ours
        made = json.loads((folder / SPLIT).read_text(encoding="utf-8"))
        differing = differences(made, split)
        if differing:
            raise ValueError(
                f"the digits VAE in {folder} was trained with another split:\n  " + "\n  ".join(differing) + "\nGive "
                "another --data.vae and --data.latents, or delete both folders to have them made again"
            )


def check_made_from(folder: Path, manifest: Manifest, wanted: Mapping[str, Any]) -> None:
    """Check that a folder of latents was made with the settings that a configuration asks for.

    Args:
        folder: The folder, for the message.
        manifest: Its manifest.
        wanted: Values by name, as the user writes them: data.source and so on.

    Raises:
        ValueError: They differ; every difference is listed.
    """
    made = {
        "data.source": str(Path(manifest.source)),
        **{f"data.{name}": value for name, value in manifest.source_settings.items()},
        "data.class_names": manifest.class_names,
        "data.resolution": manifest.resolution,
        "data.posterior": manifest.posterior,
        "data.flips": manifest.flips,
        "data.latents_dtype": manifest.dtype,
    }
    wanted = {**wanted, "data.source": str(Path(wanted["data.source"]))}  # `photos` and `photos/` are one folder
    differing = differences(made, wanted)
    if differing:
        raise ValueError(
            f"the latents in {folder} were made with other settings:\n  " + "\n  ".join(differing) + "\nGive another "
            "--data.latents, or delete that folder to have them made again"
        )
