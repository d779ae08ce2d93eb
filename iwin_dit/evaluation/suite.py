"""The metrics as data, and what is kept of one side of a comparison while its images go by.

Owns names, what each metric needs, and the computation of the values. Must not know where images come from, how they
are dealt to processes, or how values are reported.

Letters: B batch, T frames, H W image axes, D features.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..metrics.digits import IMAGE_SIZE
from ..metrics.feature_table import FeatureTable
from ..metrics.frechet import frechet_distance
from ..metrics.inception_score import InceptionScore
from ..metrics.moments import Gaussian, Moments
from ..metrics.moving_digits import summarise
from ..metrics.network import FeatureNetwork
from ..metrics.two_sample import kernel_inception_distance, precision_recall

FULL_COUNT = 50_000  # images from which on a metric carries its plain name, as papers report it
CHUNK = 5000  # consecutive images of the inception score
KID_SUBSETS, KID_SUBSET_SIZE = 100, 1000
NEIGHBOURS = 3  # of precision and recall
REAL_KEPT = 10_000  # real images of KID, precision and recall, as many as ADM's reference files have
_ROUNDING = 1e-3  # of a Frechet distance, at most, beside the traces of its covariances


@dataclass(frozen=True)
class Metric:
    """What a metric is computed from.

    Attributes:
        network: The network that gives the features.
        features: Name of the features.
        kind: Frechet distance, inception score, kernel inception distance, precision and recall, or what moving digits
            show and how they move.
        greater_is_better: Which way is up for its first value.
        protocols: Under which it is defined; none where the protocol plays no part.
        unbiased: Whether covariances are over n - 1; otherwise over n.
        clips: Whether it is of clips; otherwise of images.
    """

    network: str
    features: str
    kind: Literal["frechet", "is", "kid", "pr", "motion"]
    greater_is_better: bool
    protocols: tuple[str, ...] = ()
    unbiased: bool = True
    clips: bool = False


METRICS: dict[str, Metric] = {
    "fid": Metric("inception", "pool", "frechet", False, ("adm", "pytorch-fid", "clean")),
    "sfid": Metric("inception", "spatial", "frechet", False, ("adm",)),
    "is": Metric("inception", "logits", "is", True, ("adm",)),
    "kid": Metric("inception", "pool", "kid", False, ("adm", "pytorch-fid", "clean")),
    "pr": Metric("inception", "pool", "pr", True, ("adm",)),
    "fd_dinov2": Metric("dinov2", "dinov2", "frechet", False),
    "frechet_digits": Metric("digits", "digits", "frechet", False),
    "fvd": Metric("i3d", "i3d", "frechet", False, unbiased=False, clips=True),
    "moving_digits": Metric("motion", "motion", "motion", True, clips=True),
}
# Of metrics with several values, or one of another name: the first is that of `Metric.greater_is_better`.
_VALUES = {
    "pr": ("precision", "recall"),
    "moving_digits": ("digit_recognition", "digit_displacement", "blank_frames"),
}
_PLAIN = ("frechet_digits", "moving_digits")  # which have no published values to be confused with


def check_metrics(metrics: Sequence[str], protocol: str) -> None:
    """Refuse metrics that don't exist, or not together, or not under this protocol.

    Args:
        metrics: Their names.
        protocol: Of the Inception network.

    Raises:
        ValueError: Says which one and what is valid.
    """
    unknown = [name for name in metrics if name not in METRICS]
    if unknown or not metrics or len(set(metrics)) < len(metrics):
        raise ValueError(f"expected metrics of {', '.join(METRICS)}, each once, got {', '.join(metrics) or 'none'}")
    if of_clips(metrics) and len(metrics) > 1:
        name = next(name for name in metrics if METRICS[name].clips)
        raise ValueError(
            f"{name} is of clips, with a reference of its own: expected it alone, got {', '.join(metrics)}"
        )
    for name in metrics:
        protocols = METRICS[name].protocols
        if protocols and protocol not in protocols:
            raise ValueError(f"{name} is defined under protocol {' or '.join(protocols)}, got {protocol!r}")


def check_libraries(metrics: Sequence[str]) -> None:
    """Try the libraries of the metrics that come last, before the long work.

    Args:
        metrics: Keys of `METRICS`.

    Raises:
        ImportError: One is missing; the text names the extra.
    """
    points = torch.eye(NEIGHBOURS + 2)
    if "kid" in metrics:
        kernel_inception_distance(points, points, subsets=1)
    if "pr" in metrics:
        precision_recall(points, points, neighbours=NEIGHBOURS)


def of_clips(metrics: Sequence[str]) -> bool:
    """Whether any of the metrics is of clips, and not of images."""
    return any(METRICS[name].clips for name in metrics)


def needs_reference(metric: str) -> bool:
    """Whether the metric compares with real images; the inception score alone does not."""
    return METRICS[metric].kind != "is"


def uses_protocol(metrics: Sequence[str]) -> bool:
    """Whether the protocol of the Inception network plays a part in any of the metrics."""
    return any(METRICS[name].protocols for name in metrics)


def reported_names(metric: str, n_fake: int) -> tuple[str, ...]:
    """Names under which the values of a metric may be reported.

    Args:
        metric: A key of `METRICS`.
        n_fake: Number of generated images.

    Returns:
        One name, of precision and recall two, of moving_digits three. Below 50,000 images the number is part of it, as
        `fid_10000`, and of fvd always; what has no published values to be confused with keeps its plain name.
    """
    names = _VALUES.get(metric, (metric,))
    plain = metric in _PLAIN or (metric != "fvd" and n_fake >= FULL_COUNT)
    return names if plain else tuple(f"{name}_{n_fake}" for name in names)


def check_size(metrics: Sequence[str], size: Sequence[int]) -> None:
    """Refuse images that a classifier of digits does not take, before it is trained.

    Args:
        metrics: Keys of `METRICS`.
        size: Height and width of the images.

    Raises:
        ValueError: If a metric is of digits, and the size is another than theirs.
    """
    metric = next((name for name in metrics if name in ("frechet_digits", "moving_digits")), None)
    if metric is not None and list(size) != [IMAGE_SIZE, IMAGE_SIZE]:
        raise ValueError(f"{metric} takes images of {IMAGE_SIZE} x {IMAGE_SIZE}, got {size[0]} x {size[1]}")


def shortfall(metric: str, reported: str, value: float) -> float:
    """How far a value is from the best: the smallest shortfall of several values is that of the best one.

    Args:
        metric: A key of `METRICS`.
        reported: Name of the value, one of `reported_names`.
        value: The value.

    Returns:
        A number that only compares with others of this value.
    """
    if reported == "digit_displacement":
        return abs(value - 1)  # of the real one
    return -value if METRICS[metric].greater_is_better and reported != "blank_frames" else value


def kept_bytes(metrics: Sequence[str], networks: Mapping[str, FeatureNetwork], count: int, *, real: bool) -> int:
    """Memory that the statistics of one side take on every process, besides the networks.

    Args:
        metrics: Keys of `METRICS`.
        networks: The networks that they need, by name.
        count: Number of images of this side.
        real: Whether this is the reference.

    Returns:
        Bytes. Frechet distances take `8 D (D + 1)`; KID, precision and recall, and moving_digits, which need features
        one by one, `4 D` per image or clip, of real ones at most 10,000; the inception score `8 D` per 5,000 images.
    """
    rows = min(count, REAL_KEPT) if real else count
    total = 0
    for kind, (network, features) in _kept(metrics, real=real):
        D = networks[network].widths[features]
        total += {"moments": 8 * D * (D + 1), "table": 4 * D * rows, "score": 8 * D * math.ceil(count / CHUNK)}[kind]
    return total


def extract(networks: Mapping[str, FeatureNetwork], images: Tensor) -> dict[str, Tensor]:
    """Run images through several networks.

    Args:
        networks: By name, all on the device of the images.
        images: uint8 `(B, 3, H, W)`, clips `(B, T, 3, H, W)`.

    Returns:
        `(B, D)` by name of the features.
    """
    with torch.no_grad():
        return {name: rows for network in networks.values() for name, rows in network(images).items()}


class Side:
    """What is kept of the generated images, or of the real ones, for some metrics; metrics share what they can.

    Memory on every process is that of `kept_bytes`.

    Args:
        metrics: Keys of `METRICS`.
        networks: The networks that they need, by name.
        count: Number of images of this side, over all processes and attempts.
        device: Where the networks are.
        real: Whether this is the reference; of real images no inception score is kept.

    Attributes:
        count: Number of images.
    """

    def __init__(
        self,
        metrics: Sequence[str],
        networks: Mapping[str, FeatureNetwork],
        count: int,
        device: torch.device | str,
        *,
        real: bool,
    ) -> None:
        self.count, self._device = count, torch.device(device)
        # float64, which statistics need, does not exist on MPS.
        self._kept_on = torch.device("cpu") if self._device.type == "mps" else self._device
        self._networks: dict[str, FeatureNetwork] = {}
        self._moments: dict[str, Moments] = {}
        self._tables: dict[str, FeatureTable] = {}
        self._scores: dict[str, InceptionScore] = {}
        for kind, (network, features) in _kept(metrics, real=real):
            self._networks[network] = networks[network]
            D = networks[network].widths[features]
            if kind == "moments":
                self._moments[features] = Moments(D, self._kept_on)
            elif kind == "table":
                self._tables[features] = FeatureTable(count, D)
            else:
                self._scores[features] = InceptionScore(count, D, CHUNK, self._kept_on)

    def update(self, images: Tensor, indices: Sequence[int]) -> None:
        """Add a batch.

        Args:
            images: uint8 `(B, 3, H, W)`, clips `(B, T, 3, H, W)`, on any device.
            indices: Which images they are, B of them in [0, count).

        Raises:
            ValueError: There are more or fewer images than indices, or the networks take no such images.
        """
        self.add(extract(self._networks, images.to(self._device)), indices)

    def add(self, features: Mapping[str, Tensor], indices: Sequence[int]) -> None:
        """Add a batch by its features.

        Args:
            features: `(B, D)` by name, at least those of this side's metrics.
            indices: Which images they are of.

        Raises:
            ValueError: There are more or fewer images than indices.
        """
        for name, rows in features.items():
            if len(rows) != len(indices):
                raise ValueError(f"expected {name} features of {len(indices)} images, got those of {len(rows)}")
        for kept in (self._tables, self._scores, self._moments):  # tables first: they refuse an index that came before
            for name, statistics in kept.items():
                statistics.update(features[name].to(self._kept_on), indices)

    def reduce(self) -> None:
        """Make these the statistics of all processes' images; a collective, to be called once."""
        for statistics in self._all().values():
            statistics.reduce()

    def state(self) -> dict[str, Tensor]:
        """Copies of everything that is kept, on the CPU, for safetensors."""
        return {
            f"{prefix}.{name}": tensor
            for prefix, statistics in self._all().items()
            for name, tensor in statistics.state().items()
        }

    def add_state(self, state: Mapping[str, Tensor]) -> None:
        """Merge what another attempt saw of other images.

        Args:
            state: What `state` gave there.

        Raises:
            ValueError: It is of other metrics, networks or numbers of images, or has an image that came before.
        """
        parts = self._all()
        groups: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in parts}
        for key, tensor in state.items():
            prefix, _, name = key.rpartition(".")
            groups.setdefault(prefix, {})[name] = tensor
        if groups.keys() != parts.keys() or not all(groups.values()):
            raise ValueError(
                f"expected statistics of {sorted(parts)}, got those of {sorted(k for k in groups if groups[k])}"
            )
        for prefix, statistics in parts.items():
            statistics.add_state(groups[prefix])

    def check_complete(self) -> None:
        """Check that exactly `count` images came, after `reduce`.

        Raises:
            ValueError: More or fewer came.
        """
        for name, moments in self._moments.items():
            if moments.count != self.count:
                raise ValueError(f"expected {self.count} images, got the {name} features of {moments.count}")

    def take_gaussian(self, metric: str) -> Gaussian:
        """Mean and covariance of a Frechet distance's features; what they are computed from is freed.

        Args:
            metric: A key of `METRICS`, once.

        Returns:
            Both, with the covariance that the metric is defined by.

        Raises:
            ValueError: There are fewer than two images, or features are not finite.
        """
        return self._moments.pop(METRICS[metric].features).gaussian(unbiased=METRICS[metric].unbiased)

    def table(self, metric: str) -> Tensor:
        """Features of all images of KID, precision and recall, or of all clips of moving_digits, by index.

        Args:
            metric: A key of `METRICS`.

        Returns:
            `(count, D)` float32 on the CPU.

        Raises:
            ValueError: One did not come, came twice, or is not finite.
        """
        return self._tables[METRICS[metric].features].features()

    def on_device(self, table: Tensor) -> Tensor:
        """Move a table to where the networks are, but for MPS; all pairs of images are work for an accelerator."""
        return table.to(self._kept_on)

    def score(self, metric: str) -> InceptionScore:
        """What the inception score is computed from."""
        return self._scores[METRICS[metric].features]

    def _all(self) -> dict[str, Moments | FeatureTable | InceptionScore]:
        """Everything that is kept, in the same order on every process."""
        return {
            **{f"moments.{name}": moments for name, moments in self._moments.items()},
            **{f"table.{name}": table for name, table in self._tables.items()},
            **{f"score.{name}": score for name, score in self._scores.items()},
        }


