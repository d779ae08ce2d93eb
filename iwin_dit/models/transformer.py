"""The Iwin diffusion transformer: one rank-generic core and its public classes for images and for videos.

Owns the order of computation, the checks at construction and the initialisation of every weight. Layers are in
`iwin_dit.nn`; sampling, training and data are not known here. Letters: nn/windows.py; t, h, w are sizes of latents,
T, H, W of the token grid.
"""

import math
import os
from typing import Any, ClassVar, Literal, TypeGuard, get_args

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.loaders import PeftAdapterMixin
from diffusers.models.attention import AttentionMixin
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from diffusers.utils import apply_lora_scale
from torch import nn

from ..nn import (
    DepthwiseConv,
    FinalLayer,
    IwinDiTBlock,
    TimestepEmbedding,
    drop_labels,
    patchify,
    sincos_positions,
    unpatchify,
)
from ..nn.blocks import Activation, BlockStructure, Gate, Modulation, NormType
from ..nn.windows import GlobalExchange, WindowPadding, global_exchange, per_axis, plan_window
from .compilation import allow_variants, check_compiler, compile_options

Size = int | tuple[int, ...]
Windows = Size | list[tuple[int, ...]] | Literal["auto"]  # one for every block, or a schedule
SingleFrame = Literal["refuse", "repeat"]


def window_schedule(window_size: Windows, rank: int, num_layers: int) -> tuple[tuple[int, ...], ...]:
    """Read the configuration of windows: one for all blocks, or a list of them that is repeated over the blocks.

    Args:
        window_size: A window length for every axis, one per axis, or a list of windows.
        rank: Grid axes.
        num_layers: Number of blocks.

    Returns:
        The windows to repeat, one length per axis each; -1 means the whole axis. A single window is a list of one.

    Raises:
        ValueError: If it is none of these, a window does not fit the rank, or the length of the list does not divide
            the number of blocks.
    """
    windows = [window_size] if _is_window(window_size) else window_size
    if not isinstance(windows, list | tuple) or not windows or not all(map(_is_window, windows)):
        raise ValueError(
            f"window_size must be 'auto', an int, one int per axis, or a list of such windows, got {window_size!r}"
        )
    if num_layers % len(windows):
        raise ValueError(
            f"a schedule of windows must repeat to num_layers={num_layers} blocks, got {len(windows)} windows: "
            f"{window_size}"
        )
    return tuple(per_axis(window, rank, "window_size") for window in windows)


def _is_window(value: object) -> TypeGuard[Size]:
    return isinstance(value, int) or (isinstance(value, list | tuple) and all(isinstance(m, int) for m in value))


