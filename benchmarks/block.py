"""Forward and backward of one Iwin block against others with the same weights, in one run.

    python -m benchmarks.block [--video] [--device cuda --dtype bf16 --compile] [--out FILE.json]

`global` is the same block with attention over the whole grid, `floor` has no mixing of tokens at all: norms,
modulation, linear layers, MLP and residuals. Images are also compared with `four-copy`, which rearranges as the paper
words it: RTR, partition, reverse and restore copy the grid once each, and the convolution works in NCHW. `--video` adds
`factorised`, a spatial and a temporal block in turn, and what the convolution costs. Reading it: docs/performance.md.
"""

import argparse
import copy
import dataclasses
import functools
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.measure import Step, check_device, describe_machine, peak_memory, quartiles, time_interleaved
from iwin_dit.files import write_json
from iwin_dit.nn import DepthwiseConv, IwinAttention, IwinDiTBlock
from iwin_dit.nn.blocks import SwiGLU, modulate
from iwin_dit.nn.windows import global_exchange, per_axis, plan_window

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = 1e-3  # of the largest value, float32; TF32 convolutions have 10 bits, a misplaced token is wrong by about 1
RATIOS = (("four-copy", "iwin"), ("global", "iwin"), ("factorised", "iwin"), ("iwin", "floor"))  # of what was measured


@dataclasses.dataclass(frozen=True)
class Cases:
    """What a run measures unless the command line says otherwise.

    Attributes:
        grids: Axis lengths N of each, (H, W) or (T, H, W).
        kernel: Kernel lengths K.
        repeats: Rounds that are counted.
    """

    grids: tuple[tuple[int, ...], ...]
    kernel: tuple[int, ...]
    repeats: int


IMAGES = Cases(grids=((16, 16), (32, 32), (64, 64)), kernel=(3, 3), repeats=15)
VIDEO = Cases(grids=((8, 16, 16), (16, 16, 16), (16, 32, 32)), kernel=(2, 3, 3), repeats=7)


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a block and of the grid it works on.

    Attributes:
        grid: Axis lengths N, (H, W) or (T, H, W).
        width: Channels C.
        heads: Attention heads.
        kernel: Kernel lengths K, one per axis.
    """

    grid: tuple[int, ...]
    width: int
    heads: int
    kernel: tuple[int, ...]

    @property
    def is_video(self) -> bool:
        """Whether the first axis is time."""
        return len(self.grid) == 3

    @property
    def causal_axes(self) -> tuple[int, ...]:
        """Axes on which the block's convolution sees the past alone: time."""
        return (0,) if self.is_video else ()


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


def rtr(x: torch.Tensor, first: Sequence[int], second: Sequence[int]) -> torch.Tensor:
    """Read every axis of (B, *S, C) as (first, second), swap the two and read it as one again: one copy of the grid."""
    digits = [length for pair in zip(first, second, strict=True) for length in pair]
    x = x.reshape(len(x), *digits, x.shape[-1])
    x = x.permute(0, *(1 + (i ^ 1) for i in range(len(digits))), -1).contiguous()
    return x.view(len(x), *(a * b for a, b in zip(first, second, strict=True)), x.shape[-1])


