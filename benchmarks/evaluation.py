"""Where the time and the memory of an evaluation go: the network's share of the time, statistics, Frechet distance.

    python -m benchmarks.evaluation [--device cuda] [--images 4096] [--out FILE.json]

The Inception is the real one with random weights, unless --weights is given: speed does not depend on their values.
`network` is the bare forward pass of images that lie on the device, resized there; the others are whole passes:
reading, transfer, resize, network and statistics. The memory is that of a whole evaluation beside its network, which
random features stand in for.
"""

import argparse
import functools
import re
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import torch
from PIL import Image

from benchmarks.measure import Step, check_device, describe_machine, quartiles, time_interleaved
from benchmarks.options import positive
from benchmarks.seeded_inception import open_inception
from iwin_dit.evaluation.evaluator import Evaluator, Request
from iwin_dit.evaluation.partial import Partial
from iwin_dit.evaluation.passes import run_pass
from iwin_dit.evaluation.suite import Side
from iwin_dit.files import write_json
from iwin_dit.metrics.frechet import frechet_distance
from iwin_dit.metrics.images import ImageSet, ImageTensor, open_images
from iwin_dit.metrics.moments import Moments
from iwin_dit.metrics.network import FeatureNetwork

METRICS, WIDTHS = ("fid", "sfid"), {"pool": 2048, "spatial": 2023}
SAMPLED_EVERY = 0.005  # seconds, of memory
SAVED_EVERY = 10.0  # seconds, of the statistics so far


class RandomFeatures(FeatureNetwork):
    """Random numbers in place of the Inception's features, whatever the images.

    Args:
        device: Where to draw them.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.widths = dict(WIDTHS)
        self._generator = torch.Generator(device).manual_seed(0)

    def forward(self, images: torch.Tensor) -> dict[str, torch.Tensor]:
        """Draw the features of a batch."""
        draw = functools.partial(torch.rand, generator=self._generator, device=self._generator.device)
        return {name: draw(len(images), width) for name, width in self.widths.items()}

    def describe(self) -> dict[str, Any]:
        """What a record says of it."""
        return {"name": "random features"}


class PeakMemory:
    """Watches this process's anonymous memory from a thread while in a `with` block.

    Attributes:
        bytes: The highest found above that at the beginning; None where the system does not tell.
    """

    def __init__(self) -> None:
        self.bytes: int | None = None
        self._before = anonymous_memory()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> "PeakMemory":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while self._before is not None:
            self.bytes = max(self.bytes or 0, (anonymous_memory() or 0) - self._before)
            if self._stop.wait(SAMPLED_EVERY):
                break


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
        "png": open_images(folder / "png", allow_lossy=False),
        "npz": open_images(folder / "images.npz", allow_lossy=False),
    }


def anonymous_memory() -> int | None:
    """Bytes of memory of this process that no file backs; None where the system does not tell."""
    status = Path("/proc/self/status")
    found = re.search(r"RssAnon:\s+(\d+) kB", status.read_text()) if status.exists() else None
    return int(found[1]) * 1024 if found else None


def write_tiny(path: Path, count: int) -> Path:
    """Random images of 4 x 4 pixels as an .npz: there are as many as are asked for, and they take no memory."""
    np.savez(path, np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), dtype=np.uint8))
    return path


def measure_memory(count: int, batch: int, device: torch.device, folder: Path) -> int | None:
    """Highest memory of a whole evaluation by FID and sFID beside its network: `count` images against as many.

    The reference comes as images, which takes more than a file of statistics, and the statistics so far are saved on
    the way.
    """
    real, fake = (write_tiny(folder / f"{name}-{count}.npz", count) for name in ("real", "fake"))
    networks = {"inception": RandomFeatures(device)}
    evaluator = Evaluator(Request(METRICS, str(real), batch_size=batch), device, networks=networks)
    images = open_images(fake, allow_lossy=False)
    with PeakMemory() as peak:
        partial = Partial(folder / f"partial-{count}", evaluator.request_for(images), save_every=SAVED_EVERY)
        evaluator.measure(images, partial=partial, progress=False)
    return peak.bytes


def time_distance(device: torch.device) -> float:
    """Seconds of a Frechet distance of 2,048 features alone."""
    generator = torch.Generator(device).manual_seed(0)
    gaussians = []
    for _ in range(2):
        moments = Moments(WIDTHS["pool"], device)
        moments.update(torch.rand(2 * WIDTHS["pool"], WIDTHS["pool"], generator=generator, device=device))
        gaussians.append(moments.gaussian())
    started = time.perf_counter()
    frechet_distance(*gaussians)
    return time.perf_counter() - started


def measure_statistics(count: int, batch: int, device: torch.device, folder: Path) -> dict[str, Any]:
    """Time of a distance, then memory of an evaluation: libraries keep for good what their first call takes."""
    seconds = time_distance(device)
    return {
        "images": count,
        "peak_bytes_above_start": measure_memory(count, batch, device, folder),
        "seconds_per_distance": seconds,
    }


def measure_passes(arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Images per second of the bare network and of whole passes over the same images, in turns."""
    device = torch.device(arguments.device)
    network = open_inception(arguments.weights, ("pool", "spatial")).to(device)
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
    title = f"memory beside the network, fid and sfid, {statistics['images']} images a side"
    lines += ["", f"| {title} | {memory} |", "|---|---:|"]
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
    check_device(parser, arguments.device)
    device = torch.device(arguments.device)
    record: dict[str, Any] = {
        "command": " ".join(["python -m benchmarks.evaluation", *(sys.argv[1:] if argv is None else argv)]),
        "machine": describe_machine(device),
    }
    with tempfile.TemporaryDirectory() as folder:
        record["statistics"] = measure_statistics(arguments.count, 50, device, Path(folder))
        record["passes"] = measure_passes(arguments, Path(folder))
    print(tables(record))
    if arguments.out is not None:
        write_json(arguments.out, record)


if __name__ == "__main__":
    main()
