"""A measurement as people and programs read it: one JSON, a line per metric, and what to be warned of.

Must not know how it was measured.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..files import write_json
from ..metrics.result import environment
from .evaluator import Measurement
from .suite import FULL_COUNT, METRICS, needs_reference, reported_names


def write_report(measurement: Measurement, path: Path) -> None:
    """Write the JSON, whole or not at all.

    Args:
        measurement: What was measured.
        path: File to write or replace.
    """
    write_json(path, content(measurement))


def content(measurement: Measurement) -> dict[str, Any]:
    """Everything about a measurement, ready for JSON: the values, and every setting that they depend on."""
    return {"metrics": measurement.values, **measurement.record, "environment": environment()}


def lines(measurement: Measurement, name: str, path: Path) -> list[str]:
    """Say the values for people, each with the settings that it must not be without.

    Args:
        measurement: What was measured.
        name: What the set of generated images says of itself.
        path: Where the JSON is.

    Returns:
        A line per value.
    """
    return [
        f"{reported} ({_settings(measurement, metric, name)}): {_value(measurement, entry)}   [{path}]"
        for reported, metric, entry in _reported(measurement)
    ]


def warnings(measurement: Measurement) -> list[str]:
    """Say what a reader of the values must know, beyond the settings.

    Args:
        measurement: What was measured.

    Returns:
        A sentence each.
    """
    return [*_about_counts(measurement), *_about_reference(measurement), *_about_values(measurement)]


def metric_of(reported: str, n_fake: int) -> str:
    """Find the metric of a value.

    Args:
        reported: Its name, as `fid_10000`.
        n_fake: Number of generated images.

    Returns:
        A key of `METRICS`.
    """
    return next(metric for metric in METRICS if reported in reported_names(metric, n_fake))


def _reported(measurement: Measurement) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Name, metric and entry of each value."""
    for name, entry in measurement.values.items():
        yield name, metric_of(name, measurement.n_fake), entry


def _settings(measurement: Measurement, metric: str, name: str) -> str:
    samples, protocol = f"{measurement.n_fake} samples", measurement.record["protocol"]
    if needs_reference(metric):
        path = str(measurement.record["reference"]["path"])
        samples += f" vs {Path(path).name if path.endswith('.npz') else f'{measurement.n_real} real'}"
    return ", ".join([samples, *([f"protocol {protocol}"] if METRICS[metric].protocols else []), name])


def _value(measurement: Measurement, entry: dict[str, Any]) -> str:
    text = f"{entry['value']:.5g}"
    if "std" in entry:
        text += f" (standard deviation {entry['std']:.2g})"
    if "floor" in entry:
        floor, real = entry["floor"], "digits" if measurement.record["reference"]["path"] == "digits" else "images"
        text += f"; {floor['n']} real {real} against the other {floor['against']} score {floor['value']:.2g}"
    return text


def _about_counts(measurement: Measurement) -> Iterator[str]:
    """Too few images for the metric, or for a comparison with published values."""
    few, n = [], measurement.n_fake
    for name, metric, _ in _reported(measurement):
        width = measurement.record["features"][METRICS[metric].network]["widths"][METRICS[metric].features]
        sides = {"samples": n, "real images": measurement.n_real}
        for side, count in sides.items():
            if METRICS[metric].kind == "frechet" and count is not None and count <= width:
                yield (
                    f"{name}: {count} {side} cannot span {width} features: the distance is biased upwards and compares "
                    f"only with others of {count} {side}"
                )
        if METRICS[metric].protocols and n < FULL_COUNT:
            few.append(name)
    if few:
        yield f"papers report {FULL_COUNT} samples: {', '.join(few)} compare only with values of {n} samples"


def _about_reference(measurement: Measurement) -> Iterator[str]:
    """What the two sides may not have in common."""
    reference, generated = measurement.record["reference"], measurement.record["generated"]
    if reference is None:
        return
    sizes = reference.get("image_size"), generated["image_size"]
    if sizes[0] is not None and list(sizes[0]) != list(sizes[1]):
        yield f"the reference images are {sizes[0]}, the generated ones {sizes[1]} pixels (height, width)"
    if reference.get("protocol") == "not stated":
        yield (
            f"{reference['path']} does not say by which protocol it was made; it is taken for "
            f"{measurement.record['protocol']!r}"
        )


def _about_values(measurement: Measurement) -> Iterator[str]:
    for name, _, entry in _reported(measurement):
        if entry.get("raw", 1.0) <= 0:
            yield (
                f"{name} is 0 after clamping, {entry['raw']:.2g} before, which is rounding: both sides are the same "
                "images, or as good as"
            )
