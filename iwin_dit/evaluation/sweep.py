"""A grid of sampler settings and checkpoints, each point measured once: a table, a CSV and a plot.

Owns the points, their files and how they are laid out. Must not know how a point is measured.
"""

import csv
import functools
import io
import itertools
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..charts import Panel, Series, save_charts
from ..files import write_durably, write_json
from .evaluator import Evaluator
from .partial import Partial, differences
from .passes import never, on_main, together
from .report import content, early_warnings, metric_of, warnings
from .samples import Pipeline, SampledImages, Sampling
from .suite import METRICS, shortfall

logger = logging.getLogger(__name__)

Opened = tuple[Pipeline, Mapping[str, Any]]  # a pipeline, and what identifies it

_CHECKPOINT = re.compile(r"(.+)/checkpoints/[^/]+/*")
_AXES = ("guidance", "steps", "training step")  # of the plot: the first that varies


@dataclass(frozen=True)
class Point:
    """One model under one setting.

    Attributes:
        model: What `load_pipeline` accepts.
        sampling: The setting.
    """

    model: str
    sampling: Sampling


def grid(models: Iterable[str], sampling: Sampling, values: Mapping[str, Sequence[Any]]) -> list[Point]:
    """Combine everything with everything, model by model.

    Args:
        models: What `load_pipeline` accepts.
        sampling: What all points have in common.
        values: The fields of `Sampling` that vary; an empty sequence leaves a field as it is.

    Returns:
        The points, each once. Without guidance neither its interval nor its channels have an effect, so the points that
        differ in these alone are one.
    """
    varying = {field: options for field, options in values.items() if options}
    settings = [
        replace(sampling, **dict(zip(varying, chosen, strict=True))) for chosen in itertools.product(*varying.values())
    ]
    return list(dict.fromkeys(Point(model, _plain(setting)) for model in models for setting in settings))


def _plain(sampling: Sampling) -> Sampling:
    """Leave out what has no effect."""
    if sampling.guidance != 1:
        return sampling
    return replace(sampling, guidance_interval=None, guidance_channels=None)


def measure_grid(
    points: Sequence[Point],
    open_pipeline: Callable[[str], Opened],
    evaluator: Evaluator,
    num_samples: int,
    folder: Path,
    *,
    stopping: Callable[[], bool] = never,
) -> list[dict[str, Any]] | None:
    """Measure all points, or read the results of those that were measured before; a collective.

    Every model is opened and every setting checked before the first sample. Table and plot are written after each
    point, of the results so far.

    Args:
        points: The points, those of one model next to each other.
        open_pipeline: Opens a model on every process; called again where another model was opened in between.
        evaluator: Measures.
        num_samples: Images or clips per point.
        folder: Where the results are, a JSON per point.
        stopping: Whether to stop early.

    Returns:
        The results, as in the JSON files, on every process; None if it was stopped.

    Raises:
        ValueError: A setting does not fit a model, the metrics are not of what it makes, or a result of that name was
            made otherwise.
        EvaluationError: A process of several failed.
    """
    models = _OneAtATime(open_pipeline)
    paths: dict[Path, Point] = {}
    results: dict[Path, dict[str, Any]] = {}
    said: set[str] = set()
    for point in points:
        images = _samples(models(point.model), num_samples, point)
        evaluator.check(images)
        path = folder / f"{_name(point.model, images)}.json"
        if path in paths and paths[path].model != point.model:
            raise ValueError(f"{paths[path].model} and {point.model} would both be {path.name}: sweep them apart")
        paths.setdefault(path, point)
        stored = on_main(functools.partial(_stored, path, evaluator.request_for(images)))
        if stored is not None:
            results[path] = stored
        about = {"path": evaluator.request.reference, **evaluator.about_reference()}
        _warn(early_warnings(about, images.image_size, evaluator.request.protocol, images.fps), said)
        del images  # and its model, before the next one is opened
    for number, (path, point) in enumerate(paths.items(), 1):
        if path in results:
            logger.info("point %d of %d: %s is there already", number, len(paths), path)
            continue
        images = _samples(models(point.model), num_samples, point)
        logger.info("point %d of %d: %s, %s", number, len(paths), point.model, images.name)
        measured = _measure_point(images, path, evaluator, stopping, said)
        del images
        if measured is None:
            return None
        results[path] = measured
        so_far = [results[path] for path in paths if path in results]
        on_main(functools.partial(write_sweep, so_far, folder))
    return [results[path] for path in paths]


