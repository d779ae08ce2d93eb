"""Published FlashDiT checkpoints (LightningDiT with Iwin attention) as `IwinDiTTransformer2DModel` weights.

The map is exact: with the same latents x and labels y, `model(x, 1000 * (1 - t), y) = -flashdit(x, t, y)`. FlashDiT's
time runs from noise to data and its velocity is data - noise; both are turned around in the weights themselves, so that
nothing downstream needs to know.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from ..models import IwinDiTTransformer2DModel
from ..models.loading import load_strictly
from ..nn import IwinDiTBlock

Tensors = dict[str, torch.Tensor]

SHIFT = 1 / 0.3  # the published sampler's time shift 0.3, t' = 0.3 t / (1 - 0.7 t), in the scheduler's direction

# Width of a block's modulation over the model's width: which vectors it holds, in order, and the block's gate. The
# six-vector version has one gate for both branches, without the 1 +; the five-vector one has no shifts.
VARIANTS = {
    7: (("shift_attn", "scale_attn", "gate_attn", "shift_mlp", "scale_mlp", "gate_mlp", "gate_conv"), "one_plus"),
    6: (("shift_attn", "scale_attn", "gate_attn", "shift_mlp", "scale_mlp", "gate_mlp"), "zero"),
    5: (("scale_attn", "gate_attn", "scale_mlp", "gate_mlp", "gate_conv"), "one_plus"),
}

# Our name of every layer whose tensors only move.
BLOCK_LAYERS = {
    "attn.proj": "attn.to_out",
    "attn.q_norm": "attn.norm_q",
    "attn.k_norm": "attn.norm_k",
    "dwconv.depthwise": "conv",
    "mlp.w12": "mlp.proj_in",
    "mlp.w3": "mlp.proj_out",
    "mlp.fc1": "mlp.proj_in",
    "mlp.fc2": "mlp.proj_out",
    "norm1": "norm1",
    "norm2": "norm2",
}
OTHER_LAYERS = {
    "t_embedder.mlp.2": "time_embed.linear_2",
    "y_embedder.embedding_table": "class_embed",
    "final_layer.norm_final": "final_layer.norm",
    "final_layer.adaLN_modulation.1": "final_layer.modulation.linear",
}


def read_checkpoint(path: Path) -> Tensors:
    """Read a published checkpoint without unpickling code.

    Args:
        path: A `.safetensors` file, or a `.pt` with a state dict, or with one under `ema` (preferred) or `model`.

    Returns:
        Tensors by FlashDiT's names, `module.` prefixes stripped.

    Raises:
        ValueError: If the file is missing, holds more than tensors and plain containers, or holds no state dict.
    """
    content = _read_tensors(path)
    for key in ("ema", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
            break
    if not isinstance(content, dict) or not content or not all(isinstance(v, torch.Tensor) for v in content.values()):
        raise ValueError(f"{path} holds no state dict: expected tensors by name, at the top or under 'ema' or 'model'")
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def _read_tensors(path: Path) -> Any:
    """Read a file of tensors and plain containers without running code from it."""
    if not path.is_file():
        raise ValueError(f"file not found: {path}")
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each reader has its own errors for a damaged or unsafe file
        raise ValueError(
            f"{path} cannot be read as tensors and plain containers alone ({error}); if it is not damaged, save its "
            "tensors as .safetensors in the environment that made it"
        ) from error


def read_latent_stats(path: Path) -> tuple[list[float], list[float]]:
    """Read per-channel latent statistics.

    Args:
        path: The published `latents_stats.pt` with `mean` and `std`, (1, C, 1, 1) each, or a JSON file with the lists
            `latents_mean` and `latents_std`.

    Returns:
        Mean and standard deviation, C numbers each.

    Raises:
        ValueError: If the file is missing or holds neither.
    """
    if path.suffix == ".json" and path.is_file():
        stats, names = json.loads(path.read_text()), ("latents_mean", "latents_std")
    else:
        stats, names = _read_tensors(path), ("mean", "std")
    if not isinstance(stats, dict) or any(name not in stats for name in names):
        got = sorted(stats) if isinstance(stats, dict) else type(stats).__name__
        raise ValueError(f"{path} must hold {names[0]!r} and {names[1]!r}, got {got}")
    mean, std = (torch.as_tensor(stats[name], dtype=torch.float64).flatten().tolist() for name in names)
    return mean, std


@dataclass(frozen=True)
class Sizes:
    """What a checkpoint's tensors tell of its model."""

    width: int
    num_layers: int
    in_channels: int
    out_channels: int
    patch_size: tuple[int, int]
    num_classes: int
    variant: int
    swiglu: bool
    mlp_hidden: int
    kernel_size: tuple[int, int]

    @classmethod
    def infer(cls, tensors: Tensors) -> "Sizes":
        """Read the sizes.

        Args:
            tensors: As from `read_checkpoint`.

        Returns:
            The sizes.

        Raises:
            ValueError: If a tensor that tells a size is missing (all are listed), or the modulation has an unknown
                width.
        """
        swiglu = "blocks.0.mlp.w3.weight" in tensors
        needed = [
            "x_embedder.proj.weight",
            "y_embedder.embedding_table.weight",
            "blocks.0.adaLN_modulation.1.weight",
            "blocks.0.dwconv.depthwise.weight",
            "blocks.0.mlp.w3.weight" if swiglu else "blocks.0.mlp.fc2.weight",
            "final_layer.linear.weight",
        ]
        missing = [name for name in needed if name not in tensors]
        if missing:
            raise ValueError(f"not a FlashDiT checkpoint, missing: {', '.join(missing)}")
        ranks = {name: 4 if name.endswith(("x_embedder.proj.weight", "depthwise.weight")) else 2 for name in needed}
        wrong = [f"{n} {tuple(tensors[n].shape)}" for n, rank in ranks.items() if tensors[n].ndim != rank]
        if wrong:
            raise ValueError(f"not a FlashDiT checkpoint, wrong number of axes: {', '.join(wrong)}")
        width, in_channels, *patch_size = tensors[needed[0]].shape
        variant, rest = divmod(tensors[needed[2]].shape[0], width)
        if variant not in VARIANTS or rest:
            expected = ", ".join(f"{count * width}" for count in VARIANTS)
            raise ValueError(f"{needed[2]} must have {expected} rows, got {tensors[needed[2]].shape[0]}")
        return cls(
            width=width,
            num_layers=1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("blocks.")),
            in_channels=in_channels,
            out_channels=tensors[needed[5]].shape[0] // math.prod(patch_size),
            patch_size=(patch_size[0], patch_size[1]),
            num_classes=tensors[needed[1]].shape[0] - 1,
            variant=variant,
            swiglu=swiglu,
            mlp_hidden=tensors[needed[4]].shape[1],
            kernel_size=(tensors[needed[3]].shape[2], tensors[needed[3]].shape[3]),
        )

    def mlp_ratio(self) -> float:
        """Find a ratio that gives this hidden width, the whole number it most likely was before anything else."""
        hidden = math.ceil(self.mlp_hidden * 1.5) if self.swiglu else self.mlp_hidden
        for ratio in (float(round(hidden / self.width)), hidden / self.width, (hidden + 0.5) / self.width):
            kept = int(2 / 3 * int(ratio * self.width)) if self.swiglu else int(ratio * self.width)
            if kept == self.mlp_hidden:
                return ratio
        raise ValueError(f"no mlp_ratio gives a hidden width of {self.mlp_hidden} at width {self.width}")