class FourCopyAttention(nn.Module):
    """Iwin attention as the paper words it, one copy of the grid per named step; (B, *S, C) -> (B, *S, C).

    Args:
        attn: Layer whose projections, norms and window are used; the window must divide the grid.
    """

    def __init__(self, attn: IwinAttention) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend inside interleaved windows, (B, *S, C) -> (B, *S, C)."""
        B, *S, C = x.shape
        rank = len(S)
        window = per_axis(self.attn.window_size, rank, "window")
        M = [n if m == -1 else m for n, m in zip(S, window, strict=True)]
        G = [n // m for n, m in zip(S, M, strict=True)]
        # 1. RTR on every axis, (M, G) -> (G, M)
        x = rtr(x, M, G)
        # 2. Partition into windows of neighbours
        x = x.view(B, *(digit for pair in zip(G, M, strict=True) for digit in pair), C)
        x = x.permute(0, *range(1, 2 * rank, 2), *range(2, 2 * rank + 1, 2), -1).contiguous()
        x = x.view(-1, math.prod(M), C)  # (B * windows, L, C)
        q, k, v = (f(x).unflatten(-1, (self.attn.heads, -1)) for f in (self.attn.to_q, self.attn.to_k, self.attn.to_v))
        q, k, v = (y.transpose(1, 2) for y in (self.attn.norm_q(q), self.attn.norm_k(k), v))
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.attn.to_out(x)
        # 3. Reverse the partition
        order = (axis for i in range(1, rank + 1) for axis in (i, rank + i))
        x = x.view(B, *G, *M, C).permute(0, *order, -1).contiguous().view(B, *S, C)
        # 4. Restore: RTR with M in place of G
        return rtr(x, G, M)


class TorchConv(nn.Module):
    """Depthwise convolution by torch's conv2d or conv3d, (B, *S, C) -> (B, *S, C).

    Args:
        conv: Layer whose kernel and bias are used; of three axes, the first is causal.
        copies: Whether to copy to NCHW or NCTHW and back, or to give torch the tokens as they lie.
    """

    def __init__(self, conv: DepthwiseConv, copies: bool = True) -> None:
        super().__init__()
        self.weight, self.bias, self.copies = conv.weight, conv.bias, copies

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve every channel on its own, (B, *S, C) -> (B, *S, C)."""
        *time, K_h, K_w = self.weight.shape[2:]
        convolve = F.conv3d if time else F.conv2d
        padding = (*(K - 1 for K in time), K_h // 2, K_w // 2)  # torch pads both ends of time: the last frames go
        x = x.movedim(-1, 1)
        y = convolve(x.contiguous() if self.copies else x, self.weight, self.bias, padding=padding, groups=x.shape[1])
        y = y[:, :, : x.shape[2]].movedim(1, -1)
        return y.contiguous() if self.copies else y


class FloorBlock(nn.Module):
    """The block without attention and without convolution branch and gate; (B, *S, C) -> (B, *S, C).

    q, k and v are projected, normalised and then added, because a linear layer whose output nobody reads would be left
    out of the backward pass: two additions stand for all mixing.

    Args:
        block: Block whose layers are used.
    """

    def __init__(self, block: IwinDiTBlock) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2 = block.norm1, block.attn, block.norm2
        self.mlp, self.modulation = block.mlp, block.modulation

    def forward(self, x: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        """Map every token on its own, (B, *S, C) and (B, C) -> (B, *S, C)."""
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp, _ = self.modulation(conditioning, x.ndim - 2)
        h = modulate(self.norm1(x), shift_attn, scale_attn)
        attn = self.attn
        q, k, v = (f(h).unflatten(-1, (attn.heads, -1)) for f in (attn.to_q, attn.to_k, attn.to_v))
        x = x + gate_attn * attn.to_out((attn.norm_q(q) + attn.norm_k(k) + v).flatten(-2))
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class LinearLayers(nn.Module):
    """The linear layers of a block that see every token, in a chain, with sums between them; (B, *S, C) -> (B, *S, C).

    Args:
        block: Block whose four projections and MLP are used.
    """

    def __init__(self, block: IwinDiTBlock) -> None:
        super().__init__()
        attn, mlp = block.attn, block.mlp
        assert isinstance(mlp, SwiGLU)
        self.projections = nn.ModuleList([attn.to_q, attn.to_k, attn.to_v])
        self.to_out, self.proj_in, self.proj_out = attn.to_out, mlp.proj_in, mlp.proj_out

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map every token on its own, (B, *S, C) -> (B, *S, C)."""
        q, k, v = (f(x) for f in self.projections)
        gate, value = self.proj_in(self.to_out(q + k + v)).chunk(2, dim=-1)
        return self.proj_out(gate + value)


def iwin_block(shape: Shape, window: int | Sequence[int], weights: IwinDiTBlock | None = None) -> IwinDiTBlock:
    """Build a block with the library's default options, and random modulation or the weights of another block."""
    block = IwinDiTBlock(shape.width, shape.heads, window, rank=len(shape.grid), conv_kernel_size=shape.kernel)
    if weights is None:
        nn.init.normal_(block.modulation.linear.weight, std=shape.width**-0.5)  # so that no gate hides a branch
    else:
        block.load_state_dict(weights.state_dict())
    return block


def straightforward(block: IwinDiTBlock) -> IwinDiTBlock:
    """Copy a block and replace the copy's attention and convolution by the straightforward ones."""
    block = copy.deepcopy(block)
    block.set_submodule("attn", FourCopyAttention(block.attn))
    block.set_submodule("conv", TorchConv(block.conv))
    return block


def by_axes(sizes: Sequence[int]) -> str:
    """Write sizes per axis as 8x8x8."""
    return "x".join(map(str, sizes))


def windows_for(shape: Shape) -> list[tuple[int, ...]]:
    """Choose the windows measured on a grid: 8, from 64 x 64 tokens 16, and the planner's where it differs.

    Args:
        shape: Of the block and its grid.

    Returns:
        Window lengths M per axis.

    Raises:
        ValueError: If a window does not divide the grid, which the straightforward twin cannot do.
    """
    common = 16 if min(shape.grid) >= 64 else 8
    window = tuple(min(common, n) for n in shape.grid)
    if any(n % m for n, m in zip(shape.grid, window, strict=True)):
        raise ValueError(
            f"the windows must divide the grid, got window {by_axes(window)} for {by_axes(shape.grid)} tokens: "
            "choose another grid"
        )
    return list(dict.fromkeys([window, plan_window(shape.grid, shape.kernel, shape.causal_axes)]))


def build_sides(shape: Shape, windows: Sequence[tuple[int, ...]]) -> dict[str, nn.Module]:
    """Build the competitors, all with the same weights.

    Args:
        shape: Of the block and its grid.
        windows: Window lengths M per axis; each must divide the grid.

    Returns:
        Modules (B, *S, C), (B, C) -> (B, *S, C): "global", "floor", and "iwin 8x8" for every window; for images with
        "four-copy 8x8", for video with "spatial" (all of one frame) and "temporal" (one place in all frames).
    """
    weights = iwin_block(shape, -1)
    sides: dict[str, nn.Module] = {"global": weights, "floor": FloorBlock(weights)}
    for window in windows:
        block = iwin_block(shape, window, weights)
        sides[f"iwin {by_axes(window)}"] = block
        if not shape.is_video:
            sides[f"four-copy {by_axes(window)}"] = straightforward(block)
    if shape.is_video:
        sides["spatial"] = iwin_block(shape, (1, -1, -1), weights)
        sides["temporal"] = iwin_block(shape, (-1, 1, 1), weights)
    return sides


def random_inputs(shape: Shape, batch: int, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Draw tokens (B, *S, C) and conditioning (B, C), both with gradients, and the gradient of the output."""
    x = torch.randn(batch, *shape.grid, shape.width, device=device, dtype=dtype, requires_grad=True)
    conditioning = torch.randn(batch, shape.width, device=device, dtype=dtype, requires_grad=True)
    return [x, conditioning, torch.randn_like(x, requires_grad=False)]


def gradients(module: nn.Module, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Run forward and backward, the last input being the gradient of the output: those of inputs and parameters."""
    *arguments, cotangent = inputs
    return torch.autograd.grad(module(*arguments), [*arguments, *module.parameters()], cotangent)


def check_agreement(sides: dict[str, nn.Module], inputs: Sequence[torch.Tensor]) -> dict[str, float]:
    """Compare each side that is an Iwin block, the global one too, with its straightforward twin.

    Args:
        sides: As built by `build_sides`, in float32.
        inputs: As drawn by `random_inputs`, in float32.

    Returns:
        The largest error of output and gradients by side, relative to the largest value of the tensor.

    Raises:
        RuntimeError: If an error exceeds `TOLERANCE`.
    """
    errors = {}
    for name, side in sides.items():
        if not isinstance(side, IwinDiTBlock) or not isinstance(side.attn, IwinAttention):
            continue
        twin = straightforward(side)
        ours = (side(*inputs[:2]), *gradients(side, inputs))
        theirs = (twin(*inputs[:2]), *gradients(twin, inputs))
        relative = [(a - b).abs().max() / b.abs().max() for a, b in zip(ours, theirs, strict=True)]
        errors[name] = torch.stack(relative).max().item()  # NaN where any is NaN
        if not errors[name] <= TOLERANCE:
            raise RuntimeError(
                f"'{name}' and its straightforward twin must agree to {TOLERANCE} of the largest value, "
                f"got {errors[name]:.1e}: nothing was timed"
            )
    return errors


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
    """Check, time and weigh all sides on one grid.

    Args:
        shape: Of the block and its grid.
        arguments: As parsed by `build_parser`.

    Returns:
        One row per window, as written to JSON.
    """
    device, batch = torch.device(arguments.device), max(1, arguments.batch_tokens // math.prod(shape.grid))
    torch.manual_seed(0)
    torch.compiler.reset()  # a size compiled for itself, not as the second case of a dynamic shape
    windows = windows_for(shape)
    sides = {name: block.to(device) for name, block in build_sides(shape, windows).items()}
    errors = check_agreement(sides, random_inputs(shape, 1, device, torch.float32))

    inputs = random_inputs(shape, batch, device, DTYPES[arguments.dtype])
    steps = make_steps(sides, inputs, arguments)
    seconds = time_interleaved(steps, device, arguments.repeats)
    memory = peak_memory(steps, device)
    macs = count_macs(shape, windows)
    measured = {name: Measured(seconds[name], memory[name], macs[name], errors.get(name)) for name in sides}
    if shape.is_video:
        measured["factorised"] = mean_of(measured["spatial"], measured["temporal"])
    return [summarise(shape, batch, window, measured) for window in windows]


def make_steps(
    modules: dict[str, nn.Module], inputs: Sequence[torch.Tensor], arguments: argparse.Namespace
) -> dict[str, Step]:
    """Cast and, where asked for, compile modules; return the forward and backward pass of each."""
    steps: dict[str, Step] = {}
    for name, module in modules.items():
        module.to(DTYPES[arguments.dtype])
        if arguments.compile:
            module.compile(fullgraph=True, dynamic=False)
        steps[name] = functools.partial(gradients, module, inputs)
    return steps


def mean_of(first: Measured, second: Measured) -> Measured:
    """What a block costs in a stack of two kinds in turn: times round by round, since all activations are kept."""
    return Measured(
        seconds=[(a + b) / 2 for a, b in zip(first.seconds, second.seconds, strict=True)],
        peak_bytes=(first.peak_bytes + second.peak_bytes) / 2,
        macs=(first.macs + second.macs) / 2,
        error=max((m.error for m in (first, second) if m.error is not None), default=None),
    )


def measure_convolution(shape: Shape, arguments: argparse.Namespace) -> dict[str, Any]:
    """Time the convolution, and torch's own, against the linear layers of the block.

    Args:
        shape: Of the block and its grid.
        arguments: As parsed by `build_parser`.

    Returns:
        One row, as written to JSON: ratios of forward and backward as [first quartile, median, third].
    """
    device, batch = torch.device(arguments.device), max(1, arguments.batch_tokens // math.prod(shape.grid))
    torch.manual_seed(0)
    torch.compiler.reset()
    block = iwin_block(shape, -1).to(device)
    modules = {
        "taps": block.conv,
        "conv3d": TorchConv(block.conv, copies=False),
        "conv3d with copies": TorchConv(block.conv),
        "linear": LinearLayers(block),
    }
    x, _, cotangent = random_inputs(shape, batch, device, DTYPES[arguments.dtype])
    seconds = time_interleaved(make_steps(modules, [x, cotangent], arguments), device, arguments.repeats)
    return {
        "grid": shape.grid,
        "batch": batch,
        "milliseconds": {name: [1e3 * q for q in quartiles(values)] for name, values in seconds.items()},
        "share_of_linear": {
            name: quartiles([a / b for a, b in zip(seconds[name], seconds["linear"], strict=True)])
            for name in modules
            if name != "linear"
        },
    }


def summarise(shape: Shape, batch: int, window: tuple[int, ...], measured: dict[str, Measured]) -> dict[str, Any]:
    """Put what was measured for one window into a row: times and ratios as [first quartile, median, third]."""
    of_this_window = {"iwin": f"iwin {by_axes(window)}", "four-copy": f"four-copy {by_axes(window)}"}
    names = ("iwin", "four-copy", "global", "spatial", "temporal", "factorised", "floor")
    sides = {name: measured[key] for name in names if (key := of_this_window.get(name, name)) in measured}
    results = {
        name: {
            "milliseconds": [1e3 * q for q in quartiles(m.seconds)],
            "peak_mib": m.peak_bytes / 2**20,
            "forward_gmacs_per_sample": m.macs / 1e9,
            "difference_from_twin": m.error,
        }
        for name, m in sides.items()
    }
    ratios = {
        f"{a} / {b}": {  # time: round by round, so that what slows a whole round cancels
            "time": quartiles([x / y for x, y in zip(sides[a].seconds, sides[b].seconds, strict=True)]),
            "memory": sides[a].peak_bytes / sides[b].peak_bytes,
            "macs": sides[a].macs / sides[b].macs,
        }
        for a, b in RATIOS
        if a in sides
    }
    return {
        "tokens": math.prod(shape.grid),
        "batch": batch,
        "planned": plan_window(shape.grid, shape.kernel, shape.causal_axes) == window,
        "global_exchange": dataclasses.asdict(global_exchange(shape.grid, window, shape.kernel, shape.causal_axes)),
        "sides": results,
        "ratios": ratios,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Format the rows of `summarise`."""
    return _markdown([_cells(row) for row in rows])


def _cells(row: dict[str, Any]) -> list[tuple[str, str]]:
    """The columns of one row, each as (name, text)."""
    low, median, high = row["sides"]["iwin"]["milliseconds"]
    exchange = row["global_exchange"]
    is_video = len(exchange["grid"]) == 3
    window, groups, kernel = (by_axes(exchange[key][: 3 if is_video else 1]) for key in ("window", "groups", "kernel"))
    cells = [
        ("tokens", f"{row['tokens']:,}{' = ' + by_axes(exchange['grid']) if is_video else ''}"),
        ("M", f"{window}{' (auto)' if row['planned'] else ''}"),
        ("G", groups),
        ("K", kernel),
        ("all pairs linked", "yes" if exchange["borders"] else f"no, {exchange['linked_pairs']:.1%}"),
        ("iwin ms (quartiles)", f"{median:.1f} ({low:.1f} to {high:.1f})"),
    ]
    ratios = {name: row["ratios"][name] for name in (f"{a} / {b}" for a, b in RATIOS) if name in row["ratios"]}
    for name, ratio in ratios.items():
        cells.append((name, f"{ratio['time'][1]:.2f}"))
        if not name.startswith("four-copy"):  # whose multiply-adds are the same
            cells.append(("by MACs", f"{ratio['macs']:.2f}"))
    cells.append(("iwin MiB", f"{row['sides']['iwin']['peak_mib']:.0f}"))
    return cells + [(f"MiB {n}", f"{r['memory']:.2f}") for n, r in ratios.items() if not n.endswith("floor")]


def convolution_table(rows: Sequence[dict[str, Any]]) -> str:
    """Format the rows of `measure_convolution`."""
    return _markdown(
        [
            [
                ("tokens", by_axes(row["grid"])),
                ("linear layers ms", f"{row['milliseconds']['linear'][1]:.1f}"),
                *((f"{name} / linear", f"{median:.3f}") for name, (_, median, _) in row["share_of_linear"].items()),
            ]
            for row in rows
        ]
    )


def _markdown(rows: Sequence[Sequence[tuple[str, str]]]) -> str:
    """Lay out rows of (column, text) as a Markdown table; numbers stand to the right."""
    names = [name for name, _ in rows[0]]
    lines = [names, *([text for _, text in row] for row in rows)]
    rule = "|".join("---" if name == "all pairs linked" else "---:" for name in names)
    head, *body = (f"| {' | '.join(line)} |" for line in lines)
    return "\n".join([head, f"|{rule}|", *body])


def tables(record: dict[str, Any]) -> str:
    """Format a record, as written to JSON, for the terminal and for Markdown."""
    parts = [table(record["rows"])]
    if "convolution" in record:
        parts.append(convolution_table(record["convolution"]))
    return "\n\n".join(parts)


def positive(text: str) -> int:
    """Parse a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return int(text)


def per_axis_sizes(text: str) -> tuple[int, ...]:
    """Parse sizes per axis, such as 32x32 or 16x32x32."""
    return tuple(positive(part) for part in text.split("x"))


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.block", description="Time one block against others.")
    parser.add_argument("--video", action="store_true", help="grids of three axes, and factorised attention")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=tuple(DTYPES), help="of weights and activations")
    parser.add_argument("--compile", action="store_true", help="torch.compile(fullgraph=True) on every side")
    parser.add_argument("--width", type=positive, default=384, help="channels C")
    parser.add_argument("--heads", type=positive, default=6)
    parser.add_argument("--kernel", type=per_axis_sizes, help="K of the convolution per axis (3x3; video: 2x3x3)")
    grids = "of tokens (16x16 32x32 64x64; video: 8x16x16 16x16x16 16x32x32)"
    parser.add_argument("--grids", type=per_axis_sizes, nargs="+", help=grids)
    batch = "the same at every size; a larger sample is a batch of its own"
    parser.add_argument("--batch-tokens", type=positive, default=4096, help=batch)
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--repeats", type=positive, help="rounds that are counted (15; video: 7)")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser


def parse_arguments(argv: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line and fill in what `--video` decides; exits with a message where something cannot work.

    Args:
        argv: Arguments; None takes those of the process.

    Returns:
        The arguments, with `shapes`, one `Shape` per grid.
    """
    parser = build_parser()
    arguments = parser.parse_args(argv)
    cases = VIDEO if arguments.video else IMAGES
    arguments.grids = arguments.grids or list(cases.grids)
    arguments.kernel = arguments.kernel or cases.kernel
    arguments.repeats = arguments.repeats or cases.repeats
    rank = len(cases.kernel)
    if any(len(sizes) != rank for sizes in (*arguments.grids, arguments.kernel)):
        given = ", ".join(by_axes(sizes) for sizes in (*arguments.grids, arguments.kernel))
        parser.error(
            f"expected --grids and --kernel of {rank} axes {'with' if rank == 3 else 'without'} --video, got {given}"
        )
    arguments.shapes = [Shape(grid, arguments.width, arguments.heads, arguments.kernel) for grid in arguments.grids]
    for shape in arguments.shapes:
        try:
            windows_for(shape)
        except ValueError as error:
            parser.error(str(error))
        tokens = math.prod(shape.grid)
        if tokens < arguments.batch_tokens and arguments.batch_tokens % tokens:
            parser.error(
                f"--batch-tokens must be a multiple of the {tokens} tokens of {by_axes(shape.grid)}, or fewer, "
                f"got {arguments.batch_tokens}"
            )
    check_device(parser, arguments.device)
    return arguments


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    arguments = parse_arguments(argv)
    torch.set_num_threads(arguments.threads)
    record: dict[str, Any] = {
        "machine": describe_machine(torch.device(arguments.device)),
        "settings": {k: v for k, v in vars(arguments).items() if k not in ("out", "shapes")},
        "command": " ".join(["python -m benchmarks.block", *(sys.argv[1:] if argv is None else argv)]),
        "rows": [],
    }
    for shape in arguments.shapes:
        record["rows"] += measure_grid(shape, arguments)
        print(f"{by_axes(shape.grid)} tokens: outputs agree, measured", file=sys.stderr)
    if arguments.video:
        record["convolution"] = [measure_convolution(shape, arguments) for shape in arguments.shapes]
    print(tables(record))
    if arguments.out is not None:
        write_json(arguments.out, record)


if __name__ == "__main__":
    main()
