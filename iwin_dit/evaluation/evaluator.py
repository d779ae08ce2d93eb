"""From a set of images to every value that was asked for, with the record that makes the values comparable.

Joins networks, the real side, the pass over the generated images and what earlier attempts left. Must not know where
generated images come from, nor how results are written or printed.
"""

import json
import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ..metrics.digits import NUM_CLASSES
from ..metrics.images import ImageSet
from ..metrics.inputs import exact_float32
from ..metrics.network import FeatureNetwork
from ..metrics.processes import world_size
from ..metrics.result import environment
from .networks import open_networks
from .partial import Partial
from .passes import EvaluationError, never, on_main, run_pass
from .real import RealSide
from .suite import METRICS, Side, check_libraries, check_metrics, compute, kept_bytes, of_clips, uses_protocol
from .videos import Cut

__all__ = ["EvaluationError", "Evaluator", "Measurement", "Request"]

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Request:
    """What to measure, and against what.

    Attributes:
        metrics: Keys of `suite.METRICS`.
        reference: "digits"; a folder, a .zip or an .npz of images; a reference .npz; for fvd a folder of clips; for
            moving_digits "moving_digits". None where no metric needs one.
        protocol: Of the Inception network.
        inception_weights: Their file, where it is not in torch's cache.
        dinov2: Folder or Hub id of DINOv2, where it is not the usual one.
        i3d: TorchScript file of I3D, for fvd.
        cut: How clips are cut out of the files of the reference; the generated ones have as many frames.
        batch_size: Images per process at a time.
        seed: Of KID's subsets, of the real images for KID, precision and recall where there are more than 10,000, of
            the split that gives the floor, and of the choice of `num_real` clips.
        max_broken: Clips of fvd's reference that may be left out since they are broken or cannot be cut so.
        num_real: So many clips of fvd's reference count, a choice by `seed`; None takes all.

    Raises:
        ValueError: The metrics don't exist or don't go together, or a number is out of range.
    """

    metrics: tuple[str, ...]
    reference: str | None = None
    protocol: str = "adm"
    inception_weights: Path | None = None
    dinov2: str | None = None
    i3d: Path | None = None
    cut: Cut = field(default_factory=Cut)
    batch_size: int = 50
    seed: int = 0
    max_broken: int = 0
    num_real: int | None = None

    def __post_init__(self) -> None:
        check_metrics(self.metrics, self.protocol)
        if self.batch_size < 1 or not 0 <= self.seed < 2**32:
            raise ValueError(
                f"expected a batch_size of at least 1 and a seed in [0, 2^32), got {self.batch_size} and {self.seed}"
            )
        clips = self.cut.clips
        if of_clips(self.metrics) and clips.frames < 2:
            raise ValueError(f"{self.metrics[0]} is of motion: expected clips of at least 2 frames, got {clips.frames}")
        if (clips.frame_rate, self.cut.resolution) != (None, None) and self.metrics != ("fvd",):
            raise ValueError(
                f"a frame rate and a resolution are for the files of fvd, got {self.cut} for {', '.join(self.metrics)}"
            )
        if self.max_broken < 0 or (self.num_real is not None and self.num_real < 2):
            raise ValueError(
                "expected a max_broken of at least 0 and a num_real of at least 2, got "
                f"{self.max_broken} and {self.num_real}"
            )
        if (self.max_broken, self.num_real) != (0, None) and self.metrics != ("fvd",):
            raise ValueError(f"max_broken and num_real are for the files of fvd, got {', '.join(self.metrics)}")


