"""Makes a reference file: any image source, through ADM's centre crop, to statistics and a choice of images.

Owns what goes into the file: which images are kept, the floor and the provenance. None of it depends on the number of
processes, but for the last bits of the statistics. Must not know how sources, networks or the file work inside.

Letters: N images of the source, D features, R side of the cropped images.
"""

import contextlib
import hashlib
import heapq
import itertools
import logging
import struct
import time
from collections import deque
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from ..data.images import EXTENSIONS, BrokenImageError, centre_crop, read_image
from ..data.sources import ImageSource, Item, count_parts, files_fingerprint, open_source
from ..files import list_files
from ..metrics.frechet import frechet_distance
from ..metrics.moments import Gaussian, Moments
from ..metrics.network import FeatureNetwork
from ..metrics.processes import agree, gather, rank, sum_over_processes, world_size
from ..metrics.reference import REFERENCE_KEYS, save_reference
from ..metrics.result import environment
from .passes import on_main, settle, together

logger = logging.getLogger(__name__)

PART_SIZE = 1000  # images that are dealt to a process at a time, where the source can be read from anywhere
DECODE_THREADS = 8
_PATIENCE = 20.0  # seconds between two agreements of the processes
_SENT = 64  # kept images that the processes put together at a time


class FlatFolder:
    """All images of a folder and its subfolders as an `ImageSource` of one class, whatever the folders mean.

    The order is that of folder and name. Hidden files and folders are left alone; so are files not named as images, and
    counted. Links are followed.

    Args:
        root: The folder.
        part_size: Images per part; the last part holds the rest.

    Raises:
        ValueError: The folder is missing or has no images.
    """

    class_names = ("all",)

    def __init__(self, root: Path, part_size: int = PART_SIZE) -> None:
        if not root.is_dir():
            raise ValueError(f"expected a folder of images, got {root}, which is not a folder")
        files = sorted(map(Path, list_files(root)), key=lambda path: (path.parent, path.name))
        self._paths = [path for path in files if path.name.lower().endswith(EXTENSIONS)]
        if not self._paths:
            raise ValueError(f"no images ({', '.join(EXTENSIONS)}) in {root} or its subfolders")
        self.num_ignored = len(files) - len(self._paths)
        self.description = str(root)
        self.fingerprint = files_fingerprint((p.relative_to(root).as_posix(), p.stat().st_size) for p in self._paths)
        self._part_size = part_size
        self.num_parts = count_parts(len(self._paths), part_size)

    def items(self, part: int) -> Iterator[Item]:
        """Yield the images of one part."""
        for path in self._paths[part * self._part_size : (part + 1) * self._part_size]:
            yield Item.of_one(str(path), 0, partial(read_image, path, str(path)))


def open_reference_source(
    source: str,
    *,
    split: str = "train",
    revision: str | None = None,
    config: str | None = None,
    streaming: bool = False,
    image_key: str | None = None,
    label_key: str | None = None,
    num_classes: int = 1000,
) -> ImageSource:
    """Open what a reference is to be made of. Labels play no part, so a folder needs no class folders.

    Args:
        source: "digits"; a folder of images, in subfolders or not; WebDataset tars; or "hf:" with a data set's name.
        split: Split of a Hugging Face data set.
        revision: Commit, branch or tag of a data set on the Hub.
        config: Configuration of a Hugging Face data set that has several.
        streaming: Read a Hugging Face data set as it comes.
        image_key: Image column of a Hugging Face data set, or extension of the images in tars.
        label_key: Label column of a Hugging Face data set, or extension of the labels in tars.
        num_classes: Number of classes in tars and Hugging Face data sets that do not say.

    Returns:
        The source.

    Raises:
        ValueError: It cannot be opened, or an argument does not apply to it.
        ImportError: It needs a package that is not installed.
    """
    opened = partial(
        open_source,
        split=split,
        revision=revision,
        config=config,
        streaming=streaming,
        image_key=image_key,
        label_key=label_key,
        class_names=None,
        num_classes=num_classes,
        part_size=PART_SIZE,
    )
    special = source == "digits" or source.startswith("hf:") or source.endswith(".tar")
    given = (revision, config, image_key, label_key) != (None,) * 4 or split != "train" or streaming
    # Settings that mean nothing for a folder: `open_source` refuses them with the right words.
    return opened(source) if special or given else FlatFolder(Path(source))


