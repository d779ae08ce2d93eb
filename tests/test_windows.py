"""The index algebra: round trips, the sets that Lemma 1 names, padding, the exchange report against brute force."""

import itertools

import pytest
import torch

from iwin_dit.nn.windows import global_exchange, key_mask, merge, partition, per_axis, plan_window, resolve_window

# (grid, window): ranks 1 to 3, divisible or not, clipped, whole axes, non-square.
CASES = [
    ((12,), 4),
    ((13,), 4),
    ((5,), -1),
    ((8, 8), 4),
    ((9, 7), 4),
    ((6, 10), (3, 4)),
    ((5, 8), (-1, 3)),
    ((4, 8, 8), (2, 4, 4)),
    ((5, 9, 7), (2, 4, 4)),
    ((1, 3, 2), 8),
]


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("grid", "window"), CASES)
def test_merge_undoes_partition_bit_for_bit(grid, window, interleaved):
    x = torch.randn(2, *grid, 3)
    assert torch.equal(merge(partition(x, window, interleaved), grid, window, interleaved), x)


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("grid", "window"), CASES)
def test_attended_padding_keeps_the_window_as_given(grid, window, interleaved):
    """The published code's windows: clipped to the axis, never evened out, zeros appended up to a multiple."""
    lengths, groups = resolve_window(grid, window, "attended")
    sides = per_axis(window, len(grid), "window")
    assert lengths == tuple(n if m == -1 else min(m, n) for n, m in zip(grid, sides, strict=True))
    assert groups == resolve_window(grid, window)[1]
    padded = [m * g for m, g in zip(lengths, groups, strict=True)]
    x = torch.randn(2, *grid, 3)
    by_hand = torch.zeros(2, *padded, 3)
    by_hand[(slice(None), *map(slice, grid))] = x
    windows = partition(x, window, interleaved, "attended")
    assert torch.equal(windows, partition(by_hand, lengths, interleaved))
    assert torch.equal(merge(windows, grid, window, interleaved, "attended"), x)


def test_empty_batch():
    x = torch.randn(0, 9, 7, 3)
    assert merge(partition(x, 4), (9, 7), 4).shape == x.shape


