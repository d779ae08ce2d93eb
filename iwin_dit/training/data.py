"""The VAE and the latents that a configuration names: made, opened and checked against its model."""

import dataclasses
import shlex
import sys
from pathlib import Path
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator

from ..data.codec import LatentCodec, encoder_channels
from ..data.encode import EncodeSettings
from ..data.extract import Extraction
from ..data.facts import check_made_from
from ..data.latents import LatentDataset, LatentStore, check_fits, size_differences
from ..data.manifest import MANIFEST, Manifest
from ..data.prepare import ModelSizes, make_digits_vae, open_vae
from ..data.sources import BUILT_IN, open_source, read_class_names
from ..models.transformer import IwinDiTCore
from .batches import ImageSteps
from .config import Config, DataConfig


def open_data(
    config: Config, model: IwinDiTCore, accelerator: Accelerator
) -> tuple[LatentCodec, LatentDataset, LatentDataset]:
    """Open VAE and latents, made where they are missing, and check that they fit configuration and model.

    Args:
        config: The training configuration.
        model: The model to train.
        accelerator: Tells the device and this process's share of the latents, which the first process of a share
            and of a machine verifies.

    Returns:
        The codec, and the training and held-out latents of this process's share.

    Raises:
        ValueError: If something is missing and cannot be made here, or does not fit.
    """
    data, folder = config.data, Path(config.data.latents)
    share, member = share_of_process(accelerator.process_index, accelerator.num_processes, data.shares)
    missing = [data.vae] if data.source in BUILT_IN and not Path(data.vae).exists() else []
    missing += [] if (folder / MANIFEST).is_file() else [data.latents]
    if missing and accelerator.num_processes > 1:
        command = shlex.join(["accelerate", "launch", "extract_latents.py", *sys.argv[1:]])
        raise ValueError(f"{' and '.join(missing)} must be made first: {command}")

    codec = open_codec(data, accelerator.device)
    image_steps(config, codec)  # refuses a VAE that takes no single frames, before anything is encoded
    if data.latents in missing:
        open_extraction(config, model, codec).run()
    verify = data.verify and (member == 0 or accelerator.is_local_main_process)
    store = LatentStore(folder, share, data.shares, verify=verify)
    check_made_from(folder, dataclasses.asdict(store.manifest), _wanted(data, store.manifest.class_names))
    check_fits(store.manifest, vae_sha256=codec.stored_fingerprint(), **model_sizes(model))
    train, held_out = store.split(data.holdout, data.split_seed)
    return with_statistics(codec, data, store.manifest), train, held_out


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
    """Open the VAE; for the digits, still or moving, train it where it is missing.

    Args:
        data: The data section.
        device: Where the VAE goes.

    Returns:
        The codec, which encodes; before it normalises or decodes, it needs `with_statistics`.

    Raises:
        ValueError: If there is no VAE, none that the codec knows how to use, or one with statistics per channel of its
            own where those of the data are wanted.
    """
    if data.source in BUILT_IN:
        built_in = cast(Literal["digits", "moving_digits"], data.source)
        # A count is of clips, and the VAE holds out the digits that they are of.
        holdout = data.holdout // data.clips_per_video if isinstance(data.holdout, int) else data.holdout
        make_digits_vae(Path(data.vae), built_in, holdout, data.split_seed)
    try:
        vae = open_vae(data.vae).to(device)
        if data.latent_statistics == "vae":
            return LatentCodec(vae)
        channels = encoder_channels(vae)  # the data's statistics are not known yet, but whether they may be given
        return LatentCodec(vae, [0.0] * channels, [1.0] * channels)
    except ValueError as error:
        raise ValueError(f"data.vae: {error}") from error


def with_statistics(codec: LatentCodec, data: DataConfig, manifest: Manifest) -> LatentCodec:
    """Make a codec normalise with the statistics that the configuration names.

    Args:
        codec: As `open_codec` gives it.
        data: The data section.
        manifest: Of the finished latents.

    Returns:
        The codec that training and sampling need.

    Raises:
        ValueError: If a channel of the latents is constant.
    """
    if data.latent_statistics == "vae":
        return codec
    return LatentCodec(codec.vae, manifest.latents_mean, manifest.latents_std)


def image_steps(config: Config, codec: LatentCodec) -> ImageSteps | None:
    """Decide how steps on single frames take them.

    Args:
        config: Says how many steps that are.
        codec: Says what a latent frame is: a frame, or with a video VAE several of them, but for the first.

    Returns:
        That; None where no step is of single frames.

    Raises:
        ValueError: If the VAE cannot encode a single frame, so that none of its latent frames is an image's.
    """
    data = config.data
    if not data.image_steps:
        return None
    try:
        codec.latent_size((1, data.resolution, data.resolution))
    except ValueError as error:
        raise ValueError(
            f"data.image_steps is {data.image_steps}, and data.vae takes no single frame: {error}"
        ) from error
    return ImageSteps(data.image_steps, config.train.batch_size, first=codec.temporal_stride > 1)


def open_extraction(config: Config, model: IwinDiTCore, codec: LatentCodec) -> Extraction:
    """Open the images or clips, and check that their latents will fit the model before any is encoded.

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
        revision=data.source_revision,
        config=data.source_config,
        streaming=data.streaming,
        image_key=data.image_key,
        label_key=data.label_key,
        class_names=Path(data.class_names) if data.class_names else None,
        num_classes=config.model["num_classes"],
        part_size=data.shard_size,
        clips=data.clips,
    )
    settings = EncodeSettings(
        resolution=data.resolution,
        posterior=data.posterior,
        flips=data.flips,
        dtype=data.latents_dtype,
        shard_size=data.shard_size,
        batch_size=data.encode_batch_size,
        clips=data.clips,
    )
    extraction = Extraction(
        source,
        codec,
        Path(data.latents),
        settings,
        vae_id=data.vae,
        source_settings=_source_settings(data),
        decode_threads=data.decode_threads,
        max_broken=data.max_broken,
    )
    differences = size_differences(extraction.encoder.latent_shape, len(source.class_names), **model_sizes(model))
    if differences:
        raise ValueError("the data do not fit the model:\n  " + "\n  ".join(differences))
    return extraction


def model_sizes(model: IwinDiTCore) -> ModelSizes:
    """Say what a model takes."""
    return ModelSizes(
        latent_channels=model.config.in_channels,
        sample_size=model.latent_size,
        num_classes=model.config.num_classes,
    )


def _source_settings(data: DataConfig) -> dict[str, str | None]:
    """What of the source is read, by the names of the data section."""
    names = ("source_split", "source_revision", "source_config", "image_key", "label_key")
    return {name: getattr(data, name) for name in names}


def _wanted(data: DataConfig, class_names: tuple[str, ...]) -> dict[str, Any]:
    """Fields of a manifest that serves; `class_names` are those of the latents, right where the user gives none."""
    if data.class_names:
        class_names = read_class_names(Path(data.class_names), len(class_names))
    return {
        "source": data.source,
        "source_settings": _source_settings(data),
        "class_names": class_names,
        "resolution": data.resolution,
        "posterior": data.posterior,
        "flips": data.flips,
        "dtype": data.latents_dtype,
        "clips": None if data.clips is None else dataclasses.asdict(data.clips),
    }
