"""Forward and backward of one Iwin block against three others with the same weights, in one run.

    python -m benchmarks.block [--device cuda --dtype bf16 --compile] [--out FILE.json]

`global` is the same block with attention over the whole grid. `four-copy` rearranges as the paper words it: RTR,
partition, reverse and restore copy the grid once each, and the convolution works in NCHW. `floor` has no mixing of
tokens at all: norms, modulation, linear layers, MLP and residuals. How to read the numbers: docs/performance.md.
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
from iwin_dit.nn.blocks import modulate
from iwin_dit.nn.windows import global_exchange, plan_window

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = 1e-3  # of the largest value, float32; TF32 convolutions have 10 bits, a misplaced token is wrong by about 1
RATIOS = (("four-copy", "iwin"), ("global", "iwin"), ("iwin", "floor"))


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
    peak_bytes: int
    macs: float
    error: float | None


class FourCopyAttention(nn.Module):
    """Iwin attention as the paper words it, one copy of the grid per named step; (B, H, W, C) -> (B, H, W, C).

    Args:
        attn: Layer whose projections and norms are used.
        window: Window length M on both axes; must divide them.
    """

    def __init__(self, attn: IwinAttention, window: int) -> None:
        super().__init__()
        self.attn = attn
        self.window = window

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attend inside interleaved windows, (B, H, W, C) -> (B, H, W, C)."""
        B, H, W, C = x.shape
        M = self.window
        G_h, G_w = H // M, W // M
        # 1. RTR on both axes, (M, G) -> (G, M)
        x = x.view(B, M, G_h, M, G_w, C).transpose(1, 2).transpose(3, 4).contiguous().view(B, H, W, C)
        # 2. Partition into windows of neighbours
        x = x.view(B, G_h, M, G_w, M, C).transpose(2, 3).contiguous().view(-1, M * M, C)  # (B * windows, L, C)
        q, k, v = (f(x).unflatten(-1, (self.attn.heads, -1)) for f in (self.attn.to_q, self.attn.to_k, self.attn.to_v))
        q, k, v = (y.transpose(1, 2) for y in (self.attn.norm_q(q), self.attn.norm_k(k), v))
        x = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = self.attn.to_out(x)
        # 3. Reverse the partition
        x = x.view(B, G_h, G_w, M, M, C).transpose(2, 3).contiguous().view(B, H, W, C)
        # 4. Restore: RTR with M in place of G
        return x.view(B, G_h, M, G_w, M, C).transpose(1, 2).transpose(3, 4).contiguous().view(B, H, W, C)