def write_sweep(results: Sequence[Mapping[str, Any]], folder: Path) -> str:
    """Write the table as sweep.md and sweep.csv, and the plot as sweep.png.

    Args:
        results: As from `measure_grid`, at least one.
        folder: Where.

    Returns:
        The table, in Markdown.

    Raises:
        ImportError: If matplotlib is not installed; the tables stand.
    """
    text = markdown(results)
    _write_text(folder / "sweep.md", text)
    _write_text(folder / "sweep.csv", _csv(results))
    save_charts(panels(results), folder / "sweep.png")
    return text


def markdown(results: Sequence[Mapping[str, Any]]) -> str:
    """Lay the results out: what all have in common above a table of the rest, the best of each metric in bold.

    Args:
        results: As from `measure_grid`, at least one.

    Returns:
        Markdown.
    """
    settings = [settings_of(result) for result in results]
    varying = _varying(settings)
    common = {key: value for key, value in settings[0].items() if key not in varying}
    metrics = list(results[0]["metrics"])
    best = {name: _best(results, name) for name in metrics}
    rows = [[*varying, *metrics], ["---"] * (len(varying) + len(metrics))]
    for setting, result in zip(settings, results, strict=True):
        values = {name: result["metrics"][name]["value"] for name in metrics}
        cells = [f"**{value:.5g}**" if value == best[name] else f"{value:.5g}" for name, value in values.items()]
        rows.append([*(_text(setting[key]) for key in varying), *cells])
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    caption = [f"{key} {_text(value)}" for key, value in common.items()]
    for name in metrics:
        floors = [result["metrics"][name].get("floor") for result in results]
        if floors[0] is not None and all(floor == floors[0] for floor in floors):
            floor = floors[0]
            others = f" against {floor['against']} others" if "against" in floor else ""
            caption.append(f"floor of {name} {floor['value']:.{2 if others else 3}g} ({floor['n']} real{others})")
    return f"{', '.join(caption)}\n\n{table}\n"


