"""Suites `block` and `video`: forward and backward of one Iwin block against others with the same weights.

`global` is the same block with attention over the whole grid, `floor` and `four-copy` are in sides.py. `video` measures
grids of three axes, and adds `factorised`, a spatial and a temporal block in turn, and what the convolution costs.
Reading it: docs/performance.md.
"""

import argparse
import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.goals import Result, as_dicts, by_axes, linked, markdown, setting_of, window_text
from benchmarks.measure import Step, quartiles, ratio, time_interleaved
from benchmarks.modes import build_modes, check_modes, measure_sides
from benchmarks.options import DTYPES, add_grids, add_sizes, batch_of, shapes
from benchmarks.sides import (
    LinearLayers,
    Shape,
    TorchConv,
    build_sides,
    forward_backward,
    iwin_block,
    largest_error,
    random_inputs,
    require_agreement,
    windows_for,
)

RATIOS = (("four-copy", "iwin"), ("global", "iwin"), ("factorised", "iwin"), ("iwin", "floor"))  # of what was measured
GRIDS = {
    ("block", "cpu"): ((16, 16), (32, 32), (64, 64)),
    ("block", "cuda"): ((16, 16), (32, 32), (64, 64), (128, 128)),
    ("video", "cpu"): ((8, 16, 16), (16, 16, 16), (16, 32, 32)),
    ("video", "cuda"): ((8, 16, 16), (16, 16, 16), (16, 32, 32)),
}
REPEATS = {"block": 15, "video": 7}


@dataclasses.dataclass(frozen=True)
class Measured:
    """What is known of one side at one size.

    Attributes:
        seconds: Of forward and backward, one per round.
        peak_bytes: Held above what was held before the step.
        macs: Multiply-adds of a forward pass, per sample.
        error: Difference from the straightforward twin; None for the twins themselves and the floor.
    """

    seconds: list[float]
    peak_bytes: float
    macs: float
    error: float | None


def add_options(parser: argparse.ArgumentParser, suite: str, device: str) -> None:
    """Add the suite's options; the defaults are those of the goals."""
    add_sizes(parser, device, layers=False)
    add_grids(parser, device, GRIDS[suite, device])
    parser.set_defaults(repeats=REPEATS[suite])


def prepare(arguments: argparse.Namespace) -> None:
    """Check what was asked for.

    Args:
        arguments: Parsed; gets `shapes`.

    Raises:
        ValueError: If something cannot work.
    """
    arguments.shapes = shapes(arguments, rank=3 if arguments.suite == "video" else 2)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Measure every grid.

    Args:
        arguments: As prepared.

    Returns:
        `results` for the goals, `rows` by grid, mode and window, and of video `convolution`.
    """
    rows = [row for shape in arguments.shapes for row in measure_grid(shape, arguments)]
    record = {"results": as_dicts([result for row in rows for result in results(row)]), "rows": rows}
    if arguments.suite == "video":
        record["convolution"] = [measure_convolution(shape, arguments) for shape in arguments.shapes]
    return record


def count_macs(shape: Shape, windows: Sequence[tuple[int, ...]]) -> dict[str, float]:
    """Count the multiply-adds of matrix products, attention and convolution, per sample in a forward pass."""
    macs = {}
    with torch.device("meta"):
        x, conditioning, _ = random_inputs(shape, 1, torch.device("meta"), torch.float32)
        for name, block in build_sides(shape, windows).items():
            with FlopCounterMode(display=False) as counter:
                block(x, conditioning)
            macs[name] = counter.get_total_flops() / 2
    return macs


def measure_grid(shape: Shape, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Check, time and weigh all sides on one grid, in all modes, in turn.

    Args:
        shape: Of the block and its grid.
        arguments: As prepared.

    Returns:
        One row per mode and window, as written to JSON.
    """
    device, batch = torch.device(arguments.device), batch_of(shape, arguments.batch_tokens)
    torch.manual_seed(0)
    torch.compiler.reset()  # a size compiled for itself, not as the second case of a dynamic shape
    windows = windows_for(shape)
    sides = {name: block.to(device) for name, block in build_sides(shape, windows).items()}
    one, inputs = (
        random_inputs(shape, count, device, dtype)
        for count, dtype in ((1, torch.float32), (batch, DTYPES[arguments.dtype]))
    )
    errors, seconds, memory = measure_sides(sides, one, inputs, arguments)
    macs = count_macs(shape, windows)
    rows = []
    for mode in arguments.modes:
        measured = {
            name: Measured(seconds[mode, name], memory[mode, name], macs[name], errors.get(name)) for name in sides
        }
        if shape.is_video:
            measured["factorised"] = mean_of(measured["spatial"], measured["temporal"])
        rows += [{"mode": mode, **summarise(shape, batch, window, measured)} for window in windows]
    return rows


def mean_of(first: Measured, second: Measured) -> Measured:
    """What a block costs in a stack of two kinds in turn: times round by round, since all activations are kept."""
    return Measured(
        seconds=[(a + b) / 2 for a, b in zip(first.seconds, second.seconds, strict=True)],
        peak_bytes=(first.peak_bytes + second.peak_bytes) / 2,
        macs=(first.macs + second.macs) / 2,
        error=max((m.error for m in (first, second) if m.error is not None), default=None),
    )


