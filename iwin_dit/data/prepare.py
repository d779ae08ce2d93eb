"""From the names in a configuration to an open VAE and open latents, making what is missing."""

import logging
from pathlib import Path

import torch
from diffusers import AutoModel, ModelMixin

from .codec import LatentCodec
from .digits import Digits, train_digits_vae
from .latents import MANIFEST, LatentDataset, write_latents
from .sources import ImageFolder, ImageSource

logger = logging.getLogger(__name__)


def open_vae(path_or_id: str) -> ModelMixin:
    """Load a VAE.

    Args:
        path_or_id: A VAE folder, a pipeline folder (its `vae/` is taken), a Hub id "user/name", or
            "user/name/subfolder".

    Returns:
        The VAE in float32, in evaluation mode, without gradients.

    Raises:
        ValueError: If a local folder holds no VAE.
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
    vae = AutoModel.from_pretrained(name, subfolder=subfolder, dtype=torch.float32)
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
    device: torch.device,
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
        device: Where the VAE goes.

    Returns:
        The codec, the training latents and the held-out latents.

    Raises:
        ValueError: If something is missing that cannot be made, or does not fit.
    """
    if source == "digits" and not Path(vae).exists():
        logger.info("training the digits VAE into %s", vae)
        train_digits_vae(Digits(), holdout, seed).save_pretrained(vae)
    codec = LatentCodec(open_vae(vae).to(device))
    folder = Path(latents)
    if not (folder / MANIFEST).is_file():
        images = open_source(source, resolution)
        logger.info("encoding %d images into %s", len(images), latents)
        write_latents(
            images, codec, folder, vae_id=vae, holdout=holdout, seed=seed, batch_size=batch_size, max_broken=max_broken
        )
    return codec, LatentDataset(folder, "train"), LatentDataset(folder, "val")