class NchwConv(nn.Module):
    """Depthwise convolution that copies to NCHW and back; (B, H, W, C) -> (B, H, W, C).

    Args:
        conv: Layer whose kernel and bias are used.
    """

    def __init__(self, conv: DepthwiseConv) -> None:
        super().__init__()
        channels, kernel = conv.weight.shape[0], conv.weight.shape[-1]
        self.conv = nn.Conv2d(channels, channels, kernel, padding=kernel // 2, groups=channels)
        self.conv.weight, self.conv.bias = conv.weight, conv.bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Convolve every channel on its own, (B, H, W, C) -> (B, H, W, C)."""
        return self.conv(x.permute(0, 3, 1, 2).contiguous()).permute(0, 2, 3, 1).contiguous()


class FloorBlock(nn.Module):
    """The block without attention and without convolution branch and gate; (B, H, W, C) -> (B, H, W, C).

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
        """Map every token on its own, (B, H, W, C) and (B, C) -> (B, H, W, C)."""
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp, _ = self.modulation(conditioning, rank=2)
        h = modulate(self.norm1(x), shift_attn, scale_attn)
        attn = self.attn
        q, k, v = (f(h).unflatten(-1, (attn.heads, -1)) for f in (attn.to_q, attn.to_k, attn.to_v))
        x = x + gate_attn * attn.to_out((attn.norm_q(q) + attn.norm_k(k) + v).flatten(3))
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


def iwin_block(width: int, heads: int, kernel: int, window: int, weights: IwinDiTBlock | None = None) -> IwinDiTBlock:
    """Build a block with the library's default options, and random modulation or the weights of another block."""
    block = IwinDiTBlock(width, heads, window, conv_kernel_size=kernel)
    if weights is None:
        nn.init.normal_(block.modulation.linear.weight, std=width**-0.5)  # so that no gate hides a branch
    else:
        block.load_state_dict(weights.state_dict())
    return block


def four_copy_block(block: IwinDiTBlock, window: int) -> IwinDiTBlock:
    """Replace the attention and the convolution of a block by the straightforward ones, in place."""
    block.set_submodule("attn", FourCopyAttention(block.attn, window))
    block.set_submodule("conv", NchwConv(block.conv))
    return block


def windows_for(side: int, kernel: int) -> list[int]:
    """Choose the windows measured on a square grid: 8, from 64 x 64 tokens 16, and the planner's where it differs."""
    common = min(8 if side < 64 else 16, side)
    return list(dict.fromkeys([common, plan_window((side, side), kernel)[0]]))


def build_sides(side: int, width: int, heads: int, kernel: int, windows: Sequence[int]) -> dict[str, nn.Module]:
    """Build the competitors for a square grid, all with the same weights.

    Args:
        side: Length N of both axes.
        width: Channels C.
        heads: Attention heads.
        kernel: Kernel length K.
        windows: Window lengths M, each on both axes.

    Returns:
        Modules (B, N, N, C), (B, C) -> (B, N, N, C): "global", "floor", and for every window "iwin M", "four-copy M".

    Raises:
        ValueError: If a window does not divide the grid, which the four-copy side cannot do.
    """
    weights = iwin_block(width, heads, kernel, -1)
    sides: dict[str, nn.Module] = {"global": weights, "floor": FloorBlock(weights)}
    for window in windows:
        if side % window:
            raise ValueError(
                f"the windows must divide the grid, got window {window} for {side} x {side} tokens: choose another size"
            )
        sides[f"iwin {window}"] = iwin_block(width, heads, kernel, window, weights)
        sides[f"four-copy {window}"] = four_copy_block(iwin_block(width, heads, kernel, window, weights), window)
    return sides


def random_inputs(side: int, batch: int, width: int, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Draw tokens (B, N, N, C) and conditioning (B, C), both with gradients, and the gradient of the output."""
    x = torch.randn(batch, side, side, width, device=device, dtype=dtype, requires_grad=True)
    conditioning = torch.randn(batch, width, device=device, dtype=dtype, requires_grad=True)
    return [x, conditioning, torch.randn_like(x, requires_grad=False)]


def gradients(block: nn.Module, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Run forward and backward: the gradients of tokens, conditioning and every parameter."""
    x, conditioning, cotangent = inputs
    return torch.autograd.grad(block(x, conditioning), [x, conditioning, *block.parameters()], cotangent)


def check_agreement(sides: dict[str, nn.Module], inputs: Sequence[torch.Tensor]) -> dict[str, float]:
    """Compare each Iwin side, and the global one, with the straightforward one of the same window.

    Args:
        sides: As built by `build_sides`, in float32.
        inputs: As drawn by `random_inputs`, in float32.

    Returns:
        The largest error of output and gradients by side, relative to the largest value of the tensor.

    Raises:
        RuntimeError: If an error exceeds `TOLERANCE`.
    """
    pairs = {name: sides[name.replace("iwin", "four-copy")] for name in sides if name.startswith("iwin")}
    whole = copy.deepcopy(sides["global"])
    assert isinstance(whole, IwinDiTBlock)
    pairs["global"] = four_copy_block(whole, window=inputs[0].shape[1])
    errors = {}
    for name, twin in pairs.items():
        ours = (sides[name](*inputs[:2]), *gradients(sides[name], inputs))
        theirs = (twin(*inputs[:2]), *gradients(twin, inputs))
        relative = [(a - b).abs().max() / b.abs().max() for a, b in zip(ours, theirs, strict=True)]
        errors[name] = torch.stack(relative).max().item()  # NaN where any is NaN
        if not errors[name] <= TOLERANCE:
            raise RuntimeError(
                f"'{name}' and its straightforward twin must agree to {TOLERANCE} of the largest value, "
                f"got {errors[name]:.1e}: nothing was timed"
            )
    return errors


def count_macs(side: int, width: int, heads: int, kernel: int, windows: Sequence[int]) -> dict[str, float]:
    """Count the multiply-adds of matrix products, attention and convolution, per sample in a forward pass."""
    macs = {}
    with torch.device("meta"):
        x, conditioning, _ = random_inputs(side, 1, width, torch.device("meta"), torch.float32)
        for name, block in build_sides(side, width, heads, kernel, windows).items():
            with FlopCounterMode(display=False) as counter:
                block(x, conditioning)
            macs[name] = counter.get_total_flops() / 2
    return macs


def measure_size(tokens: int, arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """Check, time and weigh all sides on one grid.

    Args:
        tokens: Tokens per sample, a square number.
        arguments: As parsed by `build_parser`.

    Returns:
        One row per window, as written to JSON.
    """
    device, side, batch = torch.device(arguments.device), math.isqrt(tokens), arguments.batch_tokens // tokens
    shape = (side, arguments.width, arguments.heads, arguments.kernel)
    torch.manual_seed(0)
    torch.compiler.reset()  # a size compiled for itself, not as the second case of a dynamic shape
    windows = windows_for(side, arguments.kernel)
    sides = {name: block.to(device) for name, block in build_sides(*shape, windows).items()}
    errors = check_agreement(sides, random_inputs(side, 1, arguments.width, device, torch.float32))

    inputs = random_inputs(side, batch, arguments.width, device, DTYPES[arguments.dtype])
    steps: dict[str, Step] = {}
    for name, block in sides.items():
        block.to(DTYPES[arguments.dtype])
        if arguments.compile:
            block.compile(fullgraph=True, dynamic=False)
        steps[name] = functools.partial(gradients, block, inputs)
    seconds = time_interleaved(steps, device, arguments.repeats)
    memory = peak_memory(steps, device)
    macs = count_macs(*shape, windows)
    measured = {name: Measured(seconds[name], memory[name], macs[name], errors.get(name)) for name in sides}
    return [summarise(side, batch, window, arguments.kernel, measured) for window in windows]


def summarise(side: int, batch: int, window: int, kernel: int, measured: dict[str, Measured]) -> dict[str, Any]:
    """Put what was measured for one window into a row: times and ratios as [first quartile, median, third]."""
    sides = {
        "iwin": measured[f"iwin {window}"],
        "four-copy": measured[f"four-copy {window}"],
        "global": measured["global"],
        "floor": measured["floor"],
    }
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
    }
    return {
        "tokens": side * side,
        "batch": batch,
        "planned": plan_window((side, side), kernel) == (window, window),
        "global_exchange": dataclasses.asdict(global_exchange((side, side), window, kernel)),
        "sides": results,
        "ratios": ratios,
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows for the terminal and for Markdown."""
    lines = [
        "| tokens | M | G | K | all pairs linked | iwin ms (quartiles) | four-copy / iwin | global / iwin | by MACs "
        "| iwin / floor | by MACs | iwin MiB | MiB four-copy / iwin | MiB global / iwin |",
        "|---:|---:|---:|---:|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        low, median, high = row["sides"]["iwin"]["milliseconds"]
        four_copy, whole, floor = (row["ratios"][f"{a} / {b}"] for a, b in RATIOS)
        exchange = row["global_exchange"]
        cells = [
            f"{row['tokens']:,}",
            f"{exchange['window'][0]}{' (auto)' if row['planned'] else ''}",
            str(exchange["groups"][0]),
            str(exchange["kernel"][0]),
            "yes" if exchange["borders"] else f"no, {exchange['linked_pairs']:.1%}",
            f"{median:.1f} ({low:.1f} to {high:.1f})",
            *(f"{r:.2f}" for r in (four_copy["time"][1], whole["time"][1], whole["macs"])),
            *(f"{r:.2f}" for r in (floor["time"][1], floor["macs"])),
            f"{row['sides']['iwin']['peak_mib']:.0f}",
            *(f"{r:.2f}" for r in (four_copy["memory"], whole["memory"])),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def positive(text: str) -> int:
    """Parse a positive integer."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a positive integer, got {text}")
    return int(text)


def square_number(text: str) -> int:
    """Parse a number of tokens that fills a square grid."""
    tokens = positive(text)
    if math.isqrt(tokens) ** 2 != tokens:
        raise argparse.ArgumentTypeError(f"expected a square number of tokens such as 256 or 1024, got {tokens}")
    return tokens


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.block", description="Time one block against others.")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", default="float32", choices=tuple(DTYPES), help="of weights and activations")
    parser.add_argument("--compile", action="store_true", help="torch.compile(fullgraph=True) on every side")
    parser.add_argument("--width", type=positive, default=384, help="channels C")
    parser.add_argument("--heads", type=positive, default=6)
    parser.add_argument("--kernel", type=positive, default=3, help="K of the depthwise convolution, odd")
    parser.add_argument("--tokens", type=square_number, nargs="+", default=[256, 1024, 4096], help="per sample, square")
    parser.add_argument("--batch-tokens", type=positive, default=4096, help="in a batch, the same at every size")
    parser.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="of the CPU")
    parser.add_argument("--repeats", type=positive, default=15, help="rounds that are counted")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    if any(arguments.batch_tokens % tokens for tokens in arguments.tokens):
        parser.error(f"--batch-tokens must be a multiple of every --tokens, got {arguments.batch_tokens}")
    check_device(parser, arguments.device)
    torch.set_num_threads(arguments.threads)
    record: dict[str, Any] = {
        "machine": describe_machine(torch.device(arguments.device)),
        "settings": {k: v for k, v in vars(arguments).items() if k != "out"},
        "command": " ".join(["python -m benchmarks.block", *(sys.argv[1:] if argv is None else argv)]),
        "rows": [],
    }
    for tokens in arguments.tokens:
        record["rows"] += measure_size(tokens, arguments)
        print(f"{tokens:,} tokens: outputs agree, measured", file=sys.stderr)
    print(table(record["rows"]))
    if arguments.out is not None:
        write_json(arguments.out, record)


if __name__ == "__main__":
    main()
