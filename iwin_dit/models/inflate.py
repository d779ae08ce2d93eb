"""Video models from image models: the same function on one frame, so that training on clips starts from images.

Owns which weight of the 2-D model goes where in the 3-D one. Letters: models/transformer.py.
"""

from typing import Literal

import torch

from ..nn import DepthwiseConv
from ..nn.windows import per_axis, plan_window
from .loading import load_strictly
from .transformer import IwinDiTTransformer2DModel, IwinDiTTransformer3DModel, SingleFrame, Size, window_schedule

# Options of which the shapes of the weights say nothing, or not enough for a clear message.
SAME_IN_BOTH = (
    "in_channels",
    "num_layers",
    "num_attention_heads",
    "attention_head_dim",
    "mlp_ratio",
    "num_classes",
    "block_structure",
    "gate",
    "norm_type",
    "activation_fn",
    "qkv_bias",
    "qk_norm",
    "timestep_scale",
)


def inflate(
    model: IwinDiTTransformer2DModel,
    sample_size: Size,
    *,
    temporal_patch_size: int = 1,
    temporal_window_size: int | Literal["auto"] = "auto",
    temporal_kernel_size: int = 2,
    causal_conv: bool = True,
    single_frame: SingleFrame = "refuse",
    num_classes: int | None = None,
) -> IwinDiTTransformer3DModel:
    """Make a video model from an image model.

    On one frame the two are the same function; with `temporal_patch_size` pt > 1, on pt identical frames (or on one
    with `single_frame="repeat"`). `load_inflated` says where the weights go. The windows in space stay the image
    model's, and the window in time stands in front of each: an image model with a schedule of windows gives a video
    model with the same schedule.

    Args:
        model: The image model, without position embedding.
        sample_size: (t, h, w) of the latents to train on, or one int for all; h and w need not be the image model's.
        temporal_patch_size: Latent frames per patch, pt.
        temporal_window_size: Frames of tokens in a window; -1 means all. "auto" plans it as the model would.
        temporal_kernel_size: Temporal taps of the convolution.
        causal_conv: Whether the convolution is causal in time; otherwise the kernel must be odd.
        single_frame: As for `IwinDiTTransformer3DModel`.
        num_classes: None keeps the image model's classes; a number starts so many anew, all but the null class.

    Returns:
        The video model, on the image model's device, in its dtype and mode.

    Raises:
        ValueError: If the image model has a position embedding, or sizes do not fit.
    """
    sample_size = per_axis(sample_size, IwinDiTTransformer3DModel.rank, "sample_size")
    if temporal_window_size == "auto":
        tokens = max(sample_size[0] // max(temporal_patch_size, 1), 1)  # the model refuses sizes that do not fit
        (temporal_window_size,) = plan_window((tokens,), temporal_kernel_size, (0,) if causal_conv else ())
    schedule = window_schedule(model.config.window_size, model.rank, model.config.num_layers)
    windows = [(temporal_window_size, *window) for window in schedule]
    options = {name: value for name, value in model.config.items() if not name.startswith("_")}
    options |= {
        "sample_size": sample_size,
        "num_classes": model.config.num_classes if num_classes is None else num_classes,
        "patch_size": (temporal_patch_size, *model.patch_size),
        "window_size": windows if len(windows) > 1 else windows[0],
        "conv_kernel_size": (temporal_kernel_size, *model.kernel_size),
    }
    video = IwinDiTTransformer3DModel(**options, causal_conv=causal_conv, single_frame=single_frame)
    load_inflated(video, model, fresh_classes=num_classes is not None)
    video.to(model.device)
    if video.dtype != model.dtype:  # diffusers warns of every cast, needed or not
        video.to(model.dtype)
    return video.train(model.training)


@torch.no_grad()
def load_inflated(
    model3d: IwinDiTTransformer3DModel, model2d: IwinDiTTransformer2DModel, *, fresh_classes: bool = False
) -> None:
    """Copy the weights of an image model into a video model whose configuration is given.

    | weight                | goes to                                                                              |
    |-----------------------|--------------------------------------------------------------------------------------|
    | patch embedding       | every frame of the patch, divided by their number pt                                 |
    | output layer          | every frame of the patch                                                             |
    | depthwise convolution | the tap that reads the frame itself, last if causal, else middle; the others are 0   |
    | label table           | its own place; with `fresh_classes` its last row alone, which is the null class      |
    | everything else       | its own place                                                                        |

    Windows are no weights: the video model's may be others, a schedule for one. Only with the same windows in space are
    the two models the same function on one frame.

    Args:
        model3d: Receives the weights.
        model2d: Gives them.
        fresh_classes: Keep the video model's own label table but for the null class; `num_classes` may then differ.

    Raises:
        ValueError: If the models differ in what the weights depend on, or one has a position embedding, adapters or
            fused projections; every mismatch is listed.
    """
    _check_counterparts(model3d, model2d, fresh_classes)
    pt, kt = model3d.patch_size[0], model3d.kernel_size[0]
    tensors = model2d.state_dict()
    tensors["patch_embed.weight"] = tensors["patch_embed.weight"].repeat(1, pt) / pt  # inputs are (pt, ph, pw, C_in)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        tensors[name] = torch.cat([tensors[name]] * pt)  # outputs are (pt, ph, pw, C_out)
    if fresh_classes:
        labels = model3d.class_embed.weight.clone()  # (num_classes + 1, C)
        labels[-1] = tensors["class_embed.weight"][-1]
        tensors["class_embed.weight"] = labels
    for name, module in model3d.named_modules():
        if isinstance(module, DepthwiseConv):
            weight = tensors[f"{name}.weight"]
            taps = [torch.zeros_like(weight)] * kt
            taps[module.own_tap] = weight
            tensors[f"{name}.weight"] = torch.stack(taps, dim=2)  # (C, 1, Kt, Kh, Kw)
    load_strictly(model3d, tensors, "the image model")


def _check_counterparts(
    model3d: IwinDiTTransformer3DModel, model2d: IwinDiTTransformer2DModel, fresh_classes: bool
) -> None:
    same = [name for name in SAME_IN_BOTH if not (fresh_classes and name == "num_classes")]
    pairs = {name: (model3d.config[name], model2d.config[name]) for name in same}
    pairs["out_channels"] = (model3d.out_channels, model2d.out_channels)
    pairs["patch_size in space"] = (model3d.patch_size[1:], model2d.patch_size)
    pairs["conv_kernel_size in space"] = (model3d.kernel_size[1:], model2d.kernel_size)
    problems = [
        f"{name}: {video} in the video model, {image} in the image model"
        for name, (video, image) in pairs.items()
        if video != image
    ]
    if any(problem.startswith("num_classes") for problem in problems):
        problems.append("of other classes, fresh_classes=True takes the null class alone")
    models = {"video": model3d, "image": model2d}
    for kind, model in models.items():
        names = model.state_dict().keys()
        if any(".base_layer." in name for name in names):  # as peft wraps layers, for LoRA and its kin
            problems.append(
                f"the {kind} model has adapters: fuse_lora() and then unload_lora() merges them into its weights, "
                "unload_lora() alone removes them"
            )
        if any(".to_qkv." in name for name in names):
            problems.append(f"the {kind} model has fused projections: call its unfuse_qkv_projections()")
    problems += [
        f"pos_embed_type of the {kind} model: expected 'none', as sin-cos positions share the channels among two axes "
        f"or three, got {model.config.pos_embed_type!r}"
        for kind, model in models.items()
        if model.config.pos_embed_type != "none"
    ]
    if problems:
        raise ValueError("the image model does not fit the video model:\n  " + "\n  ".join(problems))
