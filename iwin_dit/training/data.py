"""The VAE and the latents that a configuration names: made, opened and checked against its model."""

import shlex
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

from ..data.codec import LatentCodec
from ..data.encode import EncodeSettings
from ..data.extract import Extraction
from ..data.latents import LatentDataset, LatentStore, check_fits, size_differences
from ..data.manifest import MANIFEST
from ..data.prepare import ModelSizes, check_made_from, make_digits_vae, open_vae
from ..data.sources import open_source, read_class_names
from ..models import IwinDiTTransformer2DModel
from .config import Config, DataConfig


def open_data(
    config: Config, model: IwinDiTTransformer2DModel, accelerator: Accelerator
) -> tuple[LatentCodec, LatentDataset, LatentDataset]:
    """Open VAE and latents, made where they are missing, and check that they fit configuration and model.

    Args:
        config: The training configuration.
        model: The model to train.
        accelerator: Tells the device and this process's share of the latents, which the first process of it verifies.

    Returns:
        The codec, and the training and held-out latents of this process's share.

    Raises:
        ValueError: If something is missing and cannot be made here, or does not fit.
    """
    data, folder = config.data, Path(config.data.latents)
    share, member = share_of_process(accelerator.process_index, accelerator.num_processes, data.shares)
    missing = [data.vae] if data.source == "digits" and not Path(data.vae).exists() else []
    missing += [] if (folder / MANIFEST).is_file() else [data.latents]
    if missing and accelerator.num_processes > 1:
        command = shlex.join(["accelerate", "launch", "extract_latents.py", *sys.argv[1:]])
        raise ValueError(f"{' and '.join(missing)} must be made first: {command}")

    codec = open_codec(data, accelerator.device)
    if data.latents in missing:
        open_extraction(config, model, codec).run()
    store = LatentStore(folder, share, data.shares, verify=data.verify and member == 0)
    check_made_from(folder, store.manifest, _settings_of(data, store.manifest.class_names))
    check_fits(store.manifest, vae_sha256=codec.fingerprint(), **model_sizes(model))
    train, held_out = store.split(data.holdout, data.split_seed)
    return codec, train, held_out


def share_of_process(rank: int, num_processes: int, shares: int) -> tuple[int, int]:
    """Deal the shares of the latents to consecutive processes, since those of a node are.

    Args:
        rank: A process.
        num_processes: How many there are.
        shares: How many shares there are.

    Returns:
        Its share, and its number among the processes of that share.

    Raises:
        ValueError: If the shares do not divide the processes.
    """
    if num_processes % shares:
        raise ValueError(f"data.shares must divide the number of processes, got {shares} for {num_processes}")
    return divmod(rank, num_processes // shares)


def open_codec(data: DataConfig, device: torch.device) -> LatentCodec:
    """Open the VAE; for the digits, train it where it is missing.

    Args:
        data: The data section.
        device: Where the VAE goes.

    Returns:
        The codec.

    Raises:
        ValueError: If there is no VAE, or none that the codec knows how to use.
    """
    if data.source == "digits":
        make_digits_vae(Path(data.vae), data.holdout, data.split_seed)
    try:
        return LatentCodec(open_vae(data.vae).to(device))
    except ValueError as error:
        raise ValueError(f"data.vae: {error}") from error


def open_extraction(config: Config, model: IwinDiTTransformer2DModel, codec: LatentCodec) -> Extraction:
    """Open the images, and check that their latents will fit the model before any is encoded.

    Args:
        config: The configuration.
        model: The model to train, on any device.
        codec: Of the VAE.

    Returns:
        The extraction, not yet begun.

    Raises:
        ValueError: If the source cannot be opened or does not fit.
        ImportError: If the source needs a package that is not installed.
    """
    data = config.data
    source = open_source(
        data.source,
        split=data.source_split,
        streaming=data.streaming,
        image_key=data.image_key,
        label_key=data.label_key,
        class_names=Path(data.class_names) if data.class_names else None,
        num_classes=config.model["num_classes"],
        part_size=data.shard_size,
    )
    settings = EncodeSettings(
        resolution=data.resolution,
        posterior=data.posterior,
        flips=data.flips,
        dtype=data.latents_dtype,
        shard_size=data.shard_size,
        batch_size=data.encode_batch_size,
        seed=data.split_seed,
    )
    extraction = Extraction(
        source,
        codec,
        Path(data.latents),
        settings,
        vae_id=data.vae,
        source_settings=_source_settings(data),
        decode_threads=data.decode_threads,
        max_broken=data.max_broken_images,
    )
    differences = size_differences(extraction.encoder.latent_shape, len(source.class_names), **model_sizes(model))
    if differences:
        raise ValueError("the data do not fit the model:\n  " + "\n  ".join(differences))
    return extraction


def model_sizes(model: IwinDiTTransformer2DModel) -> ModelSizes:
    """Say what a model takes."""
    return ModelSizes(
        latent_channels=model.config.in_channels,
        sample_size=model.latent_size,
        num_classes=model.config.num_classes,
    )


def _source_settings(data: DataConfig) -> dict[str, str | None]:
    """What of the source is read, by the names of the data section."""
    return {"source_split": data.source_split, "image_key": data.image_key, "label_key": data.label_key}


def _settings_of(data: DataConfig, class_names: tuple[str, ...]) -> dict[str, Any]:
    """What `check_made_from` compares; `class_names` are those of the latents, right where the user gives none."""
    if data.class_names:
        class_names = read_class_names(Path(data.class_names), len(class_names))
    return {
        "data.source": data.source,
        **{f"data.{name}": value for name, value in _source_settings(data).items()},
        "data.class_names": class_names,
        "data.resolution": data.resolution,
        "data.posterior": data.posterior,
        "data.flips": data.flips,
        "data.latents_dtype": data.latents_dtype,
    }
