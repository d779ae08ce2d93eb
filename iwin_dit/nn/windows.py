"""Index algebra of contiguous and interleaved windows on a grid of any rank; no parameters, no attention.

The letters used in this package, each with one meaning:

    B batch   C channels   T, H, W grid axes   S the grid, all its axes   N length of an axis
    M window length on an axis   G groups (windows) on an axis   L tokens in a window   K kernel length

One idea carries the file (docs/windows.md draws it). An axis of N = M * G tokens is read as a pair of digits:
contiguous, i = g * M + m, so (g, m); interleaved, i = m * G + g, so (m, g). g names the window, m the place in it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F

MAX_RANK = 3

# What stands in the cells after the end of an axis that the window does not divide, and how many there are.
# "masked": windows are evened out, the cells are no keys (ours: Lemma 1 holds for every grid). "attended": windows stay
# as given, the cells are zeros that take part as ordinary tokens (the published video code; for parity with it).
WindowPadding = Literal["masked", "attended"]


def per_axis(value: int | Sequence[int], rank: int, name: str) -> tuple[int, ...]:
    """Repeat an int for every axis, or check that a sequence has one entry per axis.

    Args:
        value: An int for all axes, or one int per axis.
        rank: Number of axes of the grid, 1 to 3.
        name: What the value is, for the error.

    Returns:
        One int per axis.

    Raises:
        ValueError: If a sequence has another length than `rank`.
    """
    if isinstance(value, int):
        return (value,) * rank
    if len(value) != rank:
        raise ValueError(f"{name} must be an int or have one entry per grid axis ({rank}), got {tuple(value)}")
    return tuple(int(v) for v in value)


def check_padding(padding: str) -> None:
    """Refuse a window padding that does not exist, with ValueError."""
    if padding not in get_args(WindowPadding):
        raise ValueError(f"window padding must be 'masked' or 'attended', got {padding!r}")


def resolve_window(
    grid: Sequence[int], window: int | Sequence[int], padding: WindowPadding = "masked"
) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Find the windows that are actually used on a grid.

    Per axis: the window is clipped to N (-1 = the whole axis), G = ceil(N / M), and then M' = ceil(N / G) is used: the
    same G groups, hence in interleaved windows the same tokens attend to each other, with at most G - 1 padded cells.
    With "attended" padding the clipped window stays, M' = M.

    Args:
        grid: Axis lengths N.
        window: Window length M for every axis or per axis; -1 means the whole axis.
        padding: See `WindowPadding`.

    Returns:
        The window lengths M' and the group counts G, one per axis.

    Raises:
        ValueError: If a window length is 0 or below -1, the grid has an empty axis or more than three, or `padding` is
            unknown.
    """
    check_padding(padding)
    if not 1 <= len(grid) <= MAX_RANK or any(n < 1 for n in grid):
        raise ValueError(f"grid must have 1 to {MAX_RANK} axes of at least 1 token, got {tuple(grid)}")
    lengths, groups = [], []
    for n, m in zip(grid, per_axis(window, len(grid), "window"), strict=True):
        if m < 1 and m != -1:
            raise ValueError(f"window lengths must be positive, or -1 for the whole axis, got {window}")
        m = n if m == -1 else min(m, n)
        g = math.ceil(n / m)
        lengths.append(m if padding == "attended" else math.ceil(n / g))
        groups.append(g)
    return tuple(lengths), tuple(groups)


def _split_axes(lengths: tuple[int, ...], groups: tuple[int, ...], interleaved: bool) -> tuple[list[int], list[int]]:
    """Split every axis into its two digits; return that shape and the order that puts all g first, then all m.

    2-D, interleaved: (M1, G1, M2, G2) and the order (G1, G2, M1, M2) = (1, 3, 0, 2). Counted without B and C.
    """
    pairs = list(zip(lengths, groups, strict=True)) if interleaved else list(zip(groups, lengths, strict=True))
    shape = [digit for pair in pairs for digit in pair]
    first, second = list(range(0, len(shape), 2)), list(range(1, len(shape), 2))
    return shape, (second + first) if interleaved else (first + second)


