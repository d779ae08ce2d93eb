"""Where the time and the memory of an evaluation go: the network's share of the time, statistics, Frechet distance.

    python -m benchmarks.evaluation [--device cuda] [--images 4096] [--out FILE.json]

The Inception is the real one with random weights, unless --weights is given: speed does not depend on their values.
`network` is the bare forward pass of images that lie on the device, resized there; the others are whole passes:
reading, transfer, resize, network and statistics.
"""

import argparse
import functools
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.block import positive
from benchmarks.measure import Step, describe_machine, quartiles, time_interleaved
from benchmarks.seeded_inception import write_seeded_weights
from iwin_dit.evaluation.passes import run_pass
from iwin_dit.evaluation.suite import Side
from iwin_dit.files import sha256, write_json
from iwin_dit.metrics.frechet import frechet_distance
from iwin_dit.metrics.images import ImageSet, ImageTensor, open_images
from iwin_dit.metrics.inception import WEIGHTS_SHA256_PREFIX, InceptionFeatures
from iwin_dit.metrics.moments import Moments

METRICS, WIDTHS = ("fid", "sfid"), {"fid": 2048, "sfid": 2023}


def smooth_images(count: int, size: int) -> torch.Tensor:
    """Images (count, 3, size, size) uint8 that compress as photos do: random blobs, enlarged."""
    coarse = torch.rand(count, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    enlarged = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic", align_corners=False)
    return (enlarged.clamp(0, 1) * 255).round().to(torch.uint8)


def write_sets(images: torch.Tensor, folder: Path) -> dict[str, ImageSet]:
    """The same images in memory, as a folder of PNGs, and as the array of an .npz."""
    arrays = images.permute(0, 2, 3, 1).numpy()
    (folder / "png").mkdir()
    for i, array in enumerate(arrays):
        Image.fromarray(array).save(folder / "png" / f"{i:06d}.png")
    np.savez(folder / "images.npz", arrays)
    return {
        "memory": ImageTensor(images, "memory"),
        "png": open_images(folder / "png", allow_jpeg=False),
        "npz": open_images(folder / "images.npz", allow_jpeg=False),
    }


def anonymous_memory() -> int | None:
    """Bytes of memory of this process that no file backs; None where the system does not tell."""
    status = Path("/proc/self/status")
    found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else None


def measure_statistics(count: int, batch: int, device: torch.device) -> dict[str, Any]:
    """Memory of the statistics of both sides of FID and sFID over `count` images, and the time of their distances."""
    generator = torch.Generator(device).manual_seed(0)
    features = {width: torch.rand(batch, width, generator=generator, device=device) for width in WIDTHS.values()}
    before, highest = anonymous_memory(), 0
    sides = [{name: Moments(width, device) for name, width in WIDTHS.items()} for _ in range(2)]
    for start in range(0, count, batch):
        for side in sides:
            for name, width in WIDTHS.items():
                noise = torch.rand(batch, 1, generator=generator, device=device)
                side[name].update(features[width].roll(start, dims=1) * noise)
        highest = max(highest, anonymous_memory() or 0)
    gaussians = {name: [side[name].gaussian() for side in sides] for name in WIDTHS}
    started = time.perf_counter()
    for name in WIDTHS:
        frechet_distance(*gaussians[name])
    return {
        "images": count,
        "peak_bytes_above_start": None if before is None else highest - before,
        "seconds_per_distance": (time.perf_counter() - started) / len(WIDTHS),
    }


def measure_passes(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Images per second of the bare network and of whole passes over the same images, in turns."""
    device = torch.device(arguments.device)
    weights = arguments.weights or write_seeded_weights(folder / "inception.pth")
    prefix = WEIGHTS_SHA256_PREFIX if arguments.weights else sha256(weights)
    network = InceptionFeatures(weights, "adm", ("pool", "spatial"), sha256_prefix=prefix).to(device)
    images = smooth_images(arguments.images, arguments.size)
    sets = write_sets(images, folder)
    resident = images.to(device).split(arguments.batch_size)

    def bare() -> None:
        for batch in resident:
            network(batch)

    def whole(images: ImageSet) -> None:
        side = Side(METRICS, {"inception": network}, len(images), device, real=False)
        run_pass(images, range(len(images)), arguments.batch_size, device, side.update, progress=False)

    steps: dict[str, Step] = {"network": bare}
    steps |= {name: functools.partial(whole, images) for name, images in sets.items()}
    seconds = time_interleaved(steps, device, arguments.repeats)
    shares = {
        name: quartiles([a / b for a, b in zip(seconds["network"], seconds[name], strict=True)]) for name in steps
    }
    rates = {name: quartiles([arguments.images / s for s in seconds[name]]) for name in steps}
    return {"images_per_second": rates, "share_of_the_network": shares}


def tables(record: dict[str, Any]) -> str:
    """Format what was measured, for the terminal and for Markdown."""
    passes, statistics = record["passes"], record["statistics"]
    lines = ["| images from | images/s | the network's share of the time |", "|---|---:|---:|"]
    for name, rates in passes["images_per_second"].items():
        lines.append(f"| {name} | {rates[1]:.1f} | {passes['share_of_the_network'][name][1]:.1%} |")
    peak = statistics["peak_bytes_above_start"]
    memory = "not known here" if peak is None else f"{peak / 2**20:.0f} MiB"
    lines += ["", f"| statistics of both sides, fid and sfid, {statistics['images']} images | {memory} |", "|---|---:|"]
    lines.append(f"| Frechet distance of 2,048 features | {statistics['seconds_per_distance']:.1f} s |")
    return "\n".join(lines)


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    description = "Measure time and memory of an evaluation."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.evaluation", description=description)
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--images", type=positive, default=32, help="images per pass; some thousands on a GPU")
    parser.add_argument("--size", type=positive, default=256, help="pixels")
    parser.add_argument("--batch-size", type=positive, default=16, help="images at a time; 50 and more on a GPU")
    parser.add_argument("--repeats", type=positive, default=3, help="rounds, after a warm-up")
    parser.add_argument("--count", type=positive, default=50_000, help="images of the statistics")
    parser.add_argument("--weights", type=Path, help="the real Inception's; drawn from a seed otherwise")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no CUDA device here, leave it out to measure on the CPU")
    device = torch.device(arguments.device)
    record: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.evaluation", *(sys.argv[1:] if argv is None else argv)]),
        "machine": describe_machine(device),
        "statistics": measure_statistics(arguments.count, 50, device),
    }
    with tempfile.TemporaryDirectory() as folder:
        record["passes"] = measure_passes(arguments, Path(folder))
    print(tables(record))
    if arguments.out is not None:
        write_json(arguments.out, record)


if __name__ == "__main__":
    main()
