"""The competitors of a block, all with the same weights, and the check that they compute the same.

`four-copy` rearranges as the paper words it: RTR, partition, reverse and restore copy the grid once each, and the
convolution works in NCHW. `floor` has no mixing of tokens at all: norms, modulation, linear layers, MLP and residuals.
Must not know how anything is timed.
"""

import copy
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.goals import by_axes
from iwin_dit import IwinDiTTransformer2DModel
from iwin_dit.nn import DepthwiseConv, FinalLayer, IwinAttention, IwinDiTBlock
from iwin_dit.nn.blocks import Modulation, SwiGLU, modulate
from iwin_dit.nn.windows import per_axis, plan_window

TOLERANCE = 1e-3  # of the largest value, float32; TF32 convolutions have 10 bits, a misplaced token is wrong by about 1
LATENT_CHANNELS = 4
ModuleT = TypeVar("ModuleT", bound=nn.Module)


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


class Denoise(nn.Module):
    """A model as a function of tensors alone, (B, C, *sizes), (B,) and (B,) -> (B, C, *sizes).

    Args:
        model: Of ours, or one of diffusers' that is called like them.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, latents: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor) -> torch.Tensor:
        """Predict from noisy latents, timesteps in [0, 1000] and labels."""
        return self.model(latents, timestep, class_labels, return_dict=False)[0]


def iwin_model(shape: Shape, layers: int, window: int | Sequence[int]) -> IwinDiTTransformer2DModel:
    """Build a model with the library's default options, one latent cell per token, and random modulation."""
    model = IwinDiTTransformer2DModel(
        sample_size=shape.grid,
        patch_size=1,
        num_layers=layers,
        num_attention_heads=shape.heads,
        attention_head_dim=shape.width // shape.heads,
        window_size=tuple(window) if isinstance(window, Sequence) else window,
        conv_kernel_size=shape.kernel,
    )
    return draw_modulation(model)


def draw_modulation(module: ModuleT) -> ModuleT:
    """Draw modulations and output layers, which start at 0, at random in place, so that no gate hides a branch."""
    for part in module.modules():
        if isinstance(part, Modulation | FinalLayer):
            nn.init.normal_(part.linear.weight, std=part.linear.in_features**-0.5)
    return module


def model_inputs(shape: Shape, batch: int, device: torch.device, dtype: torch.dtype) -> list[torch.Tensor]:
    """Draw noisy latents (B, C, *S), timesteps (B,), labels (B,), and the gradient of the output."""
    latents = torch.randn(batch, LATENT_CHANNELS, *shape.grid, device=device, dtype=dtype)
    timestep = 1000 * torch.rand(batch, device=device)
    class_labels = torch.randint(1000, (batch,), device=device)
    return [latents, timestep, class_labels, torch.randn_like(latents)]


def iwin_block(shape: Shape, window: int | Sequence[int], weights: IwinDiTBlock | None = None) -> IwinDiTBlock:
    """Build a block with the library's default options, and random modulation or the weights of another block."""
    block = IwinDiTBlock(shape.width, shape.heads, window, rank=len(shape.grid), conv_kernel_size=shape.kernel)
    if weights is None:
        return draw_modulation(block)
    block.load_state_dict(weights.state_dict())
    return block


def straightforward(module: nn.Module) -> nn.Module:
    """Copy a block or model and replace attention and convolution of the copy by the straightforward ones."""
    module = copy.deepcopy(module)
    for name, layer in list(module.named_modules()):
        if isinstance(layer, IwinAttention):
            module.set_submodule(name, FourCopyAttention(layer))
        elif isinstance(layer, DepthwiseConv):
            module.set_submodule(name, TorchConv(layer))
    return module


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


def forward_backward(module: nn.Module, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    """Run forward and backward, the last input being the gradient of the output.

    Args:
        module: Maps the other inputs to the output.
        inputs: Arguments, and the gradient of the output.

    Returns:
        The output, and the gradients of the arguments that ask for one and of the parameters.
    """
    *arguments, cotangent = inputs
    output = module(*arguments)
    leaves = [argument for argument in arguments if argument.requires_grad]
    return (output, *torch.autograd.grad(output, [*leaves, *module.parameters()], cotangent))


def largest_error(ours: Sequence[torch.Tensor], theirs: Sequence[torch.Tensor]) -> float:
    """Compare tensors one by one.

    Args:
        ours: Tensors.
        theirs: As many, of the same shapes.

    Returns:
        The largest error, relative to the largest value of its tensor; NaN where any is NaN.
    """
    relative = [(a.float() - b.float()).abs().max() / b.float().abs().max() for a, b in zip(ours, theirs, strict=True)]
    return torch.stack(relative).max().item()


def require_agreement(names: str, error: float, tolerance: float = TOLERANCE) -> None:
    """Stop the run where two sides do not agree.

    Args:
        names: Of the two sides.
        error: By `largest_error`.
        tolerance: On the error.

    Raises:
        RuntimeError: If the error exceeds it, or is NaN.
    """
    if not error <= tolerance:
        raise RuntimeError(
            f"{names} must agree to {tolerance:.1e} of the largest value, got {error:.1e}: nothing was timed"
        )


def check_agreement(sides: Mapping[str, nn.Module], inputs: Sequence[torch.Tensor]) -> dict[str, float]:
    """Compare each side that is an Iwin block or model, the global one too, with its straightforward twin.

    Args:
        sides: As built by `build_sides`, or models, in float32.
        inputs: Of `forward_backward`, in float32.

    Returns:
        The largest relative error of output and gradients by side.

    Raises:
        RuntimeError: If an error exceeds `TOLERANCE`.
    """
    errors = {}
    for name, side in sides.items():
        kinds = {type(module) for module in side.modules()}
        if IwinAttention in kinds and not kinds & {FloorBlock, FourCopyAttention}:
            twin = straightforward(side)
            errors[name] = largest_error(forward_backward(side, inputs), forward_backward(twin, inputs))
            require_agreement(f"'{name}' and its straightforward twin", errors[name])
    return errors