def partition(
    x: torch.Tensor, window: int | Sequence[int], interleaved: bool = True, padding: WindowPadding = "masked"
) -> torch.Tensor:
    """Gather the tokens of every window: one reshape, one permute.

    2-D, interleaved, (B, 4, 4, C) with window 2: (B, 2, 2, 2, 2, C) = (B, M1, G1, M2, G2, C), permuted to
    (B, G1, G2, M1, M2, C): window (g1, g2) holds rows g1, g1 + 2 and columns g2, g2 + 2.

    Where the window does not divide an axis, zeros are appended at its end; `key_mask` tells them from tokens.

    Args:
        x: (B, *S, C), channels last, one to three grid axes.
        window: Window length for every axis or per axis; -1 means the whole axis, longer than the axis is clipped.
        interleaved: Whether a window takes every G-th token of an axis (the paper's RTR followed by a partition, arXiv
            2507.18405) or M neighbours.
        padding: See `WindowPadding`; it decides how many zeros are appended.

    Returns:
        (B * windows, L, C), batch-major: the windows of the first sample come first.

    Raises:
        ValueError: If x has not one to three grid axes, `window` does not fit its rank, or `padding` is unknown.
    """
    batch, *grid, channels = x.shape
    lengths, groups = resolve_window(grid, window, padding)
    appended = [m * g - n for m, g, n in zip(lengths, groups, grid, strict=True)]
    if any(appended):
        x = F.pad(x, [0, 0, *(p for end in reversed(appended) for p in (0, end))])
    shape, order = _split_axes(lengths, groups, interleaved)
    x = x.reshape(batch, *shape, channels)
    x = x.permute(0, *(i + 1 for i in order), len(order) + 1)  # (B, *G, *M, C)
    return x.reshape(batch * math.prod(groups), math.prod(lengths), channels)