def measure_convolution(shape: Shape, arguments: argparse.Namespace) -> dict[str, Any]:
    """Check and time the convolution, and torch's own, against the linear layers of the block, in the first mode.

    Args:
        shape: Of the block and its grid.
        arguments: As prepared.

    Returns:
        One row, as written to JSON: ratios of forward and backward as [first quartile, median, third].
    """
    device, dtype, mode = torch.device(arguments.device), DTYPES[arguments.dtype], arguments.modes[0]
    torch.manual_seed(0)
    torch.compiler.reset()
    block = iwin_block(shape, -1).to(device)
    modules: dict[str, nn.Module] = {
        "taps": block.conv,
        "conv3d": TorchConv(block.conv, copies=False),
        "conv3d with copies": TorchConv(block.conv),
        "linear": LinearLayers(block),
    }
    x, _, cotangent = random_inputs(shape, batch_of(shape, arguments.batch_tokens), device, dtype)
    small, _, small_cotangent = random_inputs(shape, 1, device, torch.float32)
    expected = forward_backward(block.conv, [small, small_cotangent])
    for name in ("conv3d", "conv3d with copies"):
        error = largest_error(forward_backward(modules[name], [small, small_cotangent]), expected)
        require_agreement(f"'{name}' and 'taps'", error)
    built = build_modes(modules, [mode], dtype)
    check_modes(modules, built, [x, cotangent])
    steps: dict[str, Step] = {
        name: functools.partial(forward_backward, module, [x, cotangent]) for (_, name), module in built.items()
    }
    seconds = time_interleaved(steps, device, arguments.repeats)
    return {
        "grid": shape.grid,
        "mode": mode,
        "milliseconds": {name: [1e3 * q for q in quartiles(values)] for name, values in seconds.items()},
        "share_of_linear": {name: ratio(seconds[name], seconds["linear"]) for name in modules if name != "linear"},
    }


def summarise(shape: Shape, batch: int, window: tuple[int, ...], measured: dict[str, Measured]) -> dict[str, Any]:
    """Put what was measured for one window into a row: times and ratios as [first quartile, median, third]."""
    of_this_window = {"iwin": f"iwin {by_axes(window)}", "four-copy": f"four-copy {by_axes(window)}"}
    names = ("iwin", "four-copy", "global", "spatial", "temporal", "factorised", "floor")
    sides = {name: measured[key] for name in names if (key := of_this_window.get(name, name)) in measured}
    return {
        "setting": dataclasses.asdict(setting_of(shape.grid, window, shape.kernel)),
        "batch": batch,
        "sides": {
            name: {
                "milliseconds": [1e3 * q for q in quartiles(m.seconds)],
                "peak_mib": m.peak_bytes / 2**20,
                "forward_gmacs_per_sample": m.macs / 1e9,
                "difference_from_twin": m.error,
            }
            for name, m in sides.items()
        },
        "ratios": {
            f"{a} / {b}": {
                "time": ratio(sides[a].seconds, sides[b].seconds),
                "memory": sides[a].peak_bytes / sides[b].peak_bytes,
                "macs": sides[a].macs / sides[b].macs,
            }
            for a, b in RATIOS
            if a in sides
        },
    }


def results(row: dict[str, Any]) -> list[Result]:
    """What of a row the goals ask for."""
    setting = setting_of(*(row["setting"][name] for name in ("grid", "window", "kernel")))
    ratios = {name: row["ratios"][name]["time"] for name in ("global / iwin", "iwin / floor")}
    if len(setting.grid) == 3:
        return [Result("global 3-D block / Iwin", row["mode"], ratios["global / iwin"], setting)]
    return [Result("Iwin block / its floor", row["mode"], ratios["iwin / floor"], setting)]


def tables(record: dict[str, Any]) -> str:
    """Format a record, as written to JSON, for the terminal and for Markdown."""
    parts = [markdown([_cells(row) for row in record["rows"]], left=("mode", "all pairs linked"))]
    if "convolution" in record:
        parts.append(convolution_table(record["convolution"]))
    return "\n\n".join(parts)


def _cells(row: dict[str, Any]) -> list[tuple[str, str]]:
    """The columns of one row, each as (name, text)."""
    low, median, high = row["sides"]["iwin"]["milliseconds"]
    setting = row["setting"]
    cells = [
        ("mode", row["mode"]),
        ("tokens", f"{math.prod(setting['grid']):,} = {by_axes(setting['grid'])}"),
        ("M", window_text(setting["window"], setting["planned"])),
        ("K", by_axes(setting["kernel"])),
        ("all pairs linked", linked(setting["linked"])),
        ("iwin ms (quartiles)", f"{median:.1f} ({low:.1f} to {high:.1f})"),
    ]
    ratios = {name: row["ratios"][name] for name in (f"{a} / {b}" for a, b in RATIOS) if name in row["ratios"]}
    for name, value in ratios.items():
        cells.append((name, f"{value['time'][1]:.2f}"))
        if not name.startswith("four-copy"):  # whose multiply-adds are the same
            cells.append(("by MACs", f"{value['macs']:.2f}"))
    cells.append(("iwin MiB", f"{row['sides']['iwin']['peak_mib']:.0f}"))
    return cells + [(f"MiB {n}", f"{r['memory']:.2f}") for n, r in ratios.items() if not n.endswith("floor")]


def convolution_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format the rows of `measure_convolution`."""
    return markdown(
        [
            [
                ("tokens", by_axes(row["grid"])),
                ("linear layers ms", f"{row['milliseconds']['linear'][1]:.1f}"),
                *((f"{name} / linear", f"{median:.3f}") for name, (_, median, _) in row["share_of_linear"].items()),
            ]
            for row in rows
        ]
    )
