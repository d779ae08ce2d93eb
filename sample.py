"""Sample from a trained model: every pair of class and seed, and a grid of them; images as PNG, clips as GIF or MP4.

python sample.py --model runs/digits --classes 3 7 --seeds 0-15 --out samples
"""

import argparse
import json
import re
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what needs torch is imported in the functions, so that --help answers at once
    from iwin_dit.evaluation.samples import Pipeline

CLIP_FORMATS = ("gif", "mp4", "frames")
GRID_COLUMNS = 16


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


def parse_formats(text: str) -> list[str]:
    """Read formats such as "gif" or "mp4,frames"."""
    formats = text.split(",")
    if unknown := [name for name in formats if name not in CLIP_FORMATS]:
        raise argparse.ArgumentTypeError(f"expected formats among {', '.join(CLIP_FORMATS)}, got {unknown[0]!r}")
    return formats


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(prog="sample.py", description="Sample every pair of class and seed.")
    parser.add_argument("--model", required=True, help="run folder, checkpoint folder, pipeline folder or Hub id")
    parser.add_argument("--classes", nargs="+", help="names or indices, a name wins (default: the first ten classes)")
    parser.add_argument("--seeds", type=parse_seeds, default="0-7", help="such as 0-15 or 0,4,8 (default: 0-7)")
    parser.add_argument("--out", type=Path, default=Path("samples"), help="folder for the samples (default: samples)")
    parser.add_argument("--grid", type=Path, help="file for the grid (default: grid.png, of clips grid.gif, in --out)")
    parser.add_argument("--steps", type=int, help="sampler steps (default: the pipeline's)")
    parser.add_argument("--guidance", type=float, help="guidance scale, 1 = off (default: the pipeline's)")
    parser.add_argument("--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="guided noise levels")
    parser.add_argument("--guidance-channels", type=int, help="guide only the first so many latent channels")
    parser.add_argument("--height", type=int, help="pixels (default: the training size)")
    parser.add_argument("--width", type=int, help="pixels (default: the training size)")
    parser.add_argument("--batch-size", type=int, help="samples at a time, with equal results (64 images, 8 clips)")
    parser.add_argument("--device", help="default: cuda where there is one, else cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--compile", action="store_true", help="compile the model's blocks: pays off in long runs")
    videos = parser.add_argument_group("video models only")
    videos.add_argument("--frames", type=int, help="frames of a clip (default: as in training)")
    videos.add_argument("--fps", type=float, help="frames per second to play at (default: as in training)")
    videos.add_argument("--format", type=parse_formats, help="gif, mp4 or frames, or several: gif,mp4 (the default)")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Sample and save."""
    arguments = build_parser().parse_args(argv)
    try:
        sample(arguments)
    except (ValueError, FloatingPointError, ImportError, OSError) as error:
        sys.exit(f"sample.py: error: {error}")


def sample(arguments: argparse.Namespace) -> None:
    """Sample every pair and save the samples; raises ValueError for arguments that do not fit the model."""
    import torch
    from tqdm import tqdm

    from iwin_dit.pipelines.pictures import clip_grid, image_grid, save_gif

    pipe = open_pipeline(arguments)
    settings = call_settings(arguments, pipe)
    is_video = "num_frames" in settings
    formats = clip_formats(arguments, settings) if is_video else ["png"]
    grid = arguments.grid or arguments.out / f"grid.{'gif' if is_video else 'png'}"
    if is_video and grid.suffix.lower() != ".gif":
        raise ValueError(f"--grid of clips must be a .gif file, got {grid}")
    names = arguments.classes or range(min(10, pipe.transformer.config.num_classes))
    # A name wins over an index: folders called 0 to 11 sort as 0, 1, 10, 11, 2, ...
    is_index = [name not in pipe.label_ids and str(name).isdecimal() for name in map(str, names)]
    classes = pipe.get_label_ids([int(n) if index else n for n, index in zip(names, is_index, strict=True)])
    labels = [pipe.id2label.get(label, str(label)).split(",")[0] for label in classes]
    columns = grid_columns(arguments, labels, settings)
    pairs = [(label, seed) for label in classes for seed in arguments.seeds]
    for folder in (arguments.out, grid.parent):
        folder.mkdir(parents=True, exist_ok=True)
    record = {"model": arguments.model, "dtype": arguments.dtype, "compiled": arguments.compile, **settings}
    record |= scheduler_and_packages(pipe)
    shown: list[Any] = []  # images, or lists of frames, that the grid will show
    size = arguments.batch_size or (8 if is_video else 64)
    for start in tqdm(range(0, len(pairs), size), desc="sampling", unit="batch"):
        batch = pairs[start : start + size]
        generators = [torch.Generator().manual_seed(seed) for _, seed in batch]
        (new,) = pipe([label for label, _ in batch], generator=generators, return_dict=False, **settings)
        for i, ((label, seed), one) in enumerate(zip(batch, new, strict=True), start):
            stem = arguments.out / file_stem(pipe.id2label, label, seed)
            save_sample(one, stem, formats, {"class": label, "seed": seed, **record})
            shown += [one] * (i % len(arguments.seeds) < columns)

    written = f"wrote {len(pairs)} {'clips' if is_video else 'images'} to {arguments.out}"
    if shown:
        rows = [shown[i : i + columns] for i in range(0, len(shown), columns)]
        if is_video:
            save_gif(clip_grid(rows, labels), grid, settings["fps"])
        else:
            image_grid(rows, labels).save(grid)
        written += f" and a grid of {len(shown)} to {grid}"
    print(written)


def open_pipeline(arguments: argparse.Namespace) -> "Pipeline":
    """Load the model onto its device."""
    import torch

    from iwin_dit.pipelines import load_pipeline

    if arguments.batch_size is not None and arguments.batch_size < 1:
        raise ValueError(f"--batch-size must be at least 1, got {arguments.batch_size}")
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"--device {device}: torch sees no GPU here")
    pipe = load_pipeline(arguments.model, device, getattr(torch, arguments.dtype))
    if pipe.vae is None:
        raise ValueError(f"{arguments.model} has no VAE, so it gives latents alone: convert it again with --vae")
    pipe.set_progress_bar_config(disable=True)
    if arguments.compile:
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    return pipe


def call_settings(arguments: argparse.Namespace, pipe: "Pipeline") -> dict[str, Any]:
    """Settle the pipeline's arguments, so that what is recorded is what runs."""
    given = {"num_inference_steps": arguments.steps, "height": arguments.height, "width": arguments.width}
    given |= {"guidance_scale": arguments.guidance, "guidance_channels": arguments.guidance_channels}
    given["guidance_interval"] = arguments.guidance_interval and tuple(arguments.guidance_interval)
    if pipe.rank == 3:
        given |= {"num_frames": arguments.frames, "fps": arguments.fps}
    elif unfit := [f"--{name}" for name in ("frames", "fps", "format") if getattr(arguments, name) is not None]:
        raise ValueError(f"{arguments.model} makes images, and video models alone take {', '.join(unfit)}")
    return pipe.call_settings(**given)


def clip_formats(arguments: argparse.Namespace, settings: dict[str, Any]) -> list[str]:
    """Formats to write clips in, after a check that it can be done, before the work."""
    from iwin_dit.data.videos import check_mp4
    from iwin_dit.pipelines.pictures import check_gif

    formats = arguments.format or ["gif", "mp4"]
    if "mp4" in formats:
        try:
            check_mp4((settings["width"], settings["height"]), settings["fps"])
        except (ValueError, ImportError) as error:
            if arguments.format is not None:
                raise ValueError(f"{error}; --format gif or --format frames does without") from error
            formats = ["gif"]
            print(f"writing GIFs alone: {error}")
    if "gif" in formats:
        check_gif(settings["fps"])
    return formats


def grid_columns(arguments: argparse.Namespace, labels: Sequence[str], settings: dict[str, Any]) -> int:
    """How many seeds of every class the grid shows; 0 where there can be none, which is said."""
    from iwin_dit.pipelines.pictures import check_grid

    columns, size = min(len(arguments.seeds), GRID_COLUMNS), (settings["width"], settings["height"])
    try:
        check_grid(size, columns, labels, settings.get("num_frames", 1), settings.get("fps"))
    except ValueError as error:
        print(f"no grid: {error}")
        return 0
    return columns


def file_stem(id2label: dict[int, str], label: int, seed: int) -> str:
    """Name a sample by class and seed: class-003-otter-seed-000012; without a name that only repeats the index."""
    name = id2label.get(label, "").split(",")[0]
    safe = "".join(c if c.isalnum() else "_" for c in name)
    middle = f"-{safe}" if safe and safe != str(label) else ""
    return f"class-{label:03d}{middle}-seed-{seed:06d}"


def scheduler_and_packages(pipe: "Pipeline") -> dict[str, Any]:
    """What decides a sample besides the model and the arguments of the call."""
    config = json.loads(pipe.scheduler.to_json_string(), parse_constant=str)  # some hold -Infinity, no JSON
    packages = {name: version(name) for name in ("iwin-dit", "diffusers", "torch")}
    return {"scheduler": {"class": type(pipe.scheduler).__name__, **config}, "packages": packages}


def save_sample(one: Any, stem: Path, formats: Sequence[str], about: dict[str, Any]) -> None:
    """Save an image with its settings in the PNG's text, under "iwin-dit"; of a clip they lie in a JSON beside it."""
    from PIL.PngImagePlugin import PngInfo

    from iwin_dit.data.videos import write_video
    from iwin_dit.files import write_json
    from iwin_dit.pipelines.pictures import save_frames, save_gif

    if not isinstance(one, list):
        info = PngInfo()
        info.add_text("iwin-dit", json.dumps(about))
        one.save(f"{stem}.png", pnginfo=info)
        return
    if "gif" in formats:
        save_gif(one, Path(f"{stem}.gif"), about["fps"])
    if "mp4" in formats:
        write_video(one, Path(f"{stem}.mp4"), about["fps"])
    if "frames" in formats:
        save_frames(one, stem)
    write_json(Path(f"{stem}.json"), about)


if __name__ == "__main__":
    main()
