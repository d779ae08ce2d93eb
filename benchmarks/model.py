"""Suite `model`: forward and backward of the Iwin model against itself with global attention, and its memory."""

import argparse
import dataclasses
import math
from typing import Any

import torch

from benchmarks.goals import Result, as_dicts, by_axes, linked, markdown, setting_of, window_text
from benchmarks.measure import quartiles, ratio
from benchmarks.modes import measure_sides
from benchmarks.options import DTYPES, add_grids, add_sizes, batch_of, shapes
from benchmarks.sides import Denoise, Shape, iwin_model, model_inputs, windows_for

GRIDS = {"cpu": ((16, 16), (32, 32), (64, 64)), "cuda": ((16, 16), (32, 32), (64, 64), (128, 128))}


def add_options(parser: argparse.ArgumentParser, suite: str, device: str) -> None:  # noqa: ARG001  (those of a Suite)
    """Add the suite's options; the defaults are those of the goals."""
    add_sizes(parser, device)
    add_grids(parser, device, GRIDS[device])
    parser.set_defaults(repeats=9)


def prepare(arguments: argparse.Namespace) -> None:
    """Check what was asked for.

    Args:
        arguments: Parsed; gets `shapes`.

    Raises:
        ValueError: If something cannot work.
    """
    arguments.shapes = shapes(arguments, rank=2)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure every grid.

    Args:
        arguments: As prepared.

    Returns:
        `results` for the goals, `rows` by grid, mode and window.
    """
    rows = [row for shape in arguments.shapes for row in measure_grid(shape, arguments)]
    results = []
    for row in rows:
        setting = setting_of(*(row["setting"][name] for name in ("grid", "window", "kernel")))
        results.append(Result("global model / Iwin", row["mode"], row["time_of_global"], setting))
        results.append(Result("memory of Iwin / of global", row["mode"], (row["memory_over_global"],) * 3, setting))
    return {"results": as_dicts(results), "rows": rows}


def build_models(shape: Shape, layers: int, windows: list[tuple[int, ...]]) -> dict[str, Denoise]:
    """Build the competitors, all with the same weights: "global", and "iwin 8x8" for every window."""
    model = iwin_model(shape, layers, -1)
    sides = {"global": Denoise(model)}
    for window in windows:
        iwin = iwin_model(shape, layers, window)
        iwin.load_state_dict(model.state_dict())
        sides[f"iwin {by_axes(window)}"] = Denoise(iwin)
    return sides


def measure_grid(shape: Shape, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Check, time and weigh the models on one grid, in all modes, in turn.

    Args:
        shape: Of the model and its grid.
        arguments: As prepared.

    Returns:
        One row per mode and window, as written to JSON.
    """
    device, dtype = torch.device(arguments.device), DTYPES[arguments.dtype]
    batch, windows = batch_of(shape, arguments.batch_tokens), windows_for(shape)
    torch.manual_seed(0)
    torch.compiler.reset()  # a size compiled for itself, not as the second case of a dynamic shape
    sides = {name: side.to(device) for name, side in build_models(shape, arguments.layers, windows).items()}
    inputs = (model_inputs(shape, 1, device, torch.float32), model_inputs(shape, batch, device, dtype))
    errors, seconds, memory = measure_sides(sides, *inputs, arguments)
    return [
        {
            "mode": mode,
            "setting": dataclasses.asdict(setting_of(shape.grid, window, shape.kernel)),
            "batch": batch,
            "layers": arguments.layers,
            "milliseconds": [1e3 * q for q in quartiles(seconds[mode, name])],
            "peak_mib": memory[mode, name] / 2**20,
            "time_of_global": ratio(seconds[mode, "global"], seconds[mode, name]),
            "memory_over_global": memory[mode, name] / memory[mode, "global"],
            "difference_from_twin": errors[name],
        }
        for mode in arguments.modes
        for window in windows
        for name in [f"iwin {by_axes(window)}"]
    ]


def tables(record: dict[str, Any]) -> str:
    """Format a record, as written to JSON, for the terminal and for Markdown."""
    rows = []
    for row in record["rows"]:
        setting, (low, median, high) = row["setting"], row["milliseconds"]
        rows.append(
            [
                ("mode", row["mode"]),
                ("tokens", f"{math.prod(setting['grid']):,} = {by_axes(setting['grid'])}"),
                ("M", window_text(setting["window"], setting["planned"])),
                ("all pairs linked", linked(setting["linked"])),
                ("batch", str(row["batch"])),
                ("iwin ms (quartiles)", f"{median:.0f} ({low:.0f} to {high:.0f})"),
                ("global / iwin", f"{row['time_of_global'][1]:.2f}"),
                ("iwin MiB", f"{row['peak_mib']:.0f}"),
                ("MiB iwin / global", f"{row['memory_over_global']:.2f}"),
            ]
        )
    return markdown(rows, left=("mode", "all pairs linked"))