@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("grid", "window"), CASES)
def test_windows_hold_the_tokens_they_should(grid, window, interleaved):
    """Interleaved: equal residues modulo G (Lemma 1). Contiguous: equal quotients by M'."""
    lengths, groups = resolve_window(grid, window)
    index = torch.arange(1, 1 + torch.Size(grid).numel()).view(1, *grid, 1)  # 0 is left for padding
    windows = partition(index, window, interleaved).squeeze(-1)
    for row, g in zip(windows, itertools.product(*map(range, groups)), strict=True):
        tokens = [
            1 + sum(i * stride for i, stride in zip(place, index.stride()[1:-1], strict=True))
            for place in itertools.product(*map(range, grid))
            if all(
                (i % n_g if interleaved else i // m) == w
                for i, n_g, m, w in zip(place, groups, lengths, g, strict=True)
            )
        ]
        assert row[row > 0].tolist() == tokens
    mask = key_mask(grid, window, interleaved)
    if mask is None:
        assert (windows > 0).all()
    else:
        assert torch.equal(mask, windows > 0)
        assert mask.any(1).all()


def test_the_papers_example():
    """1-D, N = 12, G = 3, M = 4: 0 3 6 9 | 1 4 7 10 | 2 5 8 11."""
    windows = partition(torch.arange(12).view(1, 12, 1), 4).squeeze(-1)
    assert windows.tolist() == [[0, 3, 6, 9], [1, 4, 7, 10], [2, 5, 8, 11]]


def test_evened_out_windows_pad_less():
    """14 tokens in windows of 5 are 3 groups; windows of 5 stay, padding is 1; 9 tokens in windows of 4 need none."""
    assert resolve_window((14,), 5) == ((5,), (3,))
    assert resolve_window((9,), 4) == ((3,), (3,))
    assert resolve_window((16, 45), 8) == ((8, 8), (2, 6))
    for n, m in itertools.product(range(1, 40), range(1, 40)):
        (length,), (groups,) = resolve_window((n,), m)
        assert n <= length * groups <= n + groups - 1
        assert length <= min(m, n)


def test_partition_is_one_copy():
    x = torch.randn(1, 8, 8, 4)
    assert partition(x, -1).data_ptr() == x.data_ptr()  # one window: nothing moves
    assert merge(partition(x, 4), (8, 8), 4).is_contiguous()


@pytest.mark.parametrize(
    ("grid", "window", "kernel", "causal"),
    [
        ((6, 4), 2, 3, ()),
        ((7, 5), (3, 2), 3, ()),
        ((6,), 2, 5, ()),
        ((5, 4), 2, (2, 3), (0,)),
        ((3, 4, 4), 2, (2, 3, 3), (0,)),
    ],
)
def test_linked_pairs_against_brute_force(grid, window, kernel, causal):
    report = global_exchange(grid, window, kernel, causal)
    tokens = list(itertools.product(*map(range, grid)))
    groups, kernels = report.groups, report.kernel

    def attends(a, b):
        return all((i - j) % g == 0 for i, j, g in zip(a, b, groups, strict=True))

    def convolves(a, b):
        steps = [j - i for i, j in zip(a, b, strict=True)]
        return all(
            0 <= s < k if axis in causal else abs(s) <= k // 2
            for axis, (s, k) in enumerate(zip(steps, kernels, strict=True))
        )

    linked = sum(
        any((attends(a, c) and convolves(c, b)) or (convolves(a, c) and attends(c, b)) for c in tokens)
        for a in tokens
        for b in tokens
    )
    assert report.linked_pairs == pytest.approx(linked / len(tokens) ** 2)


@pytest.mark.parametrize(
    ("side", "window", "kernel", "interior", "borders", "percent"),
    [
        (16, 8, 3, True, True, 100.0),
        (14, 7, 3, True, True, 100.0),
        (12, 4, 3, True, False, 96.9),
        (28, 7, 5, True, False, 99.4),
        (28, 7, 7, True, True, 100.0),
        (28, 7, 3, False, False, 55.8),
    ],
)
def test_the_papers_condition(side, window, kernel, interior, borders, percent):
    report = global_exchange((side, side), window, kernel)
    assert (report.interior, report.borders) == (interior, borders)
    assert round(100 * report.linked_pairs, 1) == percent
    assert report.borders == (report.linked_pairs == 1.0)


def test_borders_are_counted_not_only_bounded():
    """Where G does not divide the axis, fewer taps than 2G - 1 can be enough."""
    assert global_exchange((7,), 3, 3).borders
    assert global_exchange((9,), 5, 2, causal_axes=(0,)).borders


def test_a_causal_axis_that_the_groups_divide_never_links_all():
    for kernel in (2, 3):
        report = global_exchange((16,), 8, kernel, causal_axes=(0,))
        assert report.interior
        assert not report.borders
        assert round(100 * report.linked_pairs, 1) == 99.6


def test_planner():
    assert [plan_window((n, n), 3) for n in (8, 16, 32)] == [(4, 4), (8, 8), (16, 16)]
    assert plan_window((16, 15), 3) == (8, 15)  # an odd axis stays whole: no mask
    assert plan_window((24,), 5) == (8,)
    assert plan_window((16, 32, 32), (2, 3, 3), causal_axes=(0,)) == (8, 16, 16)
    for n, k in itertools.product(range(1, 33), (1, 3, 5, 7)):
        report = global_exchange((n,), plan_window((n,), k), k)
        assert report.borders
        assert report.linked_pairs == 1.0
        assert key_mask((n,), report.window) is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: partition(torch.zeros(1, 8, 8, 3), 0), "positive, or -1"),
        (lambda: partition(torch.zeros(1, 8, 8, 3), (4, 4, 4)), r"one entry per grid axis \(2\), got \(4, 4, 4\)"),
        (lambda: partition(torch.zeros(1, 8), 4), "1 to 3 axes"),
        (lambda: merge(torch.zeros(3, 16, 3), (8, 8), 4), "4 windows of 16 tokens per sample, got 3 windows"),
        (lambda: global_exchange((8, 8), 4, 2), "odd on centred axes, got 2"),
        (lambda: plan_window((8, 8), (3, 0)), r"kernel lengths must be positive, got \(3, 0\)"),
        (lambda: resolve_window((8, 8), 4, "zeros"), "window padding must be 'masked' or 'attended', got 'zeros'"),
    ],
)
def test_mistakes(call, message):
    with pytest.raises(ValueError, match=message):
        call()