def panels(results: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Draw the first Frechet distance against guidance, and the inception score against it where it was measured.

    Args:
        results: As from `measure_grid`, at least one.

    Returns:
        One panel or two, a curve for every combination of the other settings. Without a Frechet distance the first
        value is drawn. Where guidance does not vary, steps or the training step take its place; checkpoints of one run
        are one model.
    """
    settings = [settings_of(result) for result in results]
    varying = _varying(settings)
    numbers = [key for key in varying if all(isinstance(setting[key], int | float) for setting in settings)]
    axis = next((key for key in _AXES if key in numbers), _AXES[0])
    kinds = {name: METRICS[metric_of(name, results[0]["generated"]["n"])].kind for name in results[0]["metrics"]}
    first = next((name for name, kind in kinds.items() if kind == "frechet"), next(iter(kinds)))
    score = next((name for name, kind in kinds.items() if kind == "is" and name != first), None)
    curves: dict[str, list[tuple[float, ...]]] = {}
    for setting, result in zip(settings, results, strict=True):
        label = ", ".join(f"{key} {_text(setting[key])}" for key in varying if key != axis)
        names = (first,) if score is None else (first, score)
        values = (result["metrics"][name]["value"] for name in names)
        curves.setdefault(label, []).append((setting[axis], *values))

    def draw(x: int, y: int) -> list[Series]:
        columns = {label: tuple(zip(*sorted(points), strict=True)) for label, points in curves.items()}
        return [
            Series(label, values[x], values[y], {"marker": ".", "color": f"C{number}"})
            for number, (label, values) in enumerate(columns.items())
        ]

    drawn = [Panel(axis, first, draw(0, 1), height=3)]
    return drawn if score is None else [*drawn, Panel(first, score, draw(1, 2), height=3)]


def settings_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a result by their names in the table; a checkpoint's model is its run, and a training step."""
    generated = result["generated"]
    checkpoint = None if generated["step"] is None else _CHECKPOINT.fullmatch(generated["path"])
    return {
        "model": checkpoint[1] if checkpoint else generated["path"],
        "weights": generated["weights"],
        "training step": "unknown" if generated["step"] is None else generated["step"],
        "scheduler": generated["scheduler"]["class"].removesuffix("Scheduler"),
        "steps": generated["num_inference_steps"],
        "guidance": generated["guidance_scale"],
        "interval": "{:g} to {:g}".format(*generated["guidance_interval"]),
        "channels": generated["guidance_channels"] or "all",
        "labels": generated["labels"],
        "seed": generated["seed"],
        "samples": generated["n"],
        **({"frames": generated["frames"]} if "frames" in generated else {}),
        "reference": (result["reference"] or {"path": "none"})["path"],
        **({"real clips": result["reference"]["cut"]} if "cut" in (result["reference"] or {}) else {}),
        "protocol": result["protocol"] or "none",
    }


def _samples(opened: Opened, num_samples: int, point: Point) -> SampledImages:
    pipe, about = opened
    return SampledImages(pipe, num_samples, point.sampling, about)


class _OneAtATime:
    """Opens models, and keeps the last one alone: a sweep may have more than memory holds."""

    def __init__(self, open_pipeline: Callable[[str], Opened]) -> None:
        self._open = open_pipeline
        self._last: tuple[str, Opened] | None = None

    def __call__(self, model: str) -> Opened:
        if self._last is None or self._last[0] != model:
            self._last = None  # freed before the next one is loaded
            self._last = model, self._open(model)
        return self._last[1]


def _measure_point(
    images: SampledImages, path: Path, evaluator: Evaluator, stopping: Callable[[], bool], said: set[str]
) -> dict[str, Any] | None:
    """Make the result of one point, on every process; None if it was stopped. `said` has the warnings so far."""
    request = evaluator.request_for(images)
    partial = together(lambda: Partial(path.with_name(f"{path.name}.partial"), request))
    measurement = evaluator.measure(images, partial=partial, stopping=stopping)
    if measurement is None:
        return None
    result = {**content(measurement), "request": request}

    def write() -> None:
        _warn(warnings(measurement), said)
        write_json(path, result)
        partial.remove()

    on_main(write)
    return result


def _warn(found: Iterable[str], said: set[str]) -> None:
    """Log warnings that were not said before; on the other processes the level of the log keeps them quiet."""
    for warning in found:
        if warning not in said:
            logger.warning("warning: %s", warning)
        said.add(warning)


def _stored(path: Path, request: Mapping[str, Any]) -> dict[str, Any] | None:
    """The result in a file; None without a file, a ValueError if it was made otherwise."""
    if not path.is_file():
        return None
    try:
        result: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        there = result["request"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is not a result of a sweep ({error!r}): delete it, or give another --out") from error
    found = differences(there, request)
    if found:
        raise ValueError(f"{path} was made otherwise ({'; '.join(found)}): delete it, or give another --out")
    return result


def _name(model: str, images: SampledImages) -> str:
    """File name of a point: all that may differ between the points of a sweep, readably."""
    steps, scale, (low, high), channels = images.settings.values()
    parts = [
        re.sub(r"[^\w.-]+", "-", model).strip("-.")[-80:],
        type(images.scheduler).__name__.removesuffix("Scheduler"),
    ]
    parts += [f"steps-{steps}", f"guidance-{scale:g}", f"interval-{low:g}-{high:g}"]
    parts += [] if channels is None else [f"channels-{channels}"]
    return "_".join(parts)


def _varying(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    return [key for key in settings[0] if any(setting[key] != settings[0][key] for setting in settings)]


def _best(results: Sequence[Mapping[str, Any]], name: str) -> float:
    metric = metric_of(name, results[0]["generated"]["n"])
    values: list[float] = [result["metrics"][name]["value"] for result in results]
    return min(values, key=lambda value: shortfall(metric, name, value))


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _csv(results: Sequence[Mapping[str, Any]]) -> str:
    """One row per result: all settings and all values."""
    rows = [
        {**settings_of(result), **{name: entry["value"] for name, entry in result["metrics"].items()}}
        for result in results
    ]
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _write_text(path: Path, text: str) -> None:
    write_durably(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
