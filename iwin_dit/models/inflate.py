"""Video models from image models: the same function on one frame, so that training on clips starts from images.

Owns which weight of the 2-D model goes where in the 3-D one. Letters: models/transformer.py.
"""

from typing import Literal

import torch

from ..nn import DepthwiseConv
from ..nn.windows import plan_window
from .loading import load_strictly
from .transformer import IwinDiTTransformer2DModel, IwinDiTTransformer3DModel, SingleFrame, window_schedule

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
    sample_size: tuple[int, int, int],
    *,
    temporal_patch_size: int = 1,
    temporal_window_size: int | Literal["auto"] = "auto",
    temporal_kernel_size: int = 2,
    causal_conv: bool = True,
    single_frame: SingleFrame = "refuse",
) -> IwinDiTTransformer3DModel:
    """Make a video model from an image model.

    On one frame the two are the same function; with `temporal_patch_size` pt > 1, on pt identical frames (or on one
    with `single_frame="repeat"`). `load_inflated` says where the weights go. The windows in space stay the image
    model's, and the window in time stands in front of each: an image model with a schedule of windows gives a video
    model with the same schedule.

    Args:
        model: The image model, without position embedding.
        sample_size: (t, h, w) of the latents to train on; h and w need not be the image model's.
        temporal_patch_size: Latent frames per patch, pt.
        temporal_window_size: Frames of tokens in a window; -1 means all. "auto" plans it as the model would.
        temporal_kernel_size: Temporal taps of the convolution.
        causal_conv: Whether the convolution is causal in time; otherwise the kernel must be odd.
        single_frame: As for `IwinDiTTransformer3DModel`.

    Returns:
        The video model, on the image model's device, in its dtype and mode.

    Raises:
        ValueError: If the image model has a position embedding, or sizes do not fit.
    """
    if temporal_window_size == "auto":
        tokens = max(sample_size[0] // max(temporal_patch_size, 1), 1)  # the model refuses sizes that do not fit
        (temporal_window_size,) = plan_window((tokens,), temporal_kernel_size, (0,) if causal_conv else ())
    schedule = window_schedule(model.config.window_size, model.rank, model.config.num_layers)
    windows = [(temporal_window_size, *window) for window in schedule]
    options = {name: value for name, value in model.config.items() if not name.startswith("_")}
    options |= {
        "sample_size": tuple(sample_size),
        "patch_size": (temporal_patch_size, *model.patch_size),
        "window_size": windows if len(windows) > 1 else windows[0],
        "conv_kernel_size": (temporal_kernel_size, *model.kernel_size),
    }
    video = IwinDiTTransformer3DModel(**options, causal_conv=causal_conv, single_frame=single_frame)
    load_inflated(video, model)
    return video.to(device=model.device, dtype=model.dtype).train(model.training)


@torch.no_grad()
def load_inflated(model3d: IwinDiTTransformer3DModel, model2d: IwinDiTTransformer2DModel) -> None:
    """Copy the weights of an image model into a video model whose configuration is given.

    | weight                | goes to                                                                              |
    |-----------------------|--------------------------------------------------------------------------------------|
    | patch embedding       | every frame of the patch, divided by their number pt                                 |
    | output layer          | every frame of the patch                                                             |
    | depthwise convolution | the tap that reads the frame itself, last if causal, else middle; the others are 0   |
    | everything else       | its own place                                                                        |

    Windows are no weights: the video model's may be others, a schedule for one. Only with the same windows in space are
    the two models the same function on one frame.

    Args:
        model3d: Receives the weights.
        model2d: Gives them.

    Raises:
        ValueError: If the models differ in what the weights depend on, or one has a position embedding; every mismatch
            is listed.
    """
    _check_counterparts(model3d, model2d)
    pt, kt = model3d.patch_size[0], model3d.kernel_size[0]
    tensors = model2d.state_dict()
    tensors["patch_embed.weight"] = tensors["patch_embed.weight"].repeat(1, pt) / pt  # inputs are (pt, ph, pw, C_in)
    for name in ("final_layer.linear.weight", "final_layer.linear.bias"):
        tensors[name] = torch.cat([tensors[name]] * pt)  # outputs are (pt, ph, pw, C_out)
    for name, module in model3d.named_modules():
        if isinstance(module, DepthwiseConv):
            weight = tensors[f"{name}.weight"]
            taps = [torch.zeros_like(weight)] * kt
            taps[module.own_tap] = weight
            tensors[f"{name}.weight"] = torch.stack(taps, dim=2)  # (C, 1, Kt, Kh, Kw)
    load_strictly(model3d, tensors, "the image model")


def _check_counterparts(model3d: IwinDiTTransformer3DModel, model2d: IwinDiTTransformer2DModel) -> None:
    pairs = {name: (model3d.config[name], model2d.config[name]) for name in SAME_IN_BOTH}
    pairs["out_channels"] = (model3d.out_channels, model2d.out_channels)
    pairs["patch_size in space"] = (model3d.patch_size[1:], model2d.patch_size)
    pairs["conv_kernel_size in space"] = (model3d.kernel_size[1:], model2d.kernel_size)
    problems = [
        f"{name}: {video} in the video model, {image} in the image model"
        for name, (video, image) in pairs.items()
        if video != image
    ]
    problems += [
        f"pos_embed_type of the {kind} model: expected 'none', as sin-cos positions share the channels among two axes "
        f"or three, got {model.config.pos_embed_type!r}"
        for kind, model in (("video", model3d), ("image", model2d))
        if model.config.pos_embed_type != "none"
    ]
    if problems:
        raise ValueError("the image model does not fit the video model:\n  " + "\n  ".join(problems))
