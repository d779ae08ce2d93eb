"""A measurement as people and programs read it: one JSON, a line per metric, and what to be warned of.

Must not know how it was measured.
"""

import itertools
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..files import write_json
from ..metrics.result import environment
from .evaluator import Measurement
from .suite import CHUNK, FULL_COUNT, METRICS, REAL_KEPT, needs_reference, reported_names
from .videos import same_rate

_FEW_FOR_KID = 2000  # images, of which its subsets of 1000 are nearly all


def write_report(
    measurement: Measurement, path: Path, request: Mapping[str, Any], *, wall_seconds: float | None = None
) -> Path | None:
    """Write the JSON, whole or not at all. Another result that is there is moved aside, and never lost.

    Args:
        measurement: What was measured.
        path: File to write; replaced where it has a result of the same request.
        request: Everything that decides the values.
        wall_seconds: Of the whole command.

    Returns:
        Where the result that was there is now; None where there was none, or one of the same request.
    """
    result = {**content(measurement), "request": dict(request)}
    if wall_seconds is not None:
        result["run"] = {**result["run"], "wall_seconds": round(wall_seconds, 3)}
    aside = None
    if path.exists() and _request_in(path) != json.loads(json.dumps(request)):
        numbered = (path.with_name(f"{path.stem}.{number}{path.suffix}") for number in itertools.count(1))
        aside = next(place for place in numbered if not place.exists())
        path.rename(aside)
    write_json(path, result)
    return aside


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
        f"{reported} ({_settings(measurement, metric, name)}): {_value(measurement, metric, entry)}   [{path}]"
        for reported, metric, entry in _reported(measurement)
    ]


def warnings(measurement: Measurement) -> list[str]:
    """Say what a reader of the values must know, beyond the settings.

    Args:
        measurement: What was measured.

    Returns:
        A sentence each.
    """
    reference, generated = measurement.record["reference"], measurement.record["generated"]
    sizes = early_warnings(
        reference or {},
        generated["image_size"],
        measurement.record["protocol"],
        generated.get("fps"),
        generated.get("stored_as", ()),
    )
    about_counts = (_about_counts, _about_real_counts, _about_chunks)
    return [*(line for about in about_counts for line in about(measurement)), *sizes, *_about_values(measurement)]


def early_warnings(
    reference: Mapping[str, Any],
    image_size: Sequence[int],
    protocol: str | None,
    fps: float | None = None,
    stored_as: Iterable[str] = (),
) -> list[str]:
    """Say what the two sides may not have in common, which is known before the work.

    Args:
        reference: Its `path`, `image_size`, `protocol` and `fps`, as far as they are known.
        image_size: Of the generated images, height and width.
        protocol: By which they are measured.
        fps: Frames per second of generated clips, where it is known.
        stored_as: Kinds of the generated files, such as ".mp4".

    Returns:
        A sentence each, as `warnings` has them too.
    """
    found, size = [], reference.get("image_size")
    if size is not None and list(size) != list(image_size):
        found.append(
            f"the reference images are {list(size)}, the generated ones {list(image_size)} pixels (height, width)"
        )
    real_fps = reference.get("fps")
    if fps is not None and real_fps is not None and not same_rate(fps, real_fps):
        found.append(
            f"the reference's clips have {real_fps:.4g} frames per second, the generated ones {fps:.4g}: motion is "
            "compared at two speeds"
        )
    if fps is None and real_fps is not None:
        found.append(
            f"the reference's clips have {real_fps:.4g} frames per second, and the generated ones do not say: give "
            "--frame-rate, at which those play, to see the reference at it"
        )
    if ".gif" in stored_as:
        found.append(
            "there are GIFs among the generated clips, which have 256 colours, and of equal frames in a row only one: "
            "`sample.py --format frames` writes them as they were sampled"
        )
    if reference.get("protocol") == "not stated":
        found.append(f"{reference['path']} does not say by which protocol it was made; it is taken for {protocol!r}")
    return found


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
        known = [Path(path).name] * path.endswith(".npz")
        known += [] if measurement.n_real is None else [f"{measurement.n_real} real"]
        known += [cut] if (cut := measurement.record["reference"].get("cut")) else []
        samples += f" vs {', '.join(known)}"
    return ", ".join([samples, *([f"protocol {protocol}"] if METRICS[metric].protocols else []), name])


def _value(measurement: Measurement, metric: str, entry: dict[str, Any]) -> str:
    text = f"{entry['value']:.5g}"
    if "std" in entry:
        text += f" (standard deviation {entry['std']:.2g})"
    if "pixels" in entry:
        text += f" of the real clips', {entry['pixels']:.3g} to {entry['real_pixels']:.3g} pixels a frame"
    if "floor" in entry:
        floor, kind = entry["floor"], "clips" if METRICS[metric].clips else "images"
        real = "digits" if measurement.record["reference"]["path"] == "digits" else kind
        others = f" against the other {floor['against']}" if "against" in floor else ""
        text += f"; {floor['n']} real {real}{others} score {floor['value']:.{2 if others else 3}g}"
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


def _about_real_counts(measurement: Measurement) -> Iterator[str]:
    """Fewer real images than published values have, or another number where the value depends on it."""
    reference = measurement.record["reference"] or {}
    kept = (reference.get("images") or {}).get("n", measurement.n_real)  # of a file with statistics and images
    few = []
    for name, metric, entry in _reported(measurement):
        kind = METRICS[metric].kind
        if kind == "pr" and entry.get("n_real", REAL_KEPT) != REAL_KEPT:
            yield f"{name} is against {entry['n_real']} real images and depends on it: papers take {REAL_KEPT}"
        if kind == "kid":
            for side, n in (("samples", measurement.n_fake), ("real images", kept)):
                if n is not None and n < _FEW_FOR_KID:
                    yield f"{name}: its subsets are drawn from {n} {side}, expected at least {_FEW_FOR_KID}"
        if kind == "frechet" and METRICS[metric].protocols and (measurement.n_real or FULL_COUNT) < FULL_COUNT:
            few.append(name)
    if few:
        yield (
            f"papers take whole data sets as reference: {', '.join(few)} compare only with values against these "
            f"{measurement.n_real} real images"
        )


def _about_chunks(measurement: Measurement) -> Iterator[str]:
    n = measurement.n_fake
    for name, metric, _ in _reported(measurement):
        if METRICS[metric].kind == "is" and n > CHUNK and n % CHUNK:
            yield (
                f"{name} is a mean over chunks of {CHUNK} images, of which the last has {n % CHUNK} only: expected a "
                "multiple"
            )


def _request_in(path: Path) -> Any:
    """What the result in a file was made from; None where it does not say."""
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        return None
    return result.get("request") if isinstance(result, dict) else None


def _about_values(measurement: Measurement) -> Iterator[str]:
    for name, _, entry in _reported(measurement):
        if entry.get("raw", 1.0) <= 0:
            yield (
                f"{name} is 0 after clamping, {entry['raw']:.2g} before, which is rounding: both sides are the same "
                "images, or as good as"
            )
