"""Suite `data`: how fast stored latents are read in random order from a warm page cache, and what memory that takes.

The set is synthetic, 4 x 32 x 32 float16 as of a 256-pixel image and an f8d4 VAE, and in the real format.
`read` is `LatentDataset.get` alone, `training` a whole batch with noise, times and label draws (`MicroBatches`).
"""

import argparse
import functools
import itertools
import re
import sys
import tempfile
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from benchmarks.goals import Result, as_dicts, markdown
from benchmarks.measure import WARM_UP, quartiles, time_interleaved
from benchmarks.options import positive
from iwin_dit.data.extract import write_labels, write_shard
from iwin_dit.data.latents import LatentDataset, LatentStore, positions_to_indices
from iwin_dit.data.manifest import FORMAT_VERSION, Manifest, Posterior, stored_shape
from iwin_dit.training.batches import MicroBatches

LATENT_SHAPE = (4, 32, 32)
CLASSES = 1000
WORKERS = (0, 2)


def add_options(parser: argparse.ArgumentParser, suite: str, device: str) -> None:  # noqa: ARG001  (those of a Suite)
    """Add the suite's options."""
    parser.add_argument("--items", type=positive, default=1_000_000, help="latents, 8 KiB each (mean_std: 16)")
    parser.add_argument("--posterior", choices=("mean", "mean_std"), default="mean")
    parser.add_argument("--batch", type=positive, default=256, help="latents per batch")
    parser.add_argument("--batches", type=positive, default=80, help="per round")
    parser.add_argument("--reads", type=positive, default=1_000_000, help="latents to read while memory is watched")
    parser.set_defaults(repeats=9)


def prepare(arguments: argparse.Namespace) -> None:
    """Check what was asked for.

    Args:
        arguments: Parsed.

    Raises:
        ValueError: Where memory cannot be read, or for a device other than the CPU.
    """
    if sys.platform != "linux":
        raise ValueError("memory is read from /proc, which only Linux has")
    if arguments.device != "cpu":
        raise ValueError(f"--suite data is of the CPU alone, got --device {arguments.device}")


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Write the latents, and read them in every way.

    Args:
        arguments: As prepared.

    Returns:
        `results` for the goals, `rows` by way of reading, `anonymous_memory`.
    """
    with tempfile.TemporaryDirectory() as name:
        write_synthetic(Path(name), arguments.items, arguments.posterior)
        print(f"{arguments.items:,} latents written, which leaves them in the page cache", file=sys.stderr)
        data = LatentDataset(LatentStore(Path(name), verify=False), np.arange(arguments.items))
        memory = measure_memory(data, arguments.batch, arguments.reads)  # warms up the rest
        rows = measure_speed(data, arguments.batch, arguments.batches, arguments.repeats)
    low, median, high = (speed / 1000 for speed in rows[0]["latents_per_second"])
    result = Result("latents read, 1000/s", "0 workers", (low, median, high))
    return {"results": as_dicts([result]), "rows": rows, "anonymous_memory": memory}


class Reads(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Batches of latents and labels in the random order of training, and nothing else.

    Args:
        data: The latents.
        batch: Latents per batch.
    """

    def __init__(self, data: LatentDataset, batch: int) -> None:
        self.data, self.batch = data, batch

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        positions = np.arange(index * self.batch, (index + 1) * self.batch)
        return self.data.get(positions_to_indices(positions, len(self.data), seed=0))


