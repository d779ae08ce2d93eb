"""From the names in a configuration to an open VAE and open latents, making what is missing."""

import logging
from pathlib import Path
from typing import TypedDict

import torch
from diffusers import AutoModel, ModelMixin

from .codec import LatentCodec
from .digits import Digits, train_digits_vae
from .latents import MANIFEST, LatentDataset, Manifest, size_differences, write_latents
from .sources import ImageFolder, ImageSource

logger = logging.getLogger(__name__)


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


def open_source(source: str, resolution: int) -> ImageSource:
    """Open an image source: "digits", or a folder with one folder of images per class.

    Args:
        source: Which.
        resolution: Image side in pixels.

    Returns:
        The source.

    Raises:
        ValueError: If the folder is missing or empty, or digits are asked for at another size than 32.
    """
    if source != "digits":
        return ImageFolder(Path(source), resolution)
    digits = Digits()
    if resolution != digits.resolution:
        raise ValueError(f"data.resolution must be {digits.resolution} for the digits, got {resolution}")
    return digits


def missing_parts(source: str, vae: str, latents: str) -> list[str]:
    """Name what `prepare_latents` would have to make first.

    Args:
        source: As for `open_source`.
        vae: As for `open_vae`.
        latents: Folder of latents.

    Returns:
        Folders, none if everything is there.
    """
    missing = [vae] if source == "digits" and not Path(vae).exists() else []
    return missing if (Path(latents) / MANIFEST).is_file() else [*missing, latents]


def prepare_latents(
    source: str,
    vae: str,
    latents: str,
    *,
    resolution: int,
    holdout: int | float,
    seed: int,
    batch_size: int,
    max_broken: int,
    model_sizes: ModelSizes,
    device: torch.device,
    verify: bool = True,
) -> tuple[LatentCodec, LatentDataset, LatentDataset]:
    """Open VAE and latents; train the digits VAE and encode the source where they are missing.

    Args:
        source: As for `open_source`.
        vae: As for `open_vae`; for digits, a folder in which it is made if missing.
        latents: Folder of latents, made if missing.
        resolution: Image side in pixels.
        holdout: Held-out images, a count or a fraction below 1.
        seed: Key of the split.
        batch_size: Images per VAE call.
        max_broken: Broken images to skip before giving up.
        model_sizes: What the model takes, checked before anything is encoded.
        device: Where the VAE goes.
        verify: Check the hashes of the latents, as for `LatentDataset`.

    Returns:
        The codec, the training latents and the held-out latents.

    Raises:
        ValueError: If something is missing that cannot be made, or the latents were made from something else.
    """
    folder = Path(latents)
    images = None if (folder / MANIFEST).is_file() else open_source(source, resolution)
    if source == "digits" and not Path(vae).exists():
        logger.info("training the digits VAE into %s", vae)
        train_digits_vae(Digits(), holdout, seed).save_pretrained(vae)
    try:
        codec = LatentCodec(open_vae(vae).to(device))
    except ValueError as error:
        raise ValueError(f"data.vae: {error}") from error
    if images is not None:
        side = resolution // codec.stride
        shape = (codec.latent_channels, side, side)
        differences = size_differences(shape, len(images.class_names), **model_sizes)
        if differences:
            raise ValueError("the data do not fit the model:\n  " + "\n  ".join(differences))
        logger.info("encoding %d images into %s", len(images), latents)
        write_latents(
            images, codec, folder, vae_id=vae, holdout=holdout, seed=seed, batch_size=batch_size, max_broken=max_broken
        )
    _check_made_from(folder, {"source": source, "resolution": resolution, "holdout": holdout, "split_seed": seed})
    return codec, LatentDataset(folder, "train", verify), LatentDataset(folder, "val", verify)


def _check_made_from(folder: Path, wanted: dict[str, str | int | float]) -> None:
    """Raise a ValueError that lists what of the configuration the latents in `folder` were not made with."""
    manifest = Manifest.load(folder)
    wanted = {**wanted, "source": str(Path(str(wanted["source"])))}  # `photos` and `photos/` are one folder
    made = {
        "source": manifest.source,
        "resolution": manifest.resolution,
        "holdout": manifest.holdout,
        "split_seed": manifest.seed,
    }
    differences = [f"data.{key}: {made[key]} there, {wanted[key]} wanted" for key in made if made[key] != wanted[key]]
    if differences:
        raise ValueError(
            f"the latents in {folder} were made with other settings:\n  " + "\n  ".join(differences) + "\nGive another "
            "--data.latents (and, for digits, another --data.vae, which has seen the old split), or delete that folder "
            "to have them made again"
        )