def make_reference(
    source: ImageSource,
    networks: Mapping[str, FeatureNetwork],
    out: Path,
    *,
    resolution: int,
    keep_images: int = 10_000,
    seed: int = 0,
    batch_size: int = 50,
    max_broken: int = 0,
    device: torch.device | str = "cpu",
    progress: bool = True,
) -> dict[str, Any]:
    """Measure all images of a source and write a reference file; a collective.

    Every process takes whole parts of the source, so a source of few parts keeps few processes busy. Each process holds
    up to `keep_images` images, 3 R^2 bytes each (2 GB for 10,000 of 256 x 256), beside statistics of constant size.

    Args:
        source: The images, read once.
        networks: By name, on `device`; those of their features that a reference file can hold are measured.
        out: The .npz file, in a folder that exists; an earlier one is replaced at the end.
        resolution: R; images are halved, resized and centre-cropped to it as by ADM's data loader.
        keep_images: How many images to keep in the file, for precision, recall and KID; 0 keeps none, and a smaller
            source is kept whole. They are a seeded choice, in random order.
        seed: Of that choice, and of the two halves whose distance is the floor: each image draws one.
        batch_size: Images per process at a time.
        max_broken: How many images may be broken, which are then left out and named in the provenance.
        device: Where the networks are.
        progress: Whether the main process shows a bar.

    Returns:
        The provenance, as it is in the file; on every process.

    Raises:
        ValueError: An argument cannot be right, more images are broken, or fewer than four are not.
        EvaluationError: One of several processes failed; it names the rank.
    """
    if out.suffix != ".npz" or not out.parent.is_dir():
        raise ValueError(f"expected a name that ends in .npz, in a folder that exists, for the reference, got {out}")
    if resolution < 1 or batch_size < 1 or keep_images < 0 or keep_images == 1:
        wanted = "resolution and batch_size of at least 1, and keep_images of 0 or at least 2"
        raise ValueError(f"expected {wanted}, got {resolution}, {batch_size} and {keep_images}")
    scan = _Scan(source, networks, resolution, keep_images, seed, batch_size, max_broken, torch.device(device))
    scan.run(progress)
    scan.reduce()
    images = scan.collect_images()

    def write() -> dict[str, Any]:
        gaussians, floor = scan.statistics()
        provenance = scan.provenance(floor, 0 if images is None else len(images))
        save_reference(out, gaussians, provenance, images)
        return provenance

    together(scan.check_broken)  # those of all processes
    return on_main(write)


class _Image(NamedTuple):
    """A cropped image `(R, R, 3)` uint8 and its place: the part of the source, and the row in it."""

    part: int
    row: int
    pixels: np.ndarray