@dataclass(frozen=True)
class Measurement:
    """All values of one set of images.

    Attributes:
        values: Reported name to `value` and what belongs to it. Of Frechet distances: `raw`, before the value was
            clamped at 0, and, where it is known, `floor` with the `value` that `n` real images score `against` so many
            others. Of `is`: `chunk`, the images of each, and `chunks`; where there are several, `std` over them. Of
            `kid`: `std` over `subsets` of `subset_size`, and their `seed`. Of precision and recall: `neighbours`, and
            `n_real`, the real images that they compare with. Of moving_digits: `floor`, the share of `n` real clips'
            frames, the recognition `by_class`, and the medians that the displacement is the ratio of, `pixels` and
            `real_pixels`.
        n_fake: Generated images.
        n_real: Real images; None where there are none, or the file of their statistics does not say.
        seconds: Time that this attempt took for its part of the generated images.
        images_per_second: Of that part, over all processes.
        record: JSON: what the values depend on besides.
    """

    values: dict[str, dict[str, Any]]
    n_fake: int
    n_real: int | None
    seconds: float
    images_per_second: float
    record: dict[str, Any]


@runtime_checkable
class Requested(Protocol):
    """Images that are made when they are read, and know beforehand what decides their pixels."""

    def request(self) -> dict[str, Any]:
        """Everything that decides the pixels of image i, ready for JSON."""


@runtime_checkable
class Framed(Protocol):
    """Sets that know how many frames a clip has, or that they are images: None."""

    @property
    def frames(self) -> int | None:
        """T."""


@runtime_checkable
class FromFiles(Protocol):
    """Clips that were cut out of files."""

    cut: Cut


@runtime_checkable
class Labelled(Protocol):
    """Sets that know what each image or clip should show."""

    def labels(self, indices: Sequence[int]) -> list[int]:
        """Classes of some of them."""