def write_synthetic(
    folder: Path,
    items: int,
    posterior: Posterior = "mean",
    shard_size: int = 4096,
    shape: tuple[int, ...] = LATENT_SHAPE,
) -> None:
    """Write a folder of random latents; all shards hold the same ones, each in its own file.

    Args:
        folder: An empty folder.
        items: Images to stand for.
        posterior: What of the posterior is stored.
        shard_size: Images per file.
        shape: Of a latent, (C, h, w).
    """
    generator = torch.Generator().manual_seed(0)
    stored = stored_shape(shape, posterior, flips=False)
    latents = torch.randn(min(items, shard_size), *stored, generator=generator).half()
    labels = torch.arange(items) % CLASSES
    shards = tuple(
        write_shard(folder / f"{number:05d}-000.safetensors", latents[: len(part)], part.clone())
        for number, part in enumerate(labels.split(shard_size))
    )
    Manifest(
        format_version=FORMAT_VERSION,
        source="synthetic",
        source_fingerprint="none",
        source_settings={},
        class_names=tuple(map(str, range(CLASSES))),
        class_counts=tuple(labels.bincount(minlength=CLASSES).tolist()),
        resolution=256,
        latent_shape=shape,
        dtype="float16",
        posterior=posterior,
        flips=False,
        shard_size=shard_size,
        vae_id="none",
        vae_sha256="none",
        vae_config_sha256="none",
        latents_mean=(0.0,) * shape[0],
        latents_std=(1.0,) * shape[0],
        shards=shards,
        labels_sha256=write_labels(folder, labels),
        broken=(),
        packages={},
    ).save(folder)


def anonymous_memory() -> int:
    """Bytes of this process that no file backs (Linux): mapped latents do not count, copies of them do."""
    match = re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) * 1024


def measure_speed(data: LatentDataset, batch: int, batches: int, repeats: int) -> list[dict[str, Any]]:
    """Time every way of reading, in rounds of `batches` batches of `batch` latents each.

    Args:
        data: The latents.
        batch: Latents per batch.
        batches: Batches per round.
        repeats: Rounds that are counted.

    Returns:
        One row per way and number of workers, as written to JSON.
    """
    last = batches * (WARM_UP + repeats)
    rows = []
    for what, workers in itertools.product(("read", "training"), WORKERS):
        loader: DataLoader[Any]
        if what == "read":
            loader = DataLoader(Reads(data, batch), batch_size=None, sampler=range(last), num_workers=workers)
        else:
            posterior = data.manifest.posterior == "mean_std"
            batches_of = MicroBatches(data, 0, batch, num_processes=1, rank=0, posterior=posterior)
            loader = batches_of.loader(0, last, num_workers=workers)
        step = functools.partial(consume, iter(loader), batches)
        # One after the other: the workers of two loaders would fill their queues at each other's expense.
        seconds = time_interleaved({what: step}, torch.device("cpu"), repeats)[what]
        speed = quartiles([batch * batches / s for s in seconds])
        rows.append({"what": what, "workers": workers, "latents_per_second": speed})
    return rows


def consume(stream: Iterator[object], count: int) -> None:
    """Take so many batches and drop them."""
    deque(itertools.islice(stream, count), maxlen=0)


def measure_memory(data: LatentDataset, batch: int, reads: int) -> dict[str, int]:
    """Read so many latents in random order, and watch the anonymous memory of this process.

    Args:
        data: The latents.
        batch: Latents per batch.
        reads: Latents to read.

    Returns:
        Bytes after the first batch, at most, and at the end.
    """
    stream = Reads(data, batch)
    stream[0]
    first = highest = last = anonymous_memory()
    for index in range(1, reads // batch + 1):
        stream[index]
        if index % 100 == 0:
            last = anonymous_memory()
            highest = max(highest, last)
    return {"reads": reads // batch * batch, "first": first, "highest": highest, "last": last}


def tables(record: dict[str, Any]) -> str:
    """Format a record for the terminal and for Markdown."""
    rows = []
    for row in record["rows"]:
        low, median, high = row["latents_per_second"]
        speed = f"{median:,.0f} ({low:,.0f} to {high:,.0f})"
        rows.append([("what", row["what"]), ("workers", str(row["workers"])), ("latents/s (quartiles)", speed)])
    memory = record["anonymous_memory"]
    first, highest, last = (memory[name] / 2**20 for name in ("first", "highest", "last"))
    note = f"Anonymous memory over {memory['reads']:,} reads: {first:.1f} MiB, {highest:.1f} at most, {last:.1f}."
    return f"{markdown(rows, left=('what',))}\n\n{note}"