class IwinDiTCore(ModelMixin, AttentionMixin, ConfigMixin, PeftAdapterMixin):
    """The transformer for latents of any rank; public classes add a signature and name the rank."""

    _supports_gradient_checkpointing = True
    _no_split_modules: ClassVar[list[str]] = ["IwinDiTBlock"]
    _repeated_blocks: ClassVar[list[str]] = ["IwinDiTBlock"]
    _skip_layerwise_casting_patterns: ClassVar[list[str]] = ["patch_embed", "time_embed", "class_embed", "norm"]

    rank: ClassVar[int]

    def _build(self, causal_conv: bool = True, window_padding: WindowPadding = "masked") -> None:
        """Check the configuration and build every layer from it; images have no use for the arguments."""
        config, rank = self.config, self.rank
        dim = config.num_attention_heads * config.attention_head_dim
        self._check_config(dim)
        self.patch_size = per_axis(config.patch_size, rank, "patch_size")
        self.latent_size = per_axis(config.sample_size, rank, "sample_size")
        self.base_grid = tuple(n // p for n, p in zip(self.latent_size, self.patch_size, strict=True))
        self.kernel_size = per_axis(config.conv_kernel_size, rank, "conv_kernel_size")
        self.causal_axes = (0,) if rank == 3 and causal_conv else ()
        self.window_padding: WindowPadding = window_padding
        if config.window_size == "auto":
            self.register_to_config(window_size=plan_window(self.base_grid, self.kernel_size, self.causal_axes))
        schedule = window_schedule(self.config.window_size, rank, config.num_layers)
        self.window_sizes = schedule * (config.num_layers // len(schedule))

        self.out_channels = config.out_channels or config.in_channels
        self.patch_embed = nn.Linear(math.prod(self.patch_size) * config.in_channels, dim)
        self.time_embed = TimestepEmbedding(dim, scale=config.timestep_scale)
        self.class_embed = nn.Embedding(config.num_classes + 1, dim)  # the last row is the null class
        self.blocks = nn.ModuleList(
            IwinDiTBlock(
                dim,
                config.num_attention_heads,
                window_size,
                rank=rank,
                structure=config.block_structure,
                gate=config.gate,
                mlp_ratio=config.mlp_ratio,
                conv_kernel_size=self.kernel_size,
                norm_type=config.norm_type,
                activation_fn=config.activation_fn,
                qkv_bias=config.qkv_bias,
                qk_norm=config.qk_norm,
                causal_conv=causal_conv,
                window_padding=window_padding,
            )
            for window_size in self.window_sizes
        )
        self.final_layer = FinalLayer(dim, math.prod(self.patch_size) * self.out_channels, config.norm_type)
        self.gradient_checkpointing = False
        self.initialize_weights()

    def _check_config(self, dim: int) -> None:
        config, rank = self.config, self.rank
        for name in ("num_layers", "num_attention_heads", "attention_head_dim", "in_channels", "num_classes"):
            if getattr(config, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(config, name)}")
        if config.out_channels is not None and config.out_channels < 1:
            raise ValueError(f"out_channels must be at least 1, or None for in_channels, got {config.out_channels}")
        if int(2 / 3 * int(config.mlp_ratio * dim)) < 1:
            raise ValueError(f"mlp_ratio {config.mlp_ratio} leaves no hidden channels at a width of {dim}")
        sample_size = per_axis(config.sample_size, rank, "sample_size")
        patch_size = per_axis(config.patch_size, rank, "patch_size")
        if any(p < 1 or n < 1 or n % p for n, p in zip(sample_size, patch_size, strict=True)):
            raise ValueError(f"patch_size {patch_size} must divide sample_size {sample_size} on every axis")
        if not 0.0 <= config.class_dropout_prob <= 1.0:
            raise ValueError(f"class_dropout_prob must be in [0, 1], got {config.class_dropout_prob}")
        if config.pos_embed_type not in ("none", "sincos"):
            raise ValueError(f"pos_embed_type must be 'none' or 'sincos', got {config.pos_embed_type!r}")
        if config.pos_embed_type == "sincos" and dim % (2 * rank):
            raise ValueError(
                f"pos_embed_type 'sincos' needs num_attention_heads * attention_head_dim to be a multiple of "
                f"{2 * rank}, got {dim}"
            )

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | os.PathLike[str], **kwargs: Any) -> Any:
        """Load weights as any diffusers model does, but refuse a checkpoint that is not exactly the model's.

        diffusers leaves a missing weight on the meta device with a warning; here every missing, left-over and misshapen
        tensor is listed in one error. `ignore_mismatched_sizes=True` allows the last kind, as for fine-tuning on other
        classes: those weights are freshly initialised (diffusers would leave them without values).

        Args:
            pretrained_model_name_or_path: Folder or Hub id.
            kwargs: As for `diffusers.ModelMixin.from_pretrained`.

        Returns:
            The model, or with `output_loading_info=True` the model and diffusers' report.

        Raises:
            ValueError: If the checkpoint does not fit.
        """
        wants_info = kwargs.pop("output_loading_info", False)
        allows_mismatch = kwargs.pop("ignore_mismatched_sizes", False)
        model, info = super().from_pretrained(
            pretrained_model_name_or_path, output_loading_info=True, ignore_mismatched_sizes=True, **kwargs
        )
        mismatched = [] if allows_mismatch else info["mismatched_keys"]
        problems = [
            f"missing: {name}" for name in set(info["missing_keys"]) - {name for name, *_ in info["mismatched_keys"]}
        ]
        problems += [f"unexpected: {name}" for name in info["unexpected_keys"]]
        problems += [f"shape of {name}: expected {tuple(want)}, got {tuple(got)}" for name, got, want in mismatched]
        if problems:
            listed = "\n  ".join(sorted(problems))
            raise ValueError(f"{pretrained_model_name_or_path} does not fit {cls.__name__}:\n  {listed}")
        if info["mismatched_keys"]:
            fresh = cls.from_config(model.config).to(model.dtype)
            for name, *_ in info["mismatched_keys"]:
                owner, _, leaf = name.rpartition(".")
                setattr(model.get_submodule(owner), leaf, fresh.get_parameter(name))
        return (model, info) if wants_info else model

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialise every weight.

        | weight                          | distribution                                                    |
        |---------------------------------|-----------------------------------------------------------------|
        | every Linear                    | Xavier uniform, bias 0                                          |
        | depthwise convolution           | Xavier uniform with its own fans (`DepthwiseConv`), bias 0      |
        | label table                     | normal, standard deviation 0.5                                  |
        | modulations, output layer       | 0: with gate "zero" a block is the identity, the prediction 0   |
        | norm scales                     | 1                                                               |

        As DiT (arXiv 2212.09748, section 3.2), but for the convolution and for conditioning of order 1: DiT has 0.02 in
        label table and time MLP, and the zero modulations learn at a rate proportional to it (docs/LOG.md).
        """
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, DepthwiseConv):
                module.reset_parameters()
        nn.init.normal_(self.class_embed.weight, std=0.5)
        zero_layers = [module.linear for module in self.modules() if isinstance(module, Modulation | FinalLayer)]
        for layer in zero_layers:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Compile the repeated block as any diffusers model does, but with `compile_options` unless told otherwise.

        For every window, the first batch size gets a variant, and all others together one to three: torch tells batches
        of one, and on a CPU convolutions of fewer than 16 images, from the rest. With gradients and without are two.
        `allow_variants` raises torch's limit of them, in this thread.

        Args:
            args: As for `torch.nn.Module.compile`.
            kwargs: Likewise; `options` are added to ours and win over them, a `mode` or `backend` takes none of ours.

        Raises:
            ValueError: If a C++ compiler is needed and there is none.
        """
        if not kwargs.keys() & {"mode", "backend"}:
            kwargs["options"] = compile_options(self.device) | (kwargs.get("options") or {})
        if "backend" not in kwargs and not kwargs.get("disable"):
            check_compiler(self.device, kwargs.get("options") or {})
        allow_variants(len(set(self.window_sizes)))
        super().compile_repeated_blocks(*args, **kwargs)

    @property
    def null_class(self) -> int:
        """The label that stands for "no class" in classifier-free guidance: `num_classes`."""
        return self.config.num_classes

    def drop_labels(self, class_labels: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
        """Replace labels by the null class with probability `class_dropout_prob`, for training.

        Args:
            class_labels: (B,) integers.
            uniform: (B,) numbers in [0, 1) that decide.

        Returns:
            (B,) integers.
        """
        return drop_labels(class_labels, self.null_class, self.config.class_dropout_prob, uniform)

    def global_exchange(self) -> tuple[GlobalExchange, ...]:
        """Report the paper's global-exchange condition for this model's grid and kernel, once per distinct window.

        Returns:
            One report per window of the schedule, in its order, each as if all blocks had that window.
        """
        return tuple(
            global_exchange(self.base_grid, window_size, self.kernel_size, self.causal_axes, self.window_padding)
            for window_size in dict.fromkeys(self.window_sizes)
        )

    @apply_lora_scale("attention_kwargs")
    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor,
        attention_kwargs: dict[str, Any] | None = None,  # the decorator takes "scale" from it
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict the training target (flow: noise - data; DDPM: noise) for noisy latents.

        Args:
            hidden_states: (B, C_in, *sizes), any sizes that `patch_size` divides, square or not.
            timestep: (B,), or one number for the batch; in [0, 1000], 1000 = pure noise, 0 = data.
            class_labels: (B,) integers in [0, num_classes], `num_classes` being the null class.
            attention_kwargs: {"scale": s} scales LoRA layers.
            return_dict: Whether to return an output object or a tuple.

        Returns:
            `.sample` or a tuple of it, (B, C_out, *sizes), contiguous.

        Raises:
            ValueError: If `hidden_states` has the wrong rank, channels or sizes.
        """
        if hidden_states.ndim != self.rank + 2 or hidden_states.shape[1] != self.config.in_channels:
            raise ValueError(
                f"hidden_states must be (B, {self.config.in_channels}, {', '.join('THW'[-self.rank :])}), got "
                f"{tuple(hidden_states.shape)}"
            )

        # 1. Tokens on their grid
        x = self.patch_embed(patchify(hidden_states, self.patch_size))  # (B, *S, C)
        if self.config.pos_embed_type == "sincos":
            grid = x.shape[1:-1]
            x = x + sincos_positions(grid, self.base_grid, x.shape[-1], x.device).to(x.dtype)

        # 2. Conditioning
        timestep = torch.as_tensor(timestep, device=x.device).expand(x.shape[0])
        conditioning = self.time_embed(timestep, x.dtype) + self.class_embed(class_labels)  # (B, C)

        # 3. Blocks
        for block in self.blocks:
            if torch.is_grad_enabled() and self.gradient_checkpointing:
                x = self._gradient_checkpointing_func(block, x, conditioning)
            else:
                x = block(x, conditioning)

        # 4. Back to latents
        sample = unpatchify(self.final_layer(x, conditioning), self.patch_size)  # (B, C_out, *sizes)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)


class IwinDiTTransformer2DModel(IwinDiTCore):
    """Class-conditional diffusion transformer with Iwin attention and depthwise convolution, for image latents.

    DiT (arXiv 2212.09748) with every self-attention replaced by interleaved-window attention plus a depthwise
    convolution (arXiv 2507.18405). No position embedding by default: the convolution's zero padding gives position.

    Args:
        sample_size: Side of the training latents, or (height, width). Other sizes work; this one plans
            `window_size="auto"` and anchors the sin-cos positions.
        patch_size: Side of a patch, or (height, width).
        in_channels: Latent channels.
        out_channels: Predicted channels; None means `in_channels`. Twice that for a learned variance.
        num_layers: Number of blocks.
        num_attention_heads: Heads per block.
        attention_head_dim: Channels per head; the width is heads times this.
        mlp_ratio: Hidden width of the MLP over the width.
        num_classes: Number of classes; the null class is `num_classes`.
        class_dropout_prob: Probability with which training drops a label.
        window_size: Window side, (height, width), a schedule, or "auto": the cheapest windows that divide the grid and
            let two blocks exchange information between all pairs of tokens. -1 means the whole axis. A schedule is a
            list of windows, repeated over the blocks, whose number its length must divide. "auto" is resolved at
            construction and stored as numbers.
        conv_kernel_size: Kernel side of the depthwise convolution, or (height, width); odd.
        block_structure: "parallel" (S1), "independent" (S2) or "serial" (S3) of the paper's Figure 3.
        gate: "zero" (adaLN-Zero) or "one_plus" (the published FlashDiT).
        norm_type: "rms_norm" or "layer_norm".
        activation_fn: "swiglu" or "gelu-approximate".
        qkv_bias: Whether query, key and value projections have a bias.
        qk_norm: Whether queries and keys are RMS-normalised per head.
        pos_embed_type: "none" or "sincos".
        timestep_scale: Factor on the timestep before its sinusoidal features.

    Raises:
        ValueError: If sizes, windows, patches or options cannot work together.
    """

    rank = 2

    @register_to_config
    def __init__(
        self,
        sample_size: Size = 32,
        patch_size: Size = 2,
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        window_size: Windows = "auto",
        conv_kernel_size: Size = 3,
        block_structure: BlockStructure = "parallel",
        gate: Gate = "zero",
        norm_type: NormType = "rms_norm",
        activation_fn: Activation = "swiglu",
        qkv_bias: bool = True,
        qk_norm: bool = True,
        pos_embed_type: Literal["none", "sincos"] = "none",
        timestep_scale: float = 1.0,
    ) -> None:
        super().__init__()
        self._build()


class IwinDiTTransformer3DModel(IwinDiTCore):
    """Class-conditional diffusion transformer with Iwin attention and depthwise convolution, for video latents.

    The same core as `IwinDiTTransformer2DModel` on a grid of three axes: latents (B, C, t, h, w) in patches
    (pt, ph, pw) become tokens (B, T, H, W, C), which attend inside windows (Mt, Mh, Mw), interleaved on all three axes,
    and meet their neighbours in a convolution (Kt, Kh, Kw) (the published Iwin 3D block; arXiv 2507.18405).

    Causal in time means the convolution alone: with `causal_conv` a frame takes nothing from later ones through it.
    Attention inside a window is not causal, so that the model as a whole is causal only where every window is one frame
    long. Factorised attention as in Latte (arXiv 2401.03048), blocks that alternate between space and time, is the
    schedule `[[1, -1, -1], [-1, 1, 1]]`.

    A clip of one latent frame runs through the same weights. `models.inflate` makes such a model from one for images.

    Args:
        sample_size: (t, h, w) of the training latents, or one int for all three. Other sizes work; this one plans
            `window_size="auto"` and anchors the sin-cos positions.
        patch_size: (pt, ph, pw) of a patch, or one int for all three.
        in_channels: Latent channels.
        out_channels: Predicted channels; None means `in_channels`. Twice that for a learned variance.
        num_layers: Number of blocks.
        num_attention_heads: Heads per block.
        attention_head_dim: Channels per head; the width is heads times this.
        mlp_ratio: Hidden width of the MLP over the width.
        num_classes: Number of classes; the null class is `num_classes`.
        class_dropout_prob: Probability with which training drops a label.
        window_size: (Mt, Mh, Mw), one int for all three, a schedule, or "auto": per axis the cheapest windows that
            divide the grid and satisfy the paper's condition for global exchange in two blocks, K >= 2G - 1 on centred
            axes; on a causal axis K >= G, as frame 0 never reaches the last one there unless G = 1. -1 means the whole
            axis. A schedule is a list of windows, repeated over the blocks, whose number its length must divide. "auto"
            is resolved at construction and stored as numbers.
        conv_kernel_size: (Kt, Kh, Kw) of the depthwise convolution, or one int for all three; odd in space, and in time
            too unless `causal_conv`.
        causal_conv: Whether the convolution is causal in time: zero frames in front and none behind. Otherwise it is
            centred.
        window_padding: What stands after the end of an axis that the window does not divide: "masked" cells, which
            nothing attends to, or "attended" zeros, which are ordinary keys and values (the published code).
        single_frame: What becomes of one latent frame where pt > 1: "refuse" it, or "repeat" it pt times and average
            the pt predicted frames.
        block_structure: "parallel" (S1), "independent" (S2) or "serial" (S3) of the paper's Figure 3.
        gate: "zero" (adaLN-Zero) or "one_plus" (the published FlashDiT).
        norm_type: "rms_norm" or "layer_norm".
        activation_fn: "swiglu" or "gelu-approximate".
        qkv_bias: Whether query, key and value projections have a bias.
        qk_norm: Whether queries and keys are RMS-normalised per head.
        pos_embed_type: "none" or "sincos".
        timestep_scale: Factor on the timestep before its sinusoidal features.

    Raises:
        ValueError: If sizes, windows, patches or options cannot work together.
    """

    rank = 3

    @register_to_config
    def __init__(
        self,
        sample_size: Size = (16, 32, 32),
        patch_size: Size = (1, 2, 2),
        in_channels: int = 4,
        out_channels: int | None = None,
        num_layers: int = 28,
        num_attention_heads: int = 16,
        attention_head_dim: int = 72,
        mlp_ratio: float = 4.0,
        num_classes: int = 1000,
        class_dropout_prob: float = 0.1,
        window_size: Windows = "auto",
        conv_kernel_size: Size = (2, 3, 3),
        causal_conv: bool = True,
        window_padding: WindowPadding = "masked",
        single_frame: SingleFrame = "refuse",
        block_structure: BlockStructure = "parallel",
        gate: Gate = "zero",
        norm_type: NormType = "rms_norm",
        activation_fn: Activation = "swiglu",
        qkv_bias: bool = True,
        qk_norm: bool = True,
        pos_embed_type: Literal["none", "sincos"] = "none",
        timestep_scale: float = 1.0,
    ) -> None:
        super().__init__()
        if single_frame not in get_args(SingleFrame):
            raise ValueError(f"single_frame must be 'refuse' or 'repeat', got {single_frame!r}")
        self._build(causal_conv, window_padding)

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor | float,
        class_labels: torch.Tensor,
        attention_kwargs: dict[str, Any] | None = None,
        return_dict: bool = True,
    ) -> Transformer2DModelOutput | tuple[torch.Tensor]:
        """Predict the training target (flow: noise - data; DDPM: noise) for noisy latents.

        Args:
            hidden_states: (B, C_in, t, h, w), any sizes that `patch_size` divides. One latent frame (t = 1) is allowed
                where pt = 1, and otherwise with `single_frame` "repeat".
            timestep: (B,), or one number for the batch; in [0, 1000], 1000 = pure noise, 0 = data.
            class_labels: (B,) integers in [0, num_classes], `num_classes` being the null class.
            attention_kwargs: {"scale": s} scales LoRA layers.
            return_dict: Whether to return an output object or a tuple.

        Returns:
            `.sample` or a tuple of it, (B, C_out, t, h, w), contiguous.

        Raises:
            ValueError: If `hidden_states` has the wrong rank, channels or sizes.
        """
        frames, per_patch = hidden_states.shape[2:3], self.patch_size[0]
        if frames != (1,) or per_patch == 1:
            return super().forward(
                hidden_states, timestep, class_labels, attention_kwargs=attention_kwargs, return_dict=return_dict
            )
        if self.config.single_frame == "refuse":
            raise ValueError(
                f"hidden_states has 1 latent frame, but patch_size {self.patch_size} needs a multiple of {per_patch}: "
                "give more frames, or build the model with single_frame='repeat'"
            )
        repeated = hidden_states.repeat_interleave(per_patch, dim=2)
        (sample,) = super().forward(
            repeated, timestep, class_labels, attention_kwargs=attention_kwargs, return_dict=False
        )
        sample = sample.mean(dim=2, keepdim=True)
        return Transformer2DModelOutput(sample=sample) if return_dict else (sample,)
