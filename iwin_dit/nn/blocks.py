"""The transformer block: modulation, the Iwin attention and convolution branches, the MLP, and the output layer.

Tokens stay on their grid, (B, *S, C). Knows nothing of patches, time or labels: conditioning is one vector per sample.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from .attention import IwinAttention
from .conv import DepthwiseConv
from .windows import WindowPadding

BlockStructure = Literal["parallel", "independent", "serial"]
Gate = Literal["zero", "one_plus"]
NormType = Literal["rms_norm", "layer_norm"]
Activation = Literal["swiglu", "gelu-approximate"]


class Modulation(nn.Module):
    """SiLU and Linear from the conditioning vector to per-channel shifts, scales and gates (adaLN, arXiv 2212.09748).

    Args:
        dim: Channels C.
        chunks: How many vectors to produce.
    """

    def __init__(self, dim: int, chunks: int) -> None:
        super().__init__()
        self.chunks = chunks
        self.act = nn.SiLU()
        self.linear = nn.Linear(dim, chunks * dim)

    def forward(self, conditioning: torch.Tensor, rank: int) -> tuple[torch.Tensor, ...]:
        """Produce the modulation vectors.

        Args:
            conditioning: (B, C).
            rank: Grid axes to broadcast over.

        Returns:
            `chunks` tensors (B, 1, ..., 1, C).
        """
        vectors = self.linear(self.act(conditioning))
        return vectors.view(vectors.shape[0], *(1,) * rank, -1).chunk(self.chunks, dim=-1)


def modulate(x: torch.Tensor, shift: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Scale by 1 + scale and shift, all (B, *S, C) up to broadcasting."""
    return x * (1 + scale) + shift


class GeluMLP(nn.Module):
    """Linear, GELU (tanh form, as DiT), Linear: (..., C) -> (..., C).

    Args:
        dim: Channels C.
        hidden_dim: Width between the two linears.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.proj_in = nn.Linear(dim, hidden_dim)
        self.proj_out = nn.Linear(hidden_dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map every token, (..., C) -> (..., C)."""
        return self.proj_out(F.gelu(self.proj_in(x), approximate="tanh"))


