"""Sample images from a trained model: every pair of class and seed, one PNG each, and a grid.

python sample.py --model runs/digits --classes 3 7 --seeds 0-15 --out samples
"""

import argparse
import inspect
import json
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what needs torch is imported in the functions, so that --help answers at once
    from iwin_dit import IwinDiTPipeline


def parse_seeds(text: str) -> list[int]:
    """Read seeds such as "5", "0-15" or "0-3,8,10-11" (ranges include both ends)."""
    seeds: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if match is None:
            raise argparse.ArgumentTypeError(f"expected seeds such as 5, 0-15 or 0-3,8, got {text!r}")
        seeds += range(int(match[1]), int(match[2] or match[1]) + 1)
    if not seeds:
        raise argparse.ArgumentTypeError(f"the range of seeds is empty: {text!r}")
    return seeds


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(prog="sample.py", description="Sample images: every pair of class and seed.")
    parser.add_argument("--model", required=True, help="run folder, checkpoint folder, pipeline folder or Hub id")
    parser.add_argument(
        "--classes",
        nargs="+",
        help="class names or indices; a name wins over an index (default: the first ten classes)",
    )
    parser.add_argument("--seeds", type=parse_seeds, default="0-7", help="such as 0-15 or 0,4,8 (default: 0-7)")
    parser.add_argument("--out", type=Path, default=Path("samples"), help="folder for the images (default: samples)")
    parser.add_argument("--grid", type=Path, help="file for the grid (default: grid.png in --out)")
    parser.add_argument("--steps", type=int, help="sampler steps (default: the pipeline's)")
    parser.add_argument("--guidance", type=float, help="guidance scale, 1 = off (default: the pipeline's)")
    parser.add_argument(
        "--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="noise levels between which to guide"
    )
    parser.add_argument("--guidance-channels", type=int, help="guide only the first so many latent channels")
    parser.add_argument("--height", type=int, help="pixels (default: the training size)")
    parser.add_argument("--width", type=int, help="pixels (default: the training size)")
    parser.add_argument("--batch-size", type=int, default=64, help="images at a time; changes no image")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Sample and save."""
    arguments = build_parser().parse_args(argv)
    try:
        sample(arguments)
    except (ValueError, FloatingPointError) as error:
        sys.exit(f"sample.py: error: {error}")


def sample(arguments: argparse.Namespace) -> None:
    """Sample every pair and save the images; raises ValueError for arguments that do not fit the model."""
    import torch
    from tqdm import tqdm

    from iwin_dit.pipelines import load_pipeline
    from iwin_dit.pipelines.pictures import image_grid

    if arguments.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {arguments.batch_size}")
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch sees no GPU here")
    pipe = load_pipeline(arguments.model, device, getattr(torch, arguments.dtype))
    if pipe.vae is None:
        raise ValueError(
            f"{arguments.model} has no VAE, so there are latents but no images: convert it again with --vae"
        )
    pipe.set_progress_bar_config(disable=True)
    names = arguments.classes or range(min(10, pipe.transformer.config.num_classes))
    # A name wins over an index: folders called 0 to 11 sort as 0, 1, 10, 11, 2, ...
    is_index = [name not in pipe.label_ids and str(name).isdecimal() for name in map(str, names)]
    classes = pipe.get_label_ids([int(n) if index else n for n, index in zip(names, is_index, strict=True)])
    settings = call_settings(arguments, pipe)

    pairs = [(label, seed) for label in classes for seed in arguments.seeds]
    grid = arguments.grid or arguments.out / "grid.png"
    for folder in (arguments.out, grid.parent):
        folder.mkdir(parents=True, exist_ok=True)
    images = []
    for start in tqdm(range(0, len(pairs), arguments.batch_size), desc="sampling", unit="batch"):
        batch = pairs[start : start + arguments.batch_size]
        generators = [torch.Generator().manual_seed(seed) for _, seed in batch]
        (batch_images,) = pipe([label for label, _ in batch], generator=generators, return_dict=False, **settings)
        for (label, seed), image in zip(batch, batch_images, strict=True):
            about = {"model": arguments.model, "class": label, "seed": seed, "dtype": arguments.dtype, **settings}
            about["scheduler"] = {"class": type(pipe.scheduler).__name__, **json.loads(pipe.scheduler.to_json_string())}
            image.save(arguments.out / file_name(pipe.id2label, label, seed), pnginfo=png_text(about))
        images += batch_images

    columns = len(arguments.seeds)
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    labels = [pipe.id2label.get(label, str(label)).split(",")[0] for label in classes]
    image_grid(rows, labels).save(grid)
    print(f"wrote {len(images)} images to {arguments.out} and a grid to {grid}")


def call_settings(arguments: argparse.Namespace, pipe: "IwinDiTPipeline") -> dict[str, Any]:
    """Collect the pipeline's arguments, its own defaults where none is given, so that what is recorded is what ran."""
    defaults = inspect.signature(pipe.__call__).parameters
    height, width = (n * pipe.stride for n in pipe.transformer.latent_size)
    given = {
        "num_inference_steps": arguments.steps,
        "guidance_scale": arguments.guidance,
        "guidance_interval": arguments.guidance_interval and tuple(arguments.guidance_interval),
        "guidance_channels": arguments.guidance_channels,
        "height": height if arguments.height is None else arguments.height,
        "width": width if arguments.width is None else arguments.width,
    }
    return {name: defaults[name].default if value is None else value for name, value in given.items()}


def file_name(id2label: dict[int, str], label: int, seed: int) -> str:
    """Name an image by class and seed: class-003-otter-seed-000012.png; without a name that only repeats the index."""
    name = id2label.get(label, "").split(",")[0]
    safe = "".join(c if c.isalnum() else "_" for c in name)
    middle = f"-{safe}" if safe and safe != str(label) else ""
    return f"class-{label:03d}{middle}-seed-{seed:06d}.png"


def png_text(about: dict[str, Any]) -> Any:
    """Put the settings of an image into its PNG text, under "iwin-dit", as JSON."""
    from PIL.PngImagePlugin import PngInfo

    packages = {name: version(name) for name in ("iwin-dit", "diffusers", "torch")}
    info = PngInfo()
    info.add_text("iwin-dit", json.dumps({**about, "packages": packages}))
    return info


if __name__ == "__main__":
    main()
