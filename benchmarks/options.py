"""Command-line options that several suites share, and the sizes that stand for a device unless others are given."""

import argparse
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch._inductor import config as inductor

from benchmarks.goals import KERNELS, by_axes
from benchmarks.sides import Shape, windows_for
from iwin_dit.models.compilation import compile_options, onednn_multiplies_faster

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
# Modes with the compiler's options that they add to the library's own (`compile_options`); None is not compiled.
# "-aten" leaves matrix products to the library that eager code uses, "-plain" everything to torch.
MODES: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "compiled": {},
    "compiled-aten": {"post_grad_custom_post_pass": None},
    "compiled-plain": {name: getattr(inductor, name) for name in compile_options(torch.device("cpu"))},
}
# The sizes of the goals: S's width on a CPU, XL/1 on a GPU. Batches keep their tokens at every size of the grid.
SIZES: dict[str, dict[str, Any]] = {
    "cpu": {"dtype": "float32", "width": 384, "heads": 6, "layers": 4, "batch_tokens": 4096},
    "cuda": {"dtype": "bf16", "width": 1152, "heads": 16, "layers": 28, "batch_tokens": 16384},
}


def positive(text: str) -> int:
    """Parse a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return int(text)


def per_axis_sizes(text: str) -> tuple[int, ...]:
    """Parse sizes per axis, such as 32x32 or 16x32x32."""
    return tuple(positive(part) for part in text.split("x"))


def add_sizes(parser: argparse.ArgumentParser, device: str, layers: bool = True, batch: bool = True) -> None:
    """Add what decides the size of a model and of its batch.

    Args:
        parser: Of a suite.
        device: Chooses the defaults.
        layers: Whether the suite measures whole models.
        batch: Whether its batches are counted in tokens.
    """
    sizes = SIZES[device]
    parser.add_argument("--dtype", default=sizes["dtype"], choices=tuple(DTYPES), help="of weights and activations")
    parser.add_argument("--width", type=positive, default=sizes["width"], help="channels C")
    parser.add_argument("--heads", type=positive, default=sizes["heads"])
    if layers:
        parser.add_argument("--layers", type=positive, default=sizes["layers"], help="blocks")
    if batch:
        tokens = "the same at every size; a larger sample is a batch of its own"
        parser.add_argument("--batch-tokens", type=positive, default=sizes["batch_tokens"], help=tokens)


def add_grids(parser: argparse.ArgumentParser, device: str, grids: Sequence[tuple[int, ...]]) -> None:
    """Add the grids to measure on, the kernel, and the modes.

    Args:
        parser: Of a suite.
        device: Chooses the defaults.
        grids: Measured unless others are given; all of one rank.
    """
    rank = len(grids[0])
    parser.add_argument("--grids", type=per_axis_sizes, nargs="+", default=list(grids), help="of tokens, HxW or TxHxW")
    parser.add_argument("--kernel", type=per_axis_sizes, default=KERNELS[rank], help="K of the convolution per axis")
    add_modes(parser, device)


def add_modes(parser: argparse.ArgumentParser, device: str) -> None:
    """Add the modes to measure in, those alone that differ from each other here.

    Args:
        parser: Of a suite.
        device: Chooses them.
    """
    ours = ["compiled-aten"] if onednn_multiplies_faster() else []
    default = ["compiled"] if device == "cuda" else ["eager", "compiled", *ours]
    choices = ["eager", "compiled"] if device == "cuda" else [*default, "compiled-plain"]
    meaning = (
        "compiled: the Iwin blocks of a side, as train.compile does, or all of it where it has none; compiled-aten: "
        "with matrix products by the library that eager code uses; compiled-plain: with torch's own options"
    )
    parser.add_argument("--modes", nargs="+", choices=choices, default=default, help=meaning)


def shapes(arguments: argparse.Namespace, rank: int) -> list[Shape]:
    """Read the grids.

    Args:
        arguments: With the options of `add_sizes` and `add_grids`.
        rank: Of the suite's grids.

    Returns:
        One shape per grid.

    Raises:
        ValueError: If a grid or the kernel has another rank, a window does not divide a grid, or batches of the tokens
            asked for do not hold whole samples.
    """
    if any(len(sizes) != rank for sizes in (*arguments.grids, arguments.kernel)):
        given = ", ".join(by_axes(sizes) for sizes in (*arguments.grids, arguments.kernel))
        raise ValueError(f"expected --grids and --kernel of {rank} axes for --suite {arguments.suite}, got {given}")
    found = [Shape(grid, arguments.width, arguments.heads, arguments.kernel) for grid in arguments.grids]
    for shape in found:
        windows_for(shape)
        tokens = math.prod(shape.grid)
        if tokens < arguments.batch_tokens and arguments.batch_tokens % tokens:
            raise ValueError(
                f"--batch-tokens must be a multiple of the {tokens} tokens of {by_axes(shape.grid)}, or fewer, "
                f"got {arguments.batch_tokens}"
            )
    return found


def batch_of(shape: Shape, batch_tokens: int) -> int:
    """Samples in a batch."""
    return max(1, batch_tokens // math.prod(shape.grid))
