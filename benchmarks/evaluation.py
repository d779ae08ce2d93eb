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


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print a table, and write it all as JSON if asked."""
    parser = argparse.ArgumentParser(description="Time and memory of an evaluation.")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--images", type=positive, default=32, help="images per pass; some thousands on a GPU")
    parser.add_argument("--size", type=positive, default=256, help="pixels")
    parser.add_argument("--batch-size", type=positive, default=16)
    parser.add_argument("--repeats", type=positive, default=3)
    parser.add_argument("--count", type=positive, default=50_000, help="images of the statistics")
    parser.add_argument("--weights", type=Path, help="real Inception weights")
    parser.add_argument("--out", type=Path, help="JSON to write")
    arguments = parser.parse_args(argv)
    record: dict[str, Any] = {
        "command": ["python", "-m", "benchmarks.evaluation", *(sys.argv[1:] if argv is None else argv)],
        "machine": describe_machine(torch.device(arguments.device)),
    }
    record["statistics"] = measure_statistics(arguments.count, 50, torch.device(arguments.device))
    with tempfile.TemporaryDirectory() as folder:
        record["passes"] = measure_passes(arguments, Path(folder))
    print_tables(record)
    if arguments.out:
        write_json(arguments.out, record)


def print_tables(record: dict[str, Any]) -> None:
    """Print what was measured, as Markdown."""
    passes, statistics = record["passes"], record["statistics"]
    print("| images from | images/s | network's share of the time |\n|---|---:|---:|")
    for name, rates in passes["images_per_second"].items():
        print(f"| {name} | {rates[1]:.1f} | {passes['share_of_the_network'][name][1]:.1%} |")
    peak = statistics["peak_bytes_above_start"]
    print(f"\nstatistics of both sides, fid and sfid, {statistics['images']} images: ", end="")
    print("not known here" if peak is None else f"{peak / 2**20:.0f} MiB above the start")
    print(f"Frechet distance at d = 2048: {statistics['seconds_per_distance']:.2f} s")


if __name__ == "__main__":
    main()
