"""The real side of a comparison: a reference opened early, and measured once where it comes as images.

Owns what a reference can be, and the floor: what real images score against real images. Must not know the generated
images but for their number.

Letters: D features.
"""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data.clips import ClipSettings
from ..data.digits import Digits
from ..data.moving_digits import DEFAULT_CLIPS, MovingDigits
from ..data.sources import BUILT_IN, keyed_permutation, split_indices
from ..files import sha256
from ..metrics.images import ImageSet, ImageTensor, open_images
from ..metrics.moments import Gaussian
from ..metrics.network import FeatureNetwork
from ..metrics.npz import array_names, open_archive
from ..metrics.processes import from_main, rank
from ..metrics.reference import REFERENCE_KEYS, Reference, load_reference
from .networks import HOLDOUT, SPLIT_SEED
from .passes import run_pass, together
from .suite import FULL_COUNT, METRICS, REAL_KEPT, Real, Side, distance, extract, needs_reference
from .videos import Cut, VideoFiles

logger = logging.getLogger(__name__)

_KEPT_STREAM = 1  # of the seed: another draw than the split's


class RealSide:
    """The reference of an evaluation.

    Args:
        name: "digits"; a folder, a .zip or an .npz of images; an .npz of statistics; for fvd a folder of clips; for
            moving_digits "moving_digits". None where no metric needs one.
        metrics: Keys of `METRICS`.
        networks: The networks of the metrics, by name.
        device: Where the networks are.
        batch_size: Images per process at a time.
        seed: Of the split by which the floor is measured, of the images that KID, precision and recall compare with
            where there are more than 10,000, and of the choice of `count` clips.
        cut: How clips are cut out of files, and out of the moving digits.
        max_broken: Clips of a folder that may be left out since they are broken or cannot be cut so.
        count: So many of a folder's clips count; None takes all.

    Attributes:
        images: Those to be measured; None where the statistics are all there is to it.
        statistics: The file of statistics, or None.

    Raises:
        FileNotFoundError: There is no such file or folder.
        ValueError: A metric needs a reference and there is none, or it is not what the metrics need.
    """

    def __init__(
        self,
        name: str | None,
        metrics: Sequence[str],
        networks: Mapping[str, FeatureNetwork],
        device: torch.device | str,
        *,
        batch_size: int,
        seed: int,
        cut: Cut,
        max_broken: int = 0,
        count: int | None = None,
    ) -> None:
        self.name, self._device, self._batch_size, self._seed = name, device, batch_size, seed
        self._networks = {METRICS[metric].network: networks[METRICS[metric].network] for metric in metrics}
        needing = [metric for metric in metrics if needs_reference(metric)]
        self._frechet = [metric for metric in needing if METRICS[metric].kind == "frechet"]
        self._paired = [metric for metric in needing if METRICS[metric].kind != "frechet"]
        self.images: ImageSet | None = None
        self.statistics: Reference | None = None
        self._count = count
        self._prepared: tuple[int, Real] | None = None
        self._record: dict[str, Any] | None = None
        if not needing:
            return
        if name is None:
            raise ValueError(f"{', '.join(needing)} compare with real images: expected a reference, got none")
        if name not in BUILT_IN and not Path(name).exists():
            raise FileNotFoundError(
                f"expected {', '.join(map(repr, BUILT_IN))}, a folder, a .zip or an .npz as reference, got {name}: no "
                "such file"
            )
        if name == "moving_digits" or "moving_digits" in needing:
            if (name, needing) != ("moving_digits", ["moving_digits"]):
                raise ValueError(f"moving_digits compares with itself alone, got reference {name} for {needing}")
            self.images = moving_digits(cut.clips)
        elif "fvd" in needing:
            if name in BUILT_IN or not Path(name).is_dir():
                raise ValueError(f"fvd compares clips: expected a folder of clips as reference, got {name}")
            self.images = VideoFiles(Path(name), cut, max_broken=max_broken)
            if count is not None and count > len(self.images):
                raise ValueError(f"expected at least {count} clips to choose from in {name}, got {len(self.images)}")
        elif _has_statistics(name):
            self.statistics, self.images = self._open_statistics(Path(name))
        else:
            self.images = digits() if name == "digits" else open_images(Path(name), allow_lossy=True)
            if rank() == 0 and self._frechet and len(self.images) > FULL_COUNT:
                logger.info(
                    "%s has %d images, which every evaluation measures anew: `evaluate_fid.py reference` makes a file "
                    "of their statistics once",
                    name,
                    len(self.images),
                )

    @property
    def count(self) -> int | None:
        """Number of real images that count; None where a file of statistics does not say."""
        if self.statistics is not None:
            return (self.statistics.provenance or {}).get("n")
        if self._count is not None:
            return self._count
        return None if self.images is None else len(self.images)

    def prepare(self, n_fake: int, *, stopping: Callable[[], bool], progress: bool) -> bool:
        """Measure the reference where it came as images, unless that is done; a collective.

        A seeded choice of `n_fake` of the images, at most half of them, is measured apart from the others: their
        distance is the floor of a comparison of this size, and both parts together are the reference. Features for
        KID, precision and recall are kept of all images, or of a seeded choice of 10,000.

        Args:
            n_fake: Number of generated images.
            stopping: Whether to stop; asked between batches.
            progress: Whether to show a bar.

        Returns:
            Whether it was not stopped.

        Raises:
            EvaluationError: A process failed; a single process raises its error as it is.
        """
        if self._prepared is not None and self._prepared[0] == n_fake:
            return True
        self._prepared = None  # that of another number goes before the memory is needed again
        if isinstance(self.images, VideoFiles):
            self._check_alike(self.images.broken)
        if self.images is None:
            self._prepared = (n_fake, self._from_statistics())
            return True
        total = self._count or len(self.images)
        frechet = [] if self.statistics is not None else self._frechet  # those that the images are measured for
        n = min(n_fake, total // 2)
        if n < 2 or not frechet:
            n = 0  # too few for a covariance, and so for a floor
        counts = (total - n, n) if frechet else (0, 0)
        sides = [Side(frechet, self._networks, k, self._device, real=True) for k in counts]
        tables = Side(self._paired, self._networks, self._n_kept or 0, self._device, real=True)
        if not self._see(self.images, sides, tables, stopping=stopping, progress=progress):
            return False
        for part in (*sides, tables):
            part.reduce()
        # On the main process alone, since only it computes; and the others need not keep the tables.
        real = together(lambda: self._finish(sides, tables) if rank() == 0 else Real({}, {}, {}))
        self._prepared = (n_fake, real)
        return True

    def _check_alike(self, broken: Sequence[str]) -> None:
        """Refuse to go on where processes leave out other clips; a collective. Each has looked for them by itself."""
        first = from_main(broken)

        def check() -> None:
            if broken != first:
                raise ValueError(
                    f"expected to leave {first or 'nothing'} out of {self.name} as the first process does, got "
                    f"{broken or 'nothing'}: can every process read every file?"
                )

        together(check)

    @property
    def real(self) -> Real:
        """The statistics, once prepared; empty but for the main process."""
        assert self._prepared is not None
        return self._prepared[1]

    def about(self) -> dict[str, Any]:
        """What is known of the reference without reading or hashing it: `kind`, `n`, `image_size`, `protocol`.

        Returns:
            `kind` is "images", "statistics" or None; `n` None where a file does not say; `image_size` [height, width]
            or None where a file does not say; `protocol` that of the statistics, "not stated" where a file does not
            say, and None where they have none and of images.
        """
        size = getattr(self.images, "size", None)  # which is no part of an image set, but all references have it
        known = {"n": self.count, "image_size": None if size is None else list(size)}
        fps = getattr(self.images, "fps", None)  # likewise, of clips
        known |= {} if fps is None else {"fps": fps}
        if self.statistics is None:
            return {"kind": None if self.images is None else "images", **known, "protocol": None}
        provenance = self.statistics.provenance or {}
        made_with = provenance.get("features", {}).get("inception", {})
        return {
            "kind": "statistics",
            "n": self.count,
            "image_size": provenance.get("image_size") or known["image_size"],
            "protocol": made_with.get("protocol", "not stated") if "inception" in self._networks else None,
        }

    def identify(self) -> dict[str, Any] | None:
        """What the reference is, ready for JSON; None where there is none. It is hashed at the first call."""
        if self._record is None and (self.statistics is not None or self.images is not None):
            self._record = {"path": self.name, **self._identify(), "n": self.count}
        return self._record

    def record(self) -> dict[str, Any] | None:
        """What the JSON of a result says of the reference, on the main process and after it was prepared."""
        identity = self.identify()
        if identity is None:
            return None
        floors = [dict(floor) for floor in self.real.floors.values()]
        floor = {key: floors[0][key] for key in ("n", "against") if key in floors[0]} if floors else None
        return {**identity, "floor": floor}

    def _open_statistics(self, path: Path) -> tuple[Reference, ImageSet | None]:
        """Read what the metrics need from a file of statistics: Gaussians, and images where one needs them."""
        frechet = [METRICS[metric] for metric in self._frechet]
        widths = {m.features: self._networks[m.network].widths[m.features] for m in frechet}
        reference = load_reference(path, widths)
        for network in dict.fromkeys(m.network for m in frechet):
            reference.check(network, self._networks[network].describe())
        if self._paired and reference.images is None:
            raise ValueError(
                f"{' and '.join(self._paired)} compare with real images, and {path} has statistics alone: give a file "
                "that has images too, such as ADM's or one of `evaluate_fid.py reference`, or a folder"
            )
        return reference, reference.images if self._paired else None

    def _from_statistics(self) -> Real:
        if self.statistics is None:
            return Real({}, {}, {})
        gaussians = {metric: self.statistics.gaussians[METRICS[metric].features] for metric in self._frechet}
        floors = (self.statistics.provenance or {}).get("floor") or {}
        known = {
            metric: floors[METRICS[metric].features] for metric in self._frechet if METRICS[metric].features in floors
        }
        return Real(gaussians, {}, known)

    def _see(
        self,
        images: ImageSet,
        sides: Sequence[Side],
        tables: Side,
        *,
        stopping: Callable[[], bool],
        progress: bool,
    ) -> bool:
        """Add this process's share of the images to the tables, and each to one of the sides: seeded choices."""
        total, n = len(images), sides[1].count
        kept = self._kept()
        order = keyed_permutation(total, self._seed)[: n + sides[0].count]
        shares = []  # of each side: the places of the images in it, -1 of those that are not
        for side, members in ((tables, kept), (sides[1], np.sort(order[:n])), (sides[0], np.sort(order[n:]))):
            places = np.full(total, -1)
            places[members] = np.arange(len(members))
            shares.append((side, places))
        pending = np.flatnonzero(np.any([places >= 0 for _, places in shares], axis=0))

        def work(batch: Tensor, indices: list[int]) -> None:
            features = extract(self._networks, batch)
            for side, places in shares:
                rows = np.flatnonzero(places[indices] >= 0)
                picked = torch.from_numpy(rows)
                side.add({name: part[picked] for name, part in features.items()}, places[indices][rows].tolist())

        return run_pass(
            images,
            pending,
            self._batch_size,
            self._device,
            work,
            stopping=stopping,
            label="real",
            progress=progress,
        )

    def _kept(self) -> np.ndarray:
        """Which images KID, precision and recall, and moving_digits compare with, ascending."""
        order = keyed_permutation(len(self.images or ()), self._seed, _KEPT_STREAM)
        return np.sort(order[: self._n_kept or 0])

    def _finish(self, sides: Sequence[Side], tables: Side) -> Real:
        """Check that all images came, measure the floor, and merge both parts."""
        found = self._from_statistics()
        paired = {metric: tables.table(metric) for metric in self._paired}
        if self.statistics is not None:
            return Real(found.gaussians, paired, found.floors)
        labels = self.images.labels(self._kept().tolist()) if isinstance(self.images, LabelledClips) else ()
        for side in sides:
            side.check_complete()
        rest, apart = sides
        gaussians, floors = {}, {}
        for metric in self._frechet:  # one after another, so that the memory of the parts goes
            gaussians[metric] = rest.take_gaussian(metric)
            if apart.count:
                other = apart.take_gaussian(metric)
                value = max(distance(metric, gaussians[metric], other), 0.0)
                floors[metric] = {"value": value, "n": apart.count, "against": rest.count}
                ddof = int(METRICS[metric].unbiased)
                gaussians[metric] = _merge(gaussians[metric], rest.count, other, apart.count, ddof)
        return Real(gaussians, paired, floors, labels)

    def _identify(self) -> dict[str, Any]:
        images = None if self.images is None else self.images.record()
        kept = None if self._n_kept is None else {"n": self._n_kept, "of": len(self.images or ())}
        if self.statistics is None:
            assert images is not None
            chosen = {} if self._count is None else {"chosen_from": len(self.images or ())}
            return {"kind": "images", **images, **chosen, "images": kept}
        return {
            **self.about(),
            "sha256": sha256(self.statistics.path),
            "images": kept and {**kept, "image_size": (images or {}).get("image_size")},
            "provenance": self.statistics.provenance,
        }

    @property
    def _n_kept(self) -> int | None:
        """Number of images that others than Frechet distances compare with; None where no metric does."""
        return min(len(self.images), REAL_KEPT) if self._paired and self.images is not None else None


def digits() -> ImageTensor:
    """The built-in digits, all of them."""
    source = Digits()
    return ImageTensor(torch.stack([source[i] for i in range(len(source))]), "digits")


class LabelledClips(ImageTensor):
    """Clips of moving digits, in memory, with their labels.

    Args:
        clips: `(N, T, 3, H, W)` uint8.
        labels: Class of each, N of them.
        stride: Frames of the motion from one of a clip to the next.

    Attributes:
        frames: T.
    """

    def __init__(self, clips: Tensor, labels: Sequence[int], stride: int) -> None:
        super().__init__(clips, "moving_digits")
        self.frames, self._labels, self._stride = clips.shape[1], labels, stride

    def labels(self, indices: Sequence[int]) -> list[int]:
        """Classes of some of the clips.

        Args:
            indices: Which ones.

        Returns:
            A class each.
        """
        return [self._labels[index] for index in indices]

    def record(self) -> dict[str, Any]:
        """What identifies the set: pixels, labels and how it was made."""
        motion = {"frames": self.frames, "frame_stride": self._stride}  # their motion is per frame, at any rate
        return {**super().record(), **motion, "digits": "held out"}


def moving_digits(clips: ClipSettings) -> LabelledClips:
    """The built-in moving digits, those whose digits the metric's classifier has not seen.

    Args:
        clips: Number of frames and stride.

    Returns:
        A clip of each held-out digit.
    """
    settings = dataclasses.replace(DEFAULT_CLIPS, frames=clips.frames, frame_stride=clips.frame_stride)
    source = MovingDigits(clips=settings)
    indices = split_indices(source.labels, HOLDOUT, SPLIT_SEED)[1].tolist()
    pixels = torch.stack([source[i] for i in indices])
    return LabelledClips(pixels, [source.labels[i] for i in indices], settings.frame_stride)


def _merge(first: Gaussian, n: int, second: Gaussian, m: int, ddof: int) -> Gaussian:
    """Mean and covariance of two sets together, n and m vectors, by Chan's formula; the memory of `first` is reused.

    Covariances are over the count less `ddof`.
    """
    deviation = second.mean - first.mean
    over = n + m - ddof
    covariance = first.covariance.mul_((n - ddof) / over).add_(second.covariance, alpha=(m - ddof) / over)
    covariance.addr_(deviation, deviation, alpha=n * m / (n + m) / over)
    return Gaussian(first.mean + deviation * (m / (n + m)), covariance)


def _has_statistics(name: str) -> bool:
    """Whether a reference is an .npz with mean or covariance of some features, and not one of images alone."""
    if name in BUILT_IN or Path(name).suffix.lower() != ".npz":
        return False
    known = {key for pair in REFERENCE_KEYS.values() for key in pair}
    with open_archive(Path(name)) as archive:
        return not known.isdisjoint(array_names(archive))