def convert_flashdit(
    tensors: Tensors, num_attention_heads: int, window_size: Sequence[int], sample_size: int | Sequence[int]
) -> IwinDiTTransformer2DModel:
    """Build the model of a FlashDiT checkpoint.

    Args:
        tensors: As from `read_checkpoint`.
        num_attention_heads: Heads; the tensors do not tell.
        window_size: Window height and width; nor this.
        sample_size: Latent side, or height and width; nor this.

    Returns:
        The model, in evaluation mode, in the dtype of the checkpoint.

    Raises:
        ValueError: If the heads do not divide the width, or tensors are missing, left over or misshapen; all are
            listed.
    """
    sizes = Sizes.infer(tensors)
    if num_attention_heads < 1 or sizes.width % num_attention_heads:
        raise ValueError(f"--num-attention-heads must divide the width {sizes.width}, got {num_attention_heads}")
    model = IwinDiTTransformer2DModel(
        sample_size=sample_size if isinstance(sample_size, int) else tuple(sample_size),
        patch_size=sizes.patch_size,
        in_channels=sizes.in_channels,
        out_channels=sizes.out_channels,
        num_layers=sizes.num_layers,
        num_attention_heads=num_attention_heads,
        attention_head_dim=sizes.width // num_attention_heads,
        mlp_ratio=sizes.mlp_ratio(),
        num_classes=sizes.num_classes,
        window_size=tuple(window_size),
        conv_kernel_size=sizes.kernel_size,
        gate=VARIANTS[sizes.variant][1],
        norm_type="rms_norm" if "blocks.0.norm1.weight" in tensors else "layer_norm",
        activation_fn="swiglu" if sizes.swiglu else "gelu-approximate",
        qkv_bias="blocks.0.attn.qkv.bias" in tensors,
        qk_norm="blocks.0.attn.q_norm.weight" in tensors,
        timestep_scale=1e-3,
    )
    model.to(tensors["x_embedder.proj.weight"].dtype)
    load_strictly(model, rename(tensors, sizes), "the checkpoint, in our names,")
    return model.eval()