class SwiGLU(nn.Module):
    """Gated MLP (arXiv 2002.05202): one Linear to two halves, SiLU(first) * second, Linear: (..., C) -> (..., C).

    Args:
        dim: Channels C.
        hidden_dim: Width of a `GeluMLP` with as many parameters; two thirds of it are used here.
    """

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        inner_dim = int(2 / 3 * hidden_dim)
        self.proj_in = nn.Linear(dim, 2 * inner_dim)
        self.proj_out = nn.Linear(inner_dim, dim)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Map every token, (..., C) -> (..., C)."""
        gate, value = self.proj_in(x).chunk(2, dim=-1)
        return self.proj_out(F.silu(gate) * value)


def make_norm(norm_type: NormType, dim: int) -> nn.Module:
    """Build the normalisation before a modulated branch: RMSNorm with a learned scale, or LayerNorm without (DiT).

    Args:
        norm_type: Which of the two.
        dim: Channels C.

    Returns:
        A module (..., C) -> (..., C), eps 1e-6.

    Raises:
        ValueError: If `norm_type` is neither.
    """
    if norm_type == "rms_norm":
        return nn.RMSNorm(dim, eps=1e-6)
    if norm_type == "layer_norm":
        return nn.LayerNorm(dim, eps=1e-6, elementwise_affine=False)
    raise ValueError(f"norm_type must be 'rms_norm' or 'layer_norm', got {norm_type!r}")


def make_mlp(activation_fn: Activation, dim: int, hidden_dim: int) -> nn.Module:
    """Build the MLP of a block.

    Args:
        activation_fn: Which kind.
        dim: Channels C.
        hidden_dim: Hidden width; a SwiGLU takes two thirds of it, for the same number of parameters.

    Returns:
        A module (..., C) -> (..., C).

    Raises:
        ValueError: If `activation_fn` is unknown.
    """
    kinds: dict[str, Callable[[int, int], nn.Module]] = {"swiglu": SwiGLU, "gelu-approximate": GeluMLP}
    if activation_fn not in kinds:
        raise ValueError(f"activation_fn must be one of {sorted(kinds)}, got {activation_fn!r}")
    return kinds[activation_fn](dim, hidden_dim)


class IwinDiTBlock(nn.Module):
    """A DiT block whose self-attention is Iwin attention plus depthwise convolution (arXiv 2507.18405, Figure 3).

    With h = modulate(norm1(x)), g_a and g_c the gates of the two branches, we read the figure's three structures as

        S1 "parallel"     u = x + g_c * conv(h) + g_a * attn(h)
        S2 "independent"  u = x + g_c * conv(x) + g_a * attn(h)
        S3 "serial"       v = x + g_c * conv(modulate'(norm'(x))),  u = v + g_a * attn(modulate(norm1(v)))

    (in S3 each branch has its own norm and modulation), and in all three the block ends with

        y = u + g_m * mlp(modulate(norm2(u))).

    The public code has only S1, and only S1 is known to have been trained at scale by the authors.

    Args:
        dim: Channels C.
        num_heads: Attention heads.
        window_size: Window length for every axis or per axis; -1 means the whole axis.
        rank: Grid axes, 1 to 3.
        structure: S1, S2 or S3 above.
        gate: "zero": a gate is the modulation's output, zero at initialisation, so that the block starts as the
            identity (adaLN-Zero, arXiv 2212.09748). "one_plus": 1 + that output (the published FlashDiT).
        mlp_ratio: Hidden width of the MLP over C.
        conv_kernel_size: Kernel length for every axis or per axis; odd on centred axes.
        norm_type: RMSNorm with a learned scale, or LayerNorm without.
        activation_fn: "swiglu" or "gelu-approximate".
        qkv_bias: Whether query, key and value projections have a bias.
        qk_norm: Whether queries and keys are RMS-normalised per head.
        causal_conv: Whether the convolution of a 3-D grid is causal in time; attention inside a window never is.
        window_padding: "masked" or "attended", see `IwinAttention`.

    Raises:
        ValueError: If an option is unknown, or the sizes cannot work together.
    """

    # In the order in which FlashDiT's checkpoints store them; S3 appends the modulation of its convolution branch.
    modulation_names = ("shift_attn", "scale_attn", "gate_attn", "shift_mlp", "scale_mlp", "gate_mlp", "gate_conv")

    def __init__(
        self,
        dim: int,
        num_heads: int,
        window_size: int | Sequence[int] = -1,
        *,
        rank: int = 2,
        structure: BlockStructure = "parallel",
        gate: Gate = "zero",
        mlp_ratio: float = 4.0,
        conv_kernel_size: int | Sequence[int] = 3,
        norm_type: NormType = "rms_norm",
        activation_fn: Activation = "swiglu",
        qkv_bias: bool = True,
        qk_norm: bool = True,
        causal_conv: bool = True,
        window_padding: WindowPadding = "masked",
    ) -> None:
        super().__init__()
        if structure not in ("parallel", "independent", "serial"):
            raise ValueError(f"structure must be 'parallel', 'independent' or 'serial', got {structure!r}")
        if gate not in ("zero", "one_plus"):
            raise ValueError(f"gate must be 'zero' or 'one_plus', got {gate!r}")
        self.structure = structure
        self.gate_offset = 1.0 if gate == "one_plus" else 0.0
        self.norm1 = make_norm(norm_type, dim)
        self.attn = IwinAttention(
            dim, num_heads, window_size, qkv_bias=qkv_bias, qk_norm=qk_norm, window_padding=window_padding
        )
        self.conv = DepthwiseConv(dim, conv_kernel_size, rank, causal_conv)
        self.norm_conv = make_norm(norm_type, dim) if structure == "serial" else None
        self.norm2 = make_norm(norm_type, dim)
        self.mlp = make_mlp(activation_fn, dim, int(mlp_ratio * dim))
        self.modulation = Modulation(dim, len(self.modulation_names) + (2 if structure == "serial" else 0))

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        """Run the block.

        Args:
            hidden_states: (B, *S, C).
            conditioning: (B, C).

        Returns:
            (B, *S, C).
        """
        x = hidden_states
        vectors = self.modulation(conditioning, rank=x.ndim - 2)
        shift_attn, scale_attn, gate_attn, shift_mlp, scale_mlp, gate_mlp, gate_conv = vectors[:7]
        gate_attn, gate_mlp, gate_conv = (self.gate_offset + g for g in (gate_attn, gate_mlp, gate_conv))

        # 1. Convolution carries neighbours, attention carries tokens that are far apart.
        if self.norm_conv is not None:
            shift_conv, scale_conv = vectors[7:]
            x = x + gate_conv * self.conv(modulate(self.norm_conv(x), shift_conv, scale_conv))
            x = x + gate_attn * self.attn(modulate(self.norm1(x), shift_attn, scale_attn))
        else:
            h = modulate(self.norm1(x), shift_attn, scale_attn)
            local = self.conv(x if self.structure == "independent" else h)
            x = x + gate_conv * local + gate_attn * self.attn(h)

        # 2. MLP
        return x + gate_mlp * self.mlp(modulate(self.norm2(x), shift_mlp, scale_mlp))


class FinalLayer(nn.Module):
    """Modulated norm and the linear to patches.

    Args:
        dim: Channels C of a token.
        out_dim: Channels of its patch, prod(P) * C_out.
        norm_type: RMSNorm with a learned scale, or LayerNorm without.
    """

    def __init__(self, dim: int, out_dim: int, norm_type: NormType = "rms_norm") -> None:
        super().__init__()
        self.norm = make_norm(norm_type, dim)
        self.modulation = Modulation(dim, 2)
        self.linear = nn.Linear(dim, out_dim)

    def forward(self, hidden_states: torch.Tensor, conditioning: torch.Tensor) -> torch.Tensor:
        """Map tokens to patches.

        Args:
            hidden_states: (B, *S, C).
            conditioning: (B, C).

        Returns:
            (B, *S, out_dim).
        """
        shift, scale = self.modulation(conditioning, rank=hidden_states.ndim - 2)
        return self.linear(modulate(self.norm(hidden_states), shift, scale))
