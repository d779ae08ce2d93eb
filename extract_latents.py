"""Encode images or clips to latents with the VAE that a configuration names, on any number of processes and machines.

accelerate launch extract_latents.py --config configs/imagenet256_xl.yaml   # the same command again continues

It reads the configuration and the arguments of train_dit.py, and of them the sections `data` and `model`: the model
has no weights here, but what it takes is checked before anything is encoded.
"""

import logging
from datetime import timedelta
from pathlib import Path

import torch
import yaml
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from safetensors import SafetensorError

from iwin_dit.data.codec import LatentCodec
from iwin_dit.data.manifest import Manifest
from iwin_dit.training.config import Config, parse_config
from iwin_dit.training.data import open_codec, open_extraction, with_statistics
from iwin_dit.training.ranks import main_first
from iwin_dit.training.runtime import check_launch, use_all_cores

logger = logging.getLogger("extract_latents")

LONGEST_WAIT = timedelta(days=7)  # of a process whose parts are done for the others
NEAR_ONE = (0.5, 2.0)  # standard deviations of the model latents that need no second look


def main(arguments: list[str] | None = None) -> None:
    """Read the configuration and extract; a mistake of the user's is one line, without a traceback."""
    default = str(Path(__file__).parent / "configs" / "digits.yaml")
    config = parse_config(arguments, default_config=default, prog="extract_latents.py")
    try:
        accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)])
        check_launch(accelerator)
        extract(config, accelerator)
        accelerator.end_training()
    except (ValueError, ImportError, OSError, SafetensorError) as error:  # the last two: no space, no permission
        raise SystemExit(f"extract_latents.py: error: {error}") from error


def extract(config: Config, accelerator: Accelerator) -> None:
    """Open VAE and source, encode what is missing, and say what there is.

    Args:
        config: The configuration.
        accelerator: Of this process.

    Raises:
        ValueError: For every mistake of the user's.
    """
    if config.overwrite or config.resume != "latest":
        raise ValueError("--overwrite and --resume are for train_dit.py; to extract again, delete data.latents")
    main_process = accelerator.is_main_process
    logging.basicConfig(level=logging.INFO if main_process else logging.WARNING, format="%(message)s")
    if accelerator.device.type == "cpu":
        use_all_cores()
    if config.dry_run:
        logger.info("%s", yaml.safe_dump(config.to_dict()["data"], sort_keys=False))
        return
    codec = main_first(accelerator, lambda: open_codec(config.data, accelerator.device))  # which trains the digits' VAE
    with torch.device("meta"):
        model = config.build_model()
    extraction = open_extraction(config, model, codec)
    extraction.run(accelerator.process_index, accelerator.num_processes, accelerator.wait_for_everyone)
    if main_process:
        codec = with_statistics(codec, config.data, Manifest.load(extraction.out))
        logger.info("%s", summary(extraction.out, codec, extraction.source.num_ignored))


def summary(folder: Path, codec: LatentCodec, num_ignored: int) -> str:
    """Describe a folder of latents, with a warning where the VAE's statistics do not suit the data.

    Args:
        folder: The folder, complete.
        codec: With the statistics that training will use.
        num_ignored: Files of the source that were left out.

    Returns:
        Some lines.
    """
    manifest = Manifest.load(folder)
    size = sum((folder / file).stat().st_size for file in manifest.files())
    mean = (torch.tensor(manifest.latents_mean) - codec.mean) / codec.std
    std = torch.tensor(manifest.latents_std) / codec.std
    clips = manifest.clips
    lines = [
        f"{'images' if clips is None else 'clips':13}{manifest.count:,} in {len(manifest.class_names)} classes of "
        f"{min(manifest.class_counts):,} to {max(manifest.class_counts):,}; {len(manifest.broken)} broken ones "
        f"skipped, {num_ignored} other files left out",
        f"latents      {' x '.join(map(str, manifest.latent_shape))} {manifest.dtype}, posterior {manifest.posterior}, "
        f"{'with' if manifest.flips else 'without'} mirror images",
        f"on disk      {size / 1e9:.3f} GB in {len(manifest.shards)} shard(s) in {folder}",
        f"model latents, mean per channel  {_numbers(mean)}",
        f"               std per channel   {_numbers(std)}",
    ]
    if clips is not None:
        lines.insert(
            1,
            f"frames       {clips['frames']} of {manifest.resolution} x {manifest.resolution} pixels in each clip, "
            f"{clips['frame_rate'] / clips['frame_stride']:g} per second",
        )
    if not ((std > NEAR_ONE[0]) & (std < NEAR_ONE[1])).all():
        lines.append("WARNING: diffusion expects standard deviations near 1. " + _advice(codec))
    return "\n".join(lines)


def _advice(codec: LatentCodec) -> str:
    if codec.has_own_statistics:  # which LatentCodec lets nobody replace
        return f"{type(codec.vae).__name__} normalises by statistics of its own, which do not suit this data"
    return (
        "Train with --data.latent_statistics data, which normalises these latents by their own statistics; nothing "
        "needs to be extracted again"
    )


def _numbers(values: torch.Tensor) -> str:
    return " ".join(f"{value:.2f}" for value in values.tolist())


if __name__ == "__main__":
    main()
