"""The VAE and the latents that a training configuration names, opened and checked against its model."""

import shlex
import sys

from accelerate import Accelerator

from ..data.codec import LatentCodec
from ..data.latents import LatentDataset, check_fits
from ..data.prepare import ModelSizes, missing_parts, prepare_latents
from ..models import IwinDiTTransformer2DModel
from .config import Config


def open_data(
    config: Config, model: IwinDiTTransformer2DModel, accelerator: Accelerator
) -> tuple[LatentCodec, LatentDataset, LatentDataset]:
    """Open VAE and latents, made where they are missing, and check that they fit the model.

    Args:
        config: The training configuration.
        model: The model to train.
        accelerator: Tells the device; its main process checks the hashes of the latents.

    Returns:
        The codec, the training latents and the held-out latents.

    Raises:
        ValueError: If something is missing and cannot be made here, or does not fit.
    """
    data = config.data
    missing = missing_parts(data.source, data.vae, data.latents)
    if missing and accelerator.num_processes > 1:  # the others would wait in a collective, and time out
        command = shlex.join(["python", *sys.argv, "--prepare-only"])
        raise ValueError(f"{' and '.join(missing)} must be made first, by one process: {command}")
    model_sizes = ModelSizes(
        latent_channels=model.config.in_channels,
        sample_size=model.latent_size,
        num_classes=model.config.num_classes,
    )
    codec, train_data, held_out = prepare_latents(
        data.source,
        data.vae,
        data.latents,
        resolution=data.resolution,
        holdout=data.holdout,
        seed=data.split_seed,
        batch_size=data.encode_batch_size,
        max_broken=data.max_broken_images,
        model_sizes=model_sizes,
        device=accelerator.device,
        verify=accelerator.is_main_process,
    )
    check_fits(train_data.manifest, vae_sha256=codec.fingerprint(), **model_sizes)
    return codec, train_data, held_out
