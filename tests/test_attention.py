"""Iwin attention against its specification, Lemma 1: dense attention under the mask i = j (mod G) on every axis."""

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import attention_backend
from hypothesis import given, settings
from hypothesis import strategies as st

from iwin_dit.nn import IwinAttention
from iwin_dit.nn.windows import per_axis, resolve_window
from tests.test_windows import CASES


def lemma_1_mask(grid, window, interleaved):
    """(N, N) boolean: whether two tokens share a window, from the index formulas, with no reshape of tokens."""
    lengths, groups = resolve_window(grid, window)
    same = torch.ones(1, 1, dtype=torch.bool)
    for n, m, g in zip(grid, lengths, groups, strict=True):
        i = torch.arange(n)
        name = i % g if interleaved else i // m
        axis = name[:, None] == name[None, :]
        same = (same[:, None, :, None] & axis[None, :, None, :]).flatten(2, 3).flatten(0, 1)
    return same


def dense_attention(attn, x, mask):
    """The layer's own projections, then masked attention over all tokens."""
    tokens = x.flatten(1, -2)  # (B, N, C)
    q, k, v = (f(tokens).unflatten(-1, (attn.heads, -1)) for f in (attn.to_q, attn.to_k, attn.to_v))
    q, k, v = (y.transpose(1, 2) for y in (attn.norm_q(q), attn.norm_k(k), v))
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2).flatten(2)
    return attn.to_out(y).view_as(x)


def dense_iwin_attention(attn, x):
    """The specification of the layer: Lemma 1 on the grid, or on the grid filled up with zeros that attend."""
    grid = x.shape[1:-1]
    if attn.window_padding == "attended":
        sides = per_axis(attn.window_size, len(grid), "window")
        lengths = [n if m == -1 else min(m, n) for n, m in zip(grid, sides, strict=True)]
        ends = [-n % m for n, m in zip(grid, lengths, strict=True)]
        x = F.pad(x, [0, 0, *(p for end in reversed(ends) for p in (0, end))])
    y = dense_attention(attn, x, lemma_1_mask(x.shape[1:-1], attn.window_size, attn.interleaved))
    return y[(slice(None), *map(slice, grid))]


def check_against_dense(grid, window, interleaved, qk_norm=True, window_padding="masked"):
    torch.manual_seed(0)
    attn = IwinAttention(8, 2, window, interleaved=interleaved, qk_norm=qk_norm, window_padding=window_padding).double()
    x = torch.randn(2, *grid, 8, dtype=torch.float64, requires_grad=True)
    cotangent = torch.randn_like(x)
    leaves = [x, *attn.parameters()]

    y = attn(x)
    expected = dense_iwin_attention(attn, x)

    torch.testing.assert_close(y, expected, rtol=0, atol=1e-12)
    gradients = torch.autograd.grad(y, leaves, cotangent)
    for ours, dense in zip(gradients, torch.autograd.grad(expected, leaves, cotangent), strict=True):
        torch.testing.assert_close(ours, dense, rtol=0, atol=1e-10)


@pytest.mark.parametrize("window_padding", ["masked", "attended"])
@pytest.mark.parametrize("interleaved", [True, False])
@pytest.mark.parametrize(("grid", "window"), CASES)
def test_lemma_1(grid, window, interleaved, window_padding):
    check_against_dense(grid, window, interleaved, window_padding=window_padding)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    shape=st.integers(1, 3).flatmap(lambda rank: st.tuples(*[st.tuples(st.integers(1, 7), st.integers(1, 7))] * rank)),
    interleaved=st.booleans(),
    qk_norm=st.booleans(),
    window_padding=st.sampled_from(["masked", "attended"]),
)
def test_lemma_1_for_random_shapes(shape, interleaved, qk_norm, window_padding):
    grid, window = (tuple(axis) for axis in zip(*shape, strict=True))
    check_against_dense(grid, window, interleaved, qk_norm, window_padding)


def test_a_full_window_is_plain_attention():
    attn = IwinAttention(8, 2, -1)
    x = torch.randn(2, 4, 6, 8)
    torch.testing.assert_close(attn(x), dense_attention(attn, x, None))


def test_padding_is_never_attended():
    """Padded cells would have the bias as key and value: a large one must not leak into the output."""
    attn = IwinAttention(8, 2, 4).double()
    torch.nn.init.constant_(attn.to_v.bias, 100.0)
    x = torch.randn(1, 7, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(attn(x), dense_attention(attn, x, lemma_1_mask((7, 5), 4, True)))


@pytest.mark.parametrize("backend", ["native", "_native_math"])
def test_backends_that_take_a_mask(backend):
    attn = IwinAttention(8, 2, 4)
    x = torch.randn(1, 7, 5, 8)
    expected = attn(x)
    attn.set_attention_backend(backend)
    torch.testing.assert_close(attn(x), expected)


@pytest.mark.parametrize("backend", ["flash", "flash_varlen", "sage", "flex", "_native_flash", "xformers"])
def test_backends_without_masks_are_refused_for_padded_grids_only(backend):
    attn = IwinAttention(8, 2, 4)
    attn.processor._attention_backend = None
    with attention_backend("native"):
        attn(torch.randn(1, 7, 5, 8))
    attn.set_attention_backend(backend)
    with pytest.raises(ValueError, match=f"'{backend}' cannot do: use a grid that the window divides, or one of"):
        attn(torch.randn(1, 7, 5, 8))


def test_attended_padding_needs_no_mask():
    """So that a backend without masks takes it; and the padded cells do change the result."""
    masked, attended = IwinAttention(8, 2, 4), IwinAttention(8, 2, 4, window_padding="attended")
    attended.load_state_dict(masked.state_dict())
    aligned, odd = torch.randn(1, 8, 4, 8), torch.randn(1, 7, 5, 8)
    assert torch.equal(attended(aligned), masked(aligned))
    expected = attended(odd)
    assert not torch.allclose(expected, masked(odd))
    with attention_backend("_native_flash"):
        torch.testing.assert_close(attended(odd), expected)


def test_the_globally_active_backend_is_checked_too():
    attn = IwinAttention(8, 2, 4)
    with attention_backend("_native_flash"), pytest.raises(ValueError, match="'_native_flash' cannot do"):
        attn(torch.randn(1, 7, 5, 8))


def test_fused_projections():
    attn = IwinAttention(8, 2, 4)
    x = torch.randn(1, 8, 8, 8)
    expected = attn(x)
    attn.fuse_projections()
    torch.testing.assert_close(attn(x), expected)
    attn.unfuse_projections()
    assert torch.equal(attn(x), expected)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_heads": 3}, "num_heads must divide dim=8, got 3"),
        ({"num_heads": 2, "window_size": 0}, "positive, or -1"),
        ({"num_heads": 2, "window_size": (4, -2)}, "positive, or -1"),
        ({"num_heads": 2, "window_padding": "zeros"}, "window padding must be 'masked' or 'attended', got 'zeros'"),
    ],
)
def test_mistakes_at_construction(arguments, message):
    with pytest.raises(ValueError, match=message):
        IwinAttention(8, **arguments)


def test_a_window_of_another_rank():
    with pytest.raises(ValueError, match="one entry per grid axis"):
        IwinAttention(8, 2, (4, 4))(torch.randn(1, 4, 4, 4, 8))