def merge(
    windows: torch.Tensor,
    grid: Sequence[int],
    window: int | Sequence[int],
    interleaved: bool = True,
    padding: WindowPadding = "masked",
) -> torch.Tensor:
    """Put the tokens of every window back in their places: the inverse of `partition`, bit for bit.

    2-D, interleaved, 4 x 4 grid, window 2: (B, G1, G2, M1, M2, C) permuted to (B, M1, G1, M2, G2, C), read as
    (B, 4, 4, C). Cells that `partition` padded are cropped.

    Args:
        windows: (B * windows, L, C), batch-major.
        grid: Axis lengths of the result.
        window: As given to `partition`.
        interleaved: As given to `partition`.
        padding: As given to `partition`.

    Returns:
        (B, *S, C).

    Raises:
        ValueError: If the grid and window do not lead to the number and length of the windows given, or `padding` is
            unknown.
    """
    lengths, groups = resolve_window(grid, window, padding)
    rows, tokens, channels = windows.shape
    if rows % math.prod(groups) or tokens != math.prod(lengths):
        raise ValueError(
            f"grid {tuple(grid)} with window {window} has {math.prod(groups)} windows of {math.prod(lengths)} tokens "
            f"per sample, got {rows} windows of {tokens} tokens"
        )
    shape, order = _split_axes(lengths, groups, interleaved)
    inverse = [order.index(i) for i in range(len(order))]
    x = windows.reshape(rows // math.prod(groups), *(shape[i] for i in order), channels)
    x = x.permute(0, *(i + 1 for i in inverse), len(order) + 1)  # (B, *(M, G) or *(G, M), C)
    x = x.reshape(x.shape[0], *(m * g for m, g in zip(lengths, groups, strict=True)), channels)
    return x[(slice(None), *(slice(n) for n in grid))]


def key_mask(
    grid: Sequence[int],
    window: int | Sequence[int],
    interleaved: bool = True,
    device: torch.device | str | None = None,
) -> torch.Tensor | None:
    """Tell the tokens of every window from the cells that `partition` padded, for "masked" padding.

    Args:
        grid: Axis lengths of the grid.
        window: As given to `partition`.
        interleaved: As given to `partition`.
        device: Where the mask is made.

    Returns:
        (windows, L) boolean, True for a token that may be attended to; None where nothing is padded. Every window holds
        at least one token, so no softmax is empty.
    """
    lengths, groups = resolve_window(grid, window)
    if all(m * g == n for m, g, n in zip(lengths, groups, grid, strict=True)):
        return None
    tokens = torch.ones(1, *grid, 1, dtype=torch.bool, device=device)
    return partition(tokens, window, interleaved).squeeze(-1)


@dataclass(frozen=True)
class GlobalExchange:
    """How far one Iwin attention step and one depthwise convolution step carry information, in either order.

    Attributes:
        grid: Axis lengths N.
        window: Window lengths in use, after clipping and evening out.
        groups: Windows per axis, G.
        kernel: Kernel lengths K.
        interior: K >= G on every axis, the paper's condition: it holds for tokens whose kernel the border does not cut.
        borders: The link holds for all pairs, those at the border too: K >= 2G - 1 on every centred axis, G = 1 on a
            causal one; sufficient always, necessary where G divides the axis.
        linked_pairs: Fraction of ordered token pairs (from, to) linked by the two steps, counted exactly.
    """

    grid: tuple[int, ...]
    window: tuple[int, ...]
    groups: tuple[int, ...]
    kernel: tuple[int, ...]
    interior: bool
    borders: bool
    linked_pairs: float

    def __str__(self) -> str:
        answer = "yes, all pairs" if self.borders else "inside the border only" if self.interior else "no"
        return (
            f"grid {self.grid}, window {self.window}, groups {self.groups}, kernel {self.kernel}: global exchange in "
            f"two steps: {answer} ({self.linked_pairs:.1%} of pairs)"
        )


def global_exchange(
    grid: Sequence[int],
    window: int | Sequence[int],
    kernel: int | Sequence[int],
    causal_axes: Sequence[int] = (),
    padding: WindowPadding = "masked",
) -> GlobalExchange:
    """Report the paper's global-exchange condition (Theorem 3, arXiv 2507.18405) for interleaved windows.

    The branches of one block run side by side, so the two steps are those of two successive blocks.

    Args:
        grid: Axis lengths N.
        window: As given to `partition`.
        kernel: Kernel length K for every axis or per axis; odd on centred axes.
        causal_axes: Axes on which the convolution sees only the past.
        padding: As given to `partition`. The links are the same, as the groups are; the reported window is not.

    Returns:
        The condition and the exact fraction of linked pairs.

    Raises:
        ValueError: If the kernel is even on a centred axis, or an argument does not fit the rank of the grid.
    """
    lengths, groups = resolve_window(grid, window, padding)
    kernels = per_axis(kernel, len(grid), "kernel")
    # A pair is linked if every axis links it, for one order of the steps at a time; the union of both orders is
    # counted by inclusion and exclusion, each term a product over axes.
    counts = [1, 1, 1]  # attention then convolution, convolution then attention, both
    for axis, (n, g, k) in enumerate(zip(grid, groups, kernels, strict=True)):
        attention, convolution = _axis_links(n, g, k, causal=axis in causal_axes)
        attention_first, convolution_first = attention @ convolution > 0, convolution @ attention > 0
        links = (attention_first, convolution_first, attention_first & convolution_first)
        counts = [count * int(link.sum()) for count, link in zip(counts, links, strict=True)]
    linked, pairs = counts[0] + counts[1] - counts[2], math.prod(grid) ** 2
    return GlobalExchange(
        tuple(grid),
        lengths,
        groups,
        kernels,
        interior=all(k >= g for k, g in zip(kernels, groups, strict=True)),
        borders=linked == pairs,
        linked_pairs=linked / pairs,
    )


def _axis_links(n: int, g: int, k: int, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Which tokens of one axis reach which, (N, N) as (from, to): by attention, and by the convolution."""
    if not causal and k % 2 == 0:
        raise ValueError(f"kernel lengths must be odd on centred axes, got {k}")
    i = torch.arange(n)
    step = i[None, :] - i[:, None]  # to - from
    reach = (step >= 0) & (step < k) if causal else step.abs() <= k // 2
    return (step % g == 0).float(), reach.float()


def plan_window(grid: Sequence[int], kernel: int | Sequence[int], causal_axes: Sequence[int] = ()) -> tuple[int, ...]:
    """Choose the windows behind `window_size="auto"`: the cheapest that divide the grid and exchange globally.

    Per axis, among the group counts G that divide N, the largest with K >= 2G - 1 (all pairs linked in two steps); on a
    causal axis, where only G = 1 would link all pairs, the largest with K >= G. With K = 3: 8 -> 4, 16 -> 8, 32 -> 16,
    and an odd axis is one window, so that no mask is needed.

    Args:
        grid: Axis lengths N.
        kernel: Kernel length K for every axis or per axis.
        causal_axes: Axes on which the convolution sees only the past.

    Returns:
        Window length per axis.

    Raises:
        ValueError: If a kernel length is not positive.
    """
    plan = []
    for axis, (n, k) in enumerate(zip(grid, per_axis(kernel, len(grid), "kernel"), strict=True)):
        if k < 1:
            raise ValueError(f"kernel lengths must be positive, got {kernel}")
        most_groups = k if axis in causal_axes else (k + 1) // 2
        plan.append(n // max(g for g in range(1, min(n, most_groups) + 1) if n % g == 0))
    return tuple(plan)
