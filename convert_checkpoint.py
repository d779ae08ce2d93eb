"""Turn a published checkpoint into a pipeline folder.

python convert_checkpoint.py flashdit flashdit-xl-win8-imagenet256-56ep.pt --out models/flashdit-xl \
    --num-attention-heads 16 --window-size 8 8 --sample-size 16 --vae PATH_OR_ID --latent-stats latents_stats.pt
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(
        prog="convert_checkpoint.py", description="Turn a published checkpoint into a pipeline folder."
    )
    formats = parser.add_subparsers(dest="format", required=True)
    flashdit = formats.add_parser("flashdit", help="FlashDiT, as published: .pt or .safetensors")
    flashdit.add_argument("checkpoint", type=Path)
    flashdit.add_argument("--out", type=Path, required=True, help="pipeline folder to write; new or empty")
    flashdit.add_argument("--num-attention-heads", type=int, required=True)
    flashdit.add_argument("--window-size", type=int, nargs=2, required=True, metavar=("H", "W"))
    flashdit.add_argument("--sample-size", type=int, required=True, help="latent side the model was trained for")
    flashdit.add_argument("--vae", help="VAE folder or Hub id; without it the pipeline gives latents only")
    flashdit.add_argument(
        "--latent-stats", type=Path, help="latents_stats.pt, or JSON with latents_mean and latents_std"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Convert."""
    arguments = build_parser().parse_args(argv)
    try:
        convert(arguments)
    except ValueError as error:
        sys.exit(f"convert_checkpoint.py: error: {error}")


def convert(arguments: argparse.Namespace) -> None:
    """Read, convert and save; raises ValueError where anything does not fit."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    from iwin_dit import IwinDiTPipeline
    from iwin_dit.convert import convert_flashdit, read_checkpoint, read_latent_stats
    from iwin_dit.convert.flashdit import SHIFT
    from iwin_dit.data.prepare import open_vae

    if arguments.out.exists() and (not arguments.out.is_dir() or any(arguments.out.iterdir())):
        raise ValueError(f"--out must be a new or empty folder, got {arguments.out}")
    vae = open_vae(arguments.vae) if arguments.vae else None
    if vae is not None and not arguments.latent_stats and vae.config.get("latents_mean") is None:
        raise ValueError("FlashDiT normalises its latents per channel: give --latent-stats with this --vae")
    mean, std = read_latent_stats(arguments.latent_stats) if arguments.latent_stats else (None, None)
    model = convert_flashdit(
        read_checkpoint(arguments.checkpoint),
        arguments.num_attention_heads,
        arguments.window_size,
        arguments.sample_size,
    )
    for name, values in (("mean", mean), ("std", std)):
        if values is not None and len(values) != model.config.in_channels:
            raise ValueError(
                f"--latent-stats has {len(values)} values of {name}, the model has {model.config.in_channels} channels"
            )
    if vae is not None and mean is not None and "latents_mean" in vae.config:
        # Where diffusers keeps them; the published normalisation has no scaling or shift besides.
        vae.register_to_config(latents_mean=mean, latents_std=std, scaling_factor=1.0, shift_factor=None)
        mean = std = None
    pipeline = IwinDiTPipeline(
        model, vae, FlowMatchEulerDiscreteScheduler(shift=SHIFT), latents_mean=mean, latents_std=std
    )
    pipeline.save_pretrained(arguments.out)
    print(f"wrote {arguments.out}: {model.num_parameters() / 1e6:.2f}M parameters, gate {model.config.gate!r}")
    if vae is None:
        print("without --vae the pipeline gives latents only: load it with from_pretrained(..., vae=...) for images")


if __name__ == "__main__":
    main()