@dataclass(frozen=True)
class Real:
    """The statistics of the real images, by metric.

    Attributes:
        gaussians: Of each Frechet distance.
        tables: `(N, D)` features for KID, precision and recall, and moving_digits, N real ones, at most `REAL_KEPT`.
        floors: What real images score against real images, of each Frechet distance where it is known: `value`, `n`
            images `against` so many others.
        labels: Classes of the rows of the tables, where a metric needs them.
    """

    gaussians: Mapping[str, Gaussian]
    tables: Mapping[str, Tensor]
    floors: Mapping[str, Mapping[str, Any]]
    labels: Sequence[int] = ()


def distance(metric: str, real: Gaussian, fake: Gaussian) -> float:
    """Compute a Frechet distance, and refuse one that cannot be.

    Args:
        metric: For the message, a key of `METRICS`.
        real: Of the reference.
        fake: Of the generated images, or of other real ones.

    Returns:
        The raw value, which rounding may have made slightly negative.

    Raises:
        ValueError: It is more negative than rounding makes it, so one of the covariances is none.
    """
    raw = frechet_distance(real, fake)
    scale = (real.covariance.trace() + fake.covariance.trace()).item()
    if raw < -_ROUNDING * max(1.0, scale):
        raise ValueError(
            f"{metric} comes out as {raw:.4g}, which is no rounding: expected covariances without negative "
            "eigenvalues, the reference's has some: make the reference file again"
        )
    return raw