class _Scan:
    """One pass over the source: this process's share, and then what all have found.

    Args: as of `make_reference`.
    """

    def __init__(
        self,
        source: ImageSource,
        networks: Mapping[str, FeatureNetwork],
        resolution: int,
        keep_images: int,
        seed: int,
        batch_size: int,
        max_broken: int,
        device: torch.device,
    ) -> None:
        self.source, self.networks, self.resolution, self.keep_images = source, networks, resolution, keep_images
        self.seed, self.batch_size, self.max_broken, self.device = seed, batch_size, max_broken, device
        widths = {name: width for network in networks.values() for name, width in network.widths.items()}
        kept_on = "cpu" if device.type == "mps" else device  # which has no float64
        # Of two random halves of the images, about one size, whose distance is the floor.
        self.moments = {
            name: (Moments(width, kept_on), Moments(width, kept_on))
            for name, width in widths.items()
            if name in REFERENCE_KEYS
        }
        if not self.moments:
            raise ValueError(f"expected features that a reference holds ({', '.join(REFERENCE_KEYS)}), got {[*widths]}")
        self.broken: list[str] = []
        self._parts = range(rank(), source.num_parts, world_size())
        self._kept: list[tuple[int, int, int, np.ndarray]] = []  # heap of -key, -part, -row: the largest key first

    @property
    def count(self) -> int:
        """Images measured."""
        return sum(half.count for half in next(iter(self.moments.values())))

    def run(self, progress: bool) -> None:
        """Measure this process's parts, and return when all processes have measured theirs; a collective."""
        title = "reference" if world_size() == 1 else f"reference (process 0 of {world_size()})"
        working = True
        bar = tqdm(desc=title, unit="img", disable=not progress or rank() > 0)
        # Closed here, or the garbage collector would end its threads, wherever that runs: in a thread that just starts,
        # it would wait for itself.
        with bar, contextlib.closing(self._decoded()) as images:
            while agree(int(working)):
                error: Exception | None = None
                # A process that is done waits for the others a little at a time: a collective has a time limit.
                until = time.monotonic() + _PATIENCE
                try:
                    while working:
                        working = self._step(images, bar)
                        if time.monotonic() > until:
                            break
                except Exception as raised:
                    error = raised
                settle(error)

    def _step(self, images: Iterator[_Image], bar: tqdm) -> bool:
        """Measure a batch of this process's images; False where none is left."""
        batch = list(itertools.islice(images, self.batch_size))
        if not batch:
            return False
        self._measure(batch)
        for image in batch:
            self._offer(image)
        bar.update(len(batch))
        if done := self._parts.index(batch[-1].part):  # parts differ, and nobody counts a tar's images beforehand
            bar.total = round(bar.n / done * len(self._parts))
        return True

    def check_broken(self) -> None:
        """Raise a ValueError that lists the broken images, if they are more than `max_broken`."""
        if len(self.broken) > self.max_broken:
            raise ValueError(
                f"{len(self.broken)} broken images, at most {self.max_broken} may be: mend or remove them\n  "
                + "\n  ".join(self.broken)
            )

    def reduce(self) -> None:
        """Make statistics and broken images those of all processes; a collective."""
        for halves in self.moments.values():
            for half in halves:
                half.reduce()
        self.broken = sorted(itertools.chain.from_iterable(gather(self.broken)))

    def collect_images(self) -> np.ndarray | None:
        """Bring the images of the smallest keys together, in the order of the keys; a collective.

        Returns:
            `(keep_images, R, R, 3)` uint8 on the main process, fewer where there are no more; None on the others, and
            where none are kept.
        """
        mine = {(-key, -part, -row): pixels for key, part, row, pixels in self._kept}
        self._kept = []
        chosen = sorted(itertools.chain.from_iterable(gather(list(mine))))[: self.keep_images]
        mine = {place: mine[place] for place in chosen if place in mine}
        shape = (self.resolution, self.resolution, 3)
        images = np.empty((len(chosen), *shape), np.uint8) if rank() == 0 and chosen else None
        for start in range(0, len(chosen), _SENT):
            places = chosen[start : start + _SENT]
            block = torch.zeros(len(places), *shape, dtype=torch.uint8)
            for i, place in enumerate(places):
                if place in mine:  # and in no other process, so that the sum is a union
                    block[i] = torch.from_numpy(mine.pop(place))  # freed here, so that memory does not double
            sum_over_processes(block)
            if images is not None:
                images[start : start + len(places)] = block.numpy()
        return images

    def statistics(self) -> tuple[dict[str, Gaussian], dict[str, Any]]:
        """Mean and covariance by features, of all images; and what one half scores against the other.

        There is no such score where one of the halves came out with fewer than two of a handful of images.
        """
        gaussians, floor = {}, {}
        if self.count < 4:
            raise ValueError(f"expected at least 4 images in {self.source.description}, got {self.count}")
        for name, (first, second) in self.moments.items():
            if min(first.count, second.count) < 2:
                logger.warning("no floor of %s: %d images are too few for two random halves", name, self.count)
            else:
                distance = frechet_distance(first.gaussian(), second.gaussian())
                floor[name] = {"value": max(distance, 0.0), "n": first.count, "against": second.count}
            total = Moments(len(first.mean), first.mean.device)
            for half in (first, second):
                total.add_state(half.state())
            gaussians[name] = total.gaussian()
        return gaussians, floor

    def provenance(self, floor: Mapping[str, Any], kept: int) -> dict[str, Any]:
        """What the file says of itself."""
        return {
            "features": {name: network.describe() for name, network in self.networks.items()},
            "n": self.count,
            "image_size": [self.resolution, self.resolution],
            "crop": "ADM's: halved by a box filter, resized bicubically, centre-cropped",
            "source": {
                "description": self.source.description,
                "fingerprint": self.source.fingerprint,
                "ignored_files": self.source.num_ignored,
                "broken": self.broken,
            },
            "images": {"n": kept, "choice": "random", "seed": self.seed} if kept else None,
            "floor": dict(floor),
            "run": {"processes": world_size(), "device": str(self.device), "batch_size": self.batch_size},
            "environment": environment(),
        }

    def _decoded(self) -> Generator[_Image, None, None]:
        """Decode in threads, at most two batches ahead, and yield the readable images in the order of the source."""
        items = ((p, row, item) for p in self._parts for row, item in enumerate(self.source.items(p)))
        pending: deque[tuple[int, int, Item, Future[np.ndarray]]] = deque()
        with ThreadPoolExecutor(DECODE_THREADS) as pool:
            while True:
                for part, row, item in itertools.islice(items, 2 * self.batch_size - len(pending)):
                    pending.append((part, row, item, pool.submit(self._pixels, item)))
                if not pending:
                    return
                part, row, item, decoding = pending.popleft()
                try:
                    yield _Image(part, row, decoding.result())
                except BrokenImageError as error:
                    self.broken.append(item.key)
                    logger.warning("a broken image (%d so far): %s", len(self.broken), error)
                    self.check_broken()

    def _pixels(self, item: Item) -> np.ndarray:
        (image,) = item.read()
        assert isinstance(image, Image.Image)  # a source that was opened without clips has none
        return np.array(centre_crop(image, self.resolution))

    @torch.no_grad()
    def _measure(self, batch: list[_Image]) -> None:
        """Add a batch to the statistics, each image to those of its half."""
        images = torch.from_numpy(np.stack([image.pixels for image in batch])).to(self.device).permute(0, 3, 1, 2)
        # Each image for itself, whatever the number of processes: halves that shared neighbours out, which are of one
        # class in class folders, would be more alike than two random samples are.
        second = torch.tensor([_draw(b"half", self.seed, i.part, i.row) % 2 == 1 for i in batch])
        for network in self.networks.values():
            for name, features in network(images).items():
                if name in self.moments:
                    for half, rows in zip(self.moments[name], (~second, second), strict=True):
                        half.update(features[rows.to(features.device)])

    def _offer(self, image: _Image) -> None:
        """Keep an image if its key is among the smallest so far."""
        entry = (-_draw(b"keep", self.seed, image.part, image.row), -image.part, -image.row, image.pixels)
        if len(self._kept) < self.keep_images:
            heapq.heappush(self._kept, entry)
        elif self.keep_images:
            heapq.heappushpop(self._kept, entry)


def _draw(purpose: bytes, seed: int, *place: int) -> int:
    """A random number from 0 to 2^63 - 1 that depends on nothing but the arguments."""
    key = struct.pack(f"<{1 + len(place)}q", seed, *place)
    return int.from_bytes(hashlib.blake2b(key, digest_size=8, person=purpose).digest(), "little") >> 1
