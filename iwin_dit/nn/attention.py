"""Iwin attention: multi-head attention inside interleaved windows of a grid.

The only file of this package that imports diffusers: its attention dispatch chooses the kernel, its mixin gives the
processor, fusion and backend calls that diffusers users know. Window algebra is in windows.py.
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from diffusers.models.attention import AttentionModuleMixin
from diffusers.models.attention_dispatch import (
    AttentionBackendName,
    _AttentionBackendRegistry,
    dispatch_attention_fn,
)
from torch import nn

from .windows import WindowPadding, check_padding, key_mask, merge, partition

# Backends that go through torch's scaled_dot_product_attention and honour a (B, 1, 1, L) boolean mask. Flash and sage
# take none, variable-length kernels read it as a prefix length, xformers adds it as 0 and 1, and flex builds a block
# mask on every call.
MASKED_BACKENDS = (
    AttentionBackendName.NATIVE,
    AttentionBackendName._NATIVE_CUDNN,
    AttentionBackendName._NATIVE_EFFICIENT,
    AttentionBackendName._NATIVE_MATH,
)


class IwinAttnProcessor:
    """Runs `IwinAttention` through diffusers' attention dispatch, on the backend set by `set_attention_backend`."""

    _attention_backend: AttentionBackendName | None = None
    _parallel_config = None

    def __call__(self, attn: "IwinAttention", hidden_states: torch.Tensor) -> torch.Tensor:
        """Attend inside every window.

        Args:
            attn: The layer that owns the projections.
            hidden_states: (B, *S, C).

        Returns:
            (B, *S, C).

        Raises:
            ValueError: If the grid needs a key mask and the active backend cannot honour one.
        """
        batch, *grid, _ = hidden_states.shape
        mask = None
        if attn.window_padding == "masked":
            mask = key_mask(grid, attn.window_size, attn.interleaved, hidden_states.device)
        if mask is not None:
            self._check_backend_takes_mask(grid, attn.window_size)
            mask = mask.repeat(batch, 1)[:, None, None, :]  # (B * windows, 1, 1, L)

        layout = (attn.window_size, attn.interleaved, attn.window_padding)
        x = partition(hidden_states, *layout)  # (B * windows, L, C)
        q, k, v = attn.to_qkv(x).chunk(3, -1) if attn.fused_projections else (attn.to_q(x), attn.to_k(x), attn.to_v(x))
        q, k, v = (y.unflatten(-1, (attn.heads, -1)) for y in (q, k, v))  # (B * windows, L, heads, C / heads)
        q, k = attn.norm_q(q).to(v.dtype), attn.norm_k(k).to(v.dtype)  # autocast normalises in float32
        x = dispatch_attention_fn(
            q, k, v, attn_mask=mask, backend=self._attention_backend, parallel_config=self._parallel_config
        )
        x = attn.to_out(x.flatten(2))
        return merge(x, grid, *layout)

    def _check_backend_takes_mask(self, grid: Sequence[int], window: int | Sequence[int]) -> None:
        backend = self._attention_backend or _AttentionBackendRegistry.get_active_backend()[0]
        if backend not in MASKED_BACKENDS:
            usable = ", ".join(name.value for name in MASKED_BACKENDS)
            raise ValueError(
                f"window {window} does not divide the grid {tuple(grid)}, so padded cells must be masked, which the "
                f"attention backend '{AttentionBackendName(backend).value}' cannot do: use a grid that the window "
                f"divides, or one of the backends {usable}"
            )


class IwinAttention(nn.Module, AttentionModuleMixin):
    """Multi-head self-attention inside interleaved windows (Iwin attention, arXiv 2507.18405).

    Equal to dense attention in which token i attends to token j if and only if i = j (mod G) on every axis (Lemma 1);
    for a fixed window its cost is linear in the number of tokens. A window as large as the grid is plain global
    attention. Any grid size works: where the window does not divide an axis, padded cells are masked.

    `window_padding="attended"` is there for parity with the published video code: the window is not evened out, and the
    zeros appended to the input attend and are attended to as ordinary tokens, so that on such grids the projections'
    biases are keys and values and Lemma 1 does not hold. Where the window divides the grid the two are the same.

    Args:
        dim: Channels C.
        num_heads: Attention heads; must divide `dim`.
        window_size: Window length for every axis or per axis; -1 means the whole axis.
        interleaved: False gives contiguous windows (as in Swin, without shift).
        qkv_bias: Whether the query, key and value projections have a bias.
        qk_norm: RMS-normalise queries and keys per head, with a learned scale. Several public DiT trainings diverge
            without it in bfloat16.
        window_padding: "masked" or "attended", what padded cells are.

    Raises:
        ValueError: If `num_heads` does not divide `dim`, a window length is invalid, or `window_padding` is unknown.
    """

    _default_processor_cls = IwinAttnProcessor
    _available_processors: ClassVar[list[type]] = [IwinAttnProcessor]
    is_cross_attention = False
    to_qkv: nn.Linear  # made by `fuse_projections`

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Sequence[int] = -1,
        interleaved: bool = True,
        qkv_bias: bool = True,
        qk_norm: bool = True,
        window_padding: WindowPadding = "masked",
    ) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"num_heads must divide dim={dim}, got {num_heads}")
        windows = [window_size] if isinstance(window_size, int) else list(window_size)
        if any(m < 1 and m != -1 for m in windows):
            raise ValueError(f"window lengths must be positive, or -1 for the whole axis, got {window_size}")
        check_padding(window_padding)
        self.heads = num_heads
        self.window_size = window_size if isinstance(window_size, int) else tuple(window_size)
        self.interleaved = interleaved
        self.window_padding: WindowPadding = window_padding
        self.use_bias = qkv_bias
        self.to_q = nn.Linear(dim, dim, bias=qkv_bias)
        self.to_k = nn.Linear(dim, dim, bias=qkv_bias)
        self.to_v = nn.Linear(dim, dim, bias=qkv_bias)
        self.norm_q = nn.RMSNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.norm_k = nn.RMSNorm(dim // num_heads, eps=1e-6) if qk_norm else nn.Identity()
        self.to_out = nn.Linear(dim, dim)
        self.processor = IwinAttnProcessor()

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Attend inside every window.

        Args:
            hidden_states: (B, *S, C) with one to three grid axes.

        Returns:
            (B, *S, C).

        Raises:
            ValueError: If the window does not fit the rank of the grid, or the grid needs a key mask that the active
                attention backend cannot honour.
        """
        return self.processor(self, hidden_states)

    def extra_repr(self) -> str:
        """Show the window in the module's printout."""
        padding = "" if self.window_padding == "masked" else f", window_padding={self.window_padding!r}"
        return f"heads={self.heads}, window_size={self.window_size}, interleaved={self.interleaved}{padding}"