def compute(
    metrics: Sequence[str], fake: Side, real: Real, *, seed: int = 0, labels: Sequence[int] = ()
) -> dict[str, dict[str, Any]]:
    """Compute all values, one metric after another.

    Args:
        metrics: Keys of `METRICS`.
        fake: Of all generated images, reduced; it is of no use afterwards, as each metric's statistics are freed.
        real: What the metrics compare with.
        seed: Of KID's subsets.
        labels: Classes that the generated ones were asked for, by index, where a metric needs them.

    Returns:
        Reported name to `value` and what belongs to it: of Frechet distances `raw`, the value before it was clamped at
        0, and `floor` where it is known; of scores over several parts `std`; of shares of frames `floor`, that of `n`
        real clips; the parameters of the others.

    Raises:
        ValueError: Images are missing, a value is not finite, or a Frechet distance is below 0 by more than rounding.
    """
    fake.check_complete()
    values: dict[str, dict[str, Any]] = {}
    for name in metrics:
        values |= zip(reported_names(name, fake.count), _compute(name, fake, real, seed, labels), strict=True)
    bad = [name for name, entry in values.items() if not math.isfinite(entry["value"])]
    if bad:
        raise ValueError(f"expected finite values, those of {', '.join(bad)} are not: look at the images")
    return values