class Evaluator:
    """Measures sets of images in one way, one after another.

    Several processes each build one with the same request; what is a collective must be called on all of them.

    Args:
        request: What to measure.
        device: Where the networks run.
        networks: Those of the metrics by name, in place of the ones that the request says how to open.

    Attributes:
        request: The request.
        networks: The feature networks, by name.

    Raises:
        ValueError: Something about the request, the reference or a network's file is not as it should be.
        FileNotFoundError: The reference or weights are missing.
        ImportError: A library is missing; the text names the extra.
    """

    def __init__(
        self,
        request: Request,
        device: torch.device | str = "cpu",
        *,
        networks: Mapping[str, FeatureNetwork] | None = None,
    ) -> None:
        self.request, self._device = request, torch.device(device)
        check_libraries(request.metrics)
        if networks is None:
            networks = open_networks(
                request.metrics,
                protocol=request.protocol,
                inception_weights=request.inception_weights,
                dinov2=request.dinov2,
                i3d=request.i3d,
                frames=request.cut.clips.frames,
                device=self._device,
            )
        self.networks = networks
        self._real = RealSide(
            request.reference,
            request.metrics,
            self.networks,
            self._device,
            batch_size=request.batch_size,
            seed=request.seed,
            cut=request.cut,
            max_broken=request.max_broken,
            count=request.num_real,
        )

    def request_for(self, images: ImageSet) -> dict[str, Any]:
        """Everything that decides the values of a set of images: equal requests give equal values; a collective.

        The commit and the versions of torch and diffusers are part of it, as other code may give other values.

        Args:
            images: Images with a `request`, as `SampledImages` have it; others are read to be identified.

        Returns:
            JSON, for `Partial` and to compare results by; the same on every process.

        Raises:
            EvaluationError: The main process could not read the reference or the images, see `measure`.
        """

        def describe() -> dict[str, Any]:
            about = images.request() if isinstance(images, Requested) else images.record()
            code = environment()
            request = {
                **self._describe(),
                "metrics": sorted(self.request.metrics),
                "reference": self._real.identify(),
                "generated": {"n": len(images), **about},
                "code": {"commit": code["commit"], **{p: code["packages"][p] for p in ("torch", "diffusers")}},
            }
            plain: dict[str, Any] = json.loads(json.dumps(request, allow_nan=False))
            return plain

        return on_main(describe)

    def about_reference(self) -> dict[str, Any]:
        """Say what is known of the reference before anything is read or hashed; no collective.

        Returns:
            `kind`, "images" or "statistics", None without a reference; `n` images and `image_size` [height, width],
            None where a file does not say; `protocol` of its features, "not stated" where a file does not say, and
            None where it plays no part.
        """
        about = self._real.about()
        if about["kind"] == "images" and uses_protocol(self.request.metrics):
            about["protocol"] = self.request.protocol  # by which they will be measured
        return about

    def kept_bytes(self, n_fake: int) -> int:
        """Memory that the statistics of both sides take on every process.

        Args:
            n_fake: Number of generated images.

        Returns:
            Bytes.
        """
        metrics, n_real = self.request.metrics, len(self._real.images or ())
        sides = ((n_fake, False), (n_real, True))
        return sum(kept_bytes(metrics, self.networks, count, real=real) for count, real in sides)

    def prepare(self, n_fake: int, *, stopping: Callable[[], bool] = never, progress: bool = True) -> bool:
        """Measure a reference that came as images, unless that is done for so many; a collective.

        `measure` does it, too; this is for doing it earlier.

        Args:
            n_fake: Number of generated images, on which the floor depends.
            stopping: Whether to stop; asked between batches.
            progress: Whether the main process shows a bar.

        Returns:
            Whether it was not stopped.

        Raises:
            EvaluationError: A process failed, see `measure`.
        """
        with exact_float32(self._device):
            return self._real.prepare(n_fake, stopping=stopping, progress=progress)

    def measure(
        self,
        images: ImageSet,
        *,
        partial: Partial | None = None,
        stopping: Callable[[], bool] = never,
        progress: bool = True,
    ) -> Measurement | None:
        """Measure a set of images, each of which counts exactly once; a collective.

        Args:
            images: The generated images, the same set on every process.
            partial: Where to save the statistics on the way, and to go on from.
            stopping: Whether to stop; asked between batches, and one process's answer stops all.
            progress: Whether the main process shows a bar.

        Returns:
            The same on every process; None if it was stopped.

        Raises:
            ValueError: They are not what the metrics are of, see `check`.
            EvaluationError: A process failed. All raise it, with rank and cause in the text, and on that process the
                error is its cause. A single process raises its error as it is.
        """
        n = len(images)
        self.check(images)
        if any(METRICS[name].kind in ("kid", "pr") for name in self.request.metrics):
            logger.info("kid and pr keep features: %.0f MB on every process", self.kept_bytes(n) / 1e6)
        with exact_float32(self._device):
            if not self._real.prepare(n, stopping=stopping, progress=progress):
                return None
            done = self._begin(partial, n)
            side = Side(self.request.metrics, self.networks, n, self._device, real=False)
            pending = np.setdiff1d(np.arange(n), done)
            started = time.perf_counter()
            if not self._see(side, images, pending, partial, stopping=stopping, progress=progress):
                return None
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)
            return self._conclude(side, images, partial, len(pending), time.perf_counter() - started)

    def check(self, images: ImageSet) -> None:
        """Refuse a set that the metrics are not of, before any work; `measure` does it, too.

        Args:
            images: The generated images or clips.

        Raises:
            ValueError: There are fewer than two, they are clips in place of images or the other way round, clips of
                other frames than the reference's, or a metric needs their labels and they have none or others.
        """
        metrics, wanted = ", ".join(self.request.metrics), self.request.cut
        if len(images) < 2:
            raise ValueError(f"expected at least 2 generated images, got {len(images)}")
        if isinstance(images, Framed):
            if (images.frames is not None) != of_clips(self.request.metrics):
                kinds = ("images", "clips") if images.frames is not None else ("clips", "images")
                raise ValueError(f"{metrics} is of {kinds[0]}, got {kinds[1]}: {images.name}")
            if images.frames not in (None, wanted.clips.frames):
                raise ValueError(
                    f"expected clips of {wanted.clips.frames} frames, got {images.frames} in {images.name}"
                )
        if isinstance(images, FromFiles) and images.cut != wanted:
            raise ValueError(f"expected clips of {wanted}, as the reference's, got {images.cut} in {images.name}")
        if self._needs_labels:
            if not isinstance(images, Labelled):
                raise ValueError(
                    f"{metrics} asks whether a clip shows its label: expected samples of a model, got {images.name}, "
                    "which has no labels"
                )
            if (largest := max(images.labels(range(len(images))))) >= NUM_CLASSES:
                raise ValueError(f"{metrics} knows the classes 0 to {NUM_CLASSES - 1}, got clips of class {largest}")

    @property
    def _needs_labels(self) -> bool:
        return any(METRICS[name].kind == "motion" for name in self.request.metrics)

    def _describe(self) -> dict[str, Any]:
        """What values depend on besides the images and the reference."""
        metrics, networks = self.request.metrics, self.networks
        frechet = [name for name in metrics if METRICS[name].kind == "frechet"]
        return {
            "protocol": self.request.protocol if uses_protocol(metrics) else None,
            "features": {name: {"widths": dict(net.widths), **net.describe()} for name, net in networks.items()},
            "statistics": {
                "dtype": "float64",
                "covariance": {name: "over n - 1" if METRICS[name].unbiased else "over n" for name in frechet},
                "seed": self.request.seed,
            },
        }

    def _begin(self, partial: Partial | None, n: int) -> np.ndarray:
        """Number this attempt, and find what earlier ones have seen; as the main process finds it, on all."""
        if partial is None:
            return np.empty(0, np.int64)

        def look() -> tuple[np.ndarray, int]:
            done = partial.done()
            if len(done) and not 0 <= done[0] <= done[-1] < n:
                raise ValueError(f"{partial.folder} has images beyond the {n} of this evaluation: delete the folder")
            return done, partial.next_attempt()

        done, attempt = on_main(look)
        partial.begin(attempt)
        return done

    def _see(
        self,
        side: Side,
        images: ImageSet,
        pending: np.ndarray,
        partial: Partial | None,
        *,
        stopping: Callable[[], bool],
        progress: bool,
    ) -> bool:
        """Add this process's share of the pending images to its side; what it has seen is saved, however this ends."""
        seen: list[int] = []
        whole = True  # False while a batch may be in some of the statistics and not in others

        def work(batch: Tensor, indices: list[int]) -> None:
            nonlocal whole
            whole = False
            side.update(batch, indices)
            seen.extend(indices)
            whole = True
            if partial is not None and partial.is_due:
                partial.save(side.state(), seen)

        try:
            return run_pass(
                images,
                pending,
                self.request.batch_size,
                self._device,
                work,
                stopping=stopping,
                label="generated",
                progress=progress,
            )
        finally:
            if partial is not None and whole and seen:
                partial.save(side.state(), seen)

    def _conclude(
        self, side: Side, images: ImageSet, partial: Partial | None, seen: int, seconds: float
    ) -> Measurement:
        """Join the statistics of all processes and attempts, compute on the main process, and tell the others."""

        def add_earlier() -> None:
            if partial is not None:
                for state in partial.earlier_states():
                    side.add_state(state)
                    del state  # before the next one is read

        def measured() -> Measurement:
            labels = images.labels(range(len(images))) if isinstance(images, Labelled) and self._needs_labels else ()
            values = compute(self.request.metrics, side, self._real.real, seed=self.request.seed, labels=labels)
            speed = seen / seconds if seen else 0.0
            record = self._record(images, side.count - seen, seconds, speed)
            return Measurement(values, side.count, self._real.count, seconds, speed, record)

        on_main(add_earlier)
        side.reduce()
        return on_main(measured)

    def _record(self, images: ImageSet, reused: int, seconds: float, speed: float) -> dict[str, Any]:
        device = str(self._device)
        if self._device.type == "cuda":
            device += f" ({torch.cuda.get_device_name(self._device)})"
        return {
            **self._describe(),
            "reference": self._real.record(),
            "generated": {"n": len(images), **images.record()},
            "run": {
                "processes": world_size(),
                "device": device,
                "batch_size": self.request.batch_size,
                "tf32": False,
                "images_of_earlier_attempts": reused,
                "seconds_for_generated": round(seconds, 3) if speed else None,  # of this attempt
                "images_per_second": round(speed, 3) if speed else None,
            },
        }