def rename(tensors: Tensors, sizes: Sizes) -> Tensors:
    """Give every tensor our name and layout; one of unknown name keeps it, for the strict load to list.

    Args:
        tensors: As from `read_checkpoint`.
        sizes: Their sizes.

    Returns:
        Tensors by our names.
    """
    renamed: Tensors = {}
    for name, tensor in tensors.items():
        layer, _, kind = name.rpartition(".")  # kind is "weight" or "bias"
        if name.startswith("blocks."):
            prefix, layer = ".".join(layer.split(".")[:2]), ".".join(layer.split(".")[2:])
            if layer == "attn.qkv":
                for target, part in zip(("to_q", "to_k", "to_v"), tensor.chunk(3), strict=True):
                    renamed[f"{prefix}.attn.{target}.{kind}"] = part.clone()
            elif layer == "adaLN_modulation.1":
                renamed[f"{prefix}.modulation.linear.{kind}"] = _seven_vectors(tensor, sizes.variant)
            else:
                renamed[f"{prefix}.{BLOCK_LAYERS.get(layer, layer)}.{kind}"] = tensor
        elif name == "x_embedder.proj.weight":  # (D, C, P, P) -> (D, P * P * C), the order of `patchify`
            renamed["patch_embed.weight"] = tensor.permute(0, 2, 3, 1).flatten(1)
        elif name == "x_embedder.proj.bias":
            renamed["patch_embed.bias"] = tensor
        elif layer == "t_embedder.mlp.0":
            renamed[f"time_embed.linear_1.{kind}"] = _reverse_time(tensor) if kind == "weight" else tensor
        elif layer == "final_layer.linear":
            renamed[f"final_layer.linear.{kind}"] = -tensor  # noise - data, where FlashDiT predicts data - noise
        else:
            renamed[f"{OTHER_LAYERS.get(layer, layer)}.{kind}"] = tensor
    return renamed


def _seven_vectors(tensor: torch.Tensor, variant: int) -> torch.Tensor:
    """Bring a block's modulation to our seven vectors: absent shifts are 0, a shared gate is repeated."""
    if tensor.shape[0] % variant:
        return tensor  # misshapen: the strict load says so
    names = VARIANTS[variant][0]
    vectors = dict(zip(names, tensor.chunk(variant), strict=True))
    zero = torch.zeros_like(vectors["gate_attn"])
    vectors.setdefault("gate_conv", vectors["gate_attn"])
    return torch.cat([vectors.get(name, zero) for name in IwinDiTBlock.modulation_names])


def _reverse_time(weight: torch.Tensor) -> torch.Tensor:
    """Rotate the first layer of the time MLP, (D, 2F) on features (cos, sin), so that it takes u = 1 - t for t.

    cos((1 - u) w) = cos w cos(uw) + sin w sin(uw) and sin((1 - u) w) = sin w cos(uw) - cos w sin(uw), so reversing time
    is a linear map of the features, which the weight absorbs.
    """
    cos_part, sin_part = weight.double().chunk(2, dim=1)
    count = cos_part.shape[1]
    w = torch.exp(-math.log(10_000.0) * torch.arange(count, dtype=torch.float64) / count)
    rotated = [cos_part * w.cos() + sin_part * w.sin(), cos_part * w.sin() - sin_part * w.cos()]
    return torch.cat(rotated, dim=1).to(weight.dtype)