def _kept(metrics: Sequence[str], *, real: bool) -> list[tuple[str, tuple[str, str]]]:
    """What some metrics keep of one side, each thing once: kind of statistics, and (network, features)."""
    kinds = {"frechet": "moments", "kid": "table", "pr": "table", "motion": "table", "is": "score"}
    found = [METRICS[name] for name in metrics if not (real and METRICS[name].kind == "is")]
    return list(dict.fromkeys((kinds[metric.kind], (metric.network, metric.features)) for metric in found))


def _compute(name: str, fake: Side, real: Real, seed: int, labels: Sequence[int]) -> list[dict[str, Any]]:
    """The entries of one metric, as many as it has reported names."""
    kind = METRICS[name].kind
    if kind == "frechet":
        raw = distance(name, real.gaussians[name], fake.take_gaussian(name))
        floor = {"floor": dict(real.floors[name])} if name in real.floors else {}
        return [{"value": max(raw, 0.0), "raw": raw, **floor}]
    if kind == "is":
        score = fake.score(name)
        value, std = score.score()
        spread = {"std": std} if score.chunks > 1 else {}  # one chunk has none
        return [{"value": value, **spread, "chunk": CHUNK, "chunks": score.chunks}]
    rows, real_rows = fake.table(name), real.tables[name]
    if kind == "motion":
        return _compare_motion(rows, labels, real_rows, real.labels)
    if kind == "kid":
        size = min(KID_SUBSET_SIZE, len(rows), len(real_rows))
        counts = {len(rows), len(real_rows)}
        subsets = 1 if counts == {size} else KID_SUBSETS  # where they are everything, one is as good as many
        value, std = kernel_inception_distance(rows, real_rows, subsets=subsets, subset_size=size, seed=seed)
        spread = {} if size in counts else {"std": std}  # subsets that share a whole side don't tell it
        return [{"value": value, **spread, "subsets": subsets, "subset_size": size, "seed": seed}]
    both = precision_recall(fake.on_device(rows), fake.on_device(real_rows), neighbours=NEIGHBOURS)
    return [{"value": value, "neighbours": NEIGHBOURS, "n_real": len(real_rows)} for value in both]


def _compare_motion(
    rows: Tensor, labels: Sequence[int], real_rows: Tensor, real_labels: Sequence[int]
) -> list[dict[str, Any]]:
    """The three entries of moving_digits, each beside what the real clips come to."""
    fake, real = summarise(rows, labels), summarise(real_rows, real_labels)
    n = len(real_rows)
    ratio = fake.displacement / real.displacement if real.displacement else math.inf
    return [
        {
            "value": fake.recognition,
            "floor": {"value": real.recognition, "n": n},
            "by_class": list(fake.by_class),
        },
        {"value": ratio, "pixels": fake.displacement, "real_pixels": real.displacement},
        {"value": fake.blank, "floor": {"value": real.blank, "n": n}},
    ]
