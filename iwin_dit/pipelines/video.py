"""`IwinDiTVideoPipeline`: class-conditional clips from a 3D Iwin DiT, as a diffusers pipeline like any other.

Owns the public call for clips, what their number of frames may be, and what is returned; all else is in base.py.
Letters: B batch, C latent channels, T frames, H W pixels, t h w latent frames and cells.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np
import torch
from diffusers import ModelMixin, SchedulerMixin
from diffusers.utils import BaseOutput
from diffusers.video_processor import VideoProcessor
from PIL import Image

from ..models import IwinDiTTransformer3DModel
from .base import ClassLabels, IwinDiTPipelineBase, checked_rate


@dataclass
class IwinDiTVideoPipelineOutput(BaseOutput):
    """What a call returns.

    Attributes:
        frames: B clips: a list of lists of T PIL images, (B, T, H, W, 3) of numpy or (B, T, 3, H, W) of torch, both in
            [0, 1], or latents (B, C, t, h, w).
        fps: Frames per second at which to play them.
    """

    frames: list[list[Image.Image]] | np.ndarray | torch.Tensor
    fps: float


class IwinDiTVideoPipeline(IwinDiTPipelineBase):
    """Sample class-conditional clips.

    The VAE is an image VAE, which then encodes and decodes frame by frame, or a video VAE, whose clips have
    1 + k * its temporal stride frames. Schedulers, callbacks and LoRA are those of `IwinDiTPipeline`.

    Args:
        transformer: The denoiser.
        vae: The autoencoder of its latents. Without one the pipeline returns latents only.
        scheduler: Sampler; its training convention must be the model's.
        id2label: Class names by class index.
        prediction_type: What the model predicts, "flow_prediction" or "epsilon"; None takes the scheduler's word. It is
            saved, so that a scheduler of the other family is noticed later.
        latents_mean: Per-channel mean of the stored latents, for a VAE class whose config has no such field.
        latents_std: Per-channel standard deviation, likewise.
        fps: Frames per second of the training clips, so that samples can be played at their speed.
        frame_stride: The training clips' frames were every so manieth of videos seen at `fps * frame_stride`, so that
            an evaluation can cut real clips alike. None where it is not known, nor whether `fps` is that of training.

    Raises:
        ValueError: If the model is one for images, the VAE has other latent channels than the transformer or gives no
            latents of its size, the statistics do not fit it, `fps` is not above 0, or `frame_stride` is below 1.
    """

    rank = 3
    sample_word = "video"

    def __init__(
        self,
        transformer: IwinDiTTransformer3DModel,
        vae: ModelMixin | None,
        scheduler: SchedulerMixin,
        id2label: dict[int, str] | dict[str, str] | None = None,  # JSON turns the keys into strings
        prediction_type: str | None = None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
        fps: float = 8.0,
        frame_stride: int | None = None,
    ) -> None:
        super().__init__(transformer, vae, scheduler, id2label, prediction_type, latents_mean, latents_std)
        is_whole = isinstance(frame_stride, Integral) and not isinstance(frame_stride, bool)
        if frame_stride is not None and (not is_whole or frame_stride < 1):
            raise ValueError(f"frame_stride must be a whole number of at least 1, or None, got {frame_stride!r}")
        self.register_to_config(fps=checked_rate(fps), frame_stride=frame_stride)
        self.video_processor: VideoProcessor = VideoProcessor()

    def __call__(
        self,
        class_labels: ClassLabels,
        num_frames: int | None = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_channels: int | None = None,
        num_videos_per_label: int = 1,
        fps: float | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> IwinDiTVideoPipelineOutput | tuple[Any]:
        """Sample clips.

        Args:
            class_labels: Class index, class name, or a list of either.
            num_frames: Frames of a clip, T; None means those of the training clips. A number whose latent frames the
                temporal patch size divides; 1 + k * temporal stride with a video VAE. In latent frames for a pipeline
                without VAE.
            height: Frame height in pixels, a multiple of VAE stride * patch_size; None means the training size. In
                latent cells for a pipeline without VAE.
            width: Frame width, likewise.
            num_inference_steps: Scheduler steps. Ignored where `sigmas` are given.
            sigmas: Noise levels from 1 downwards, before the scheduler's shift, in place of even ones.
            guidance_scale: Classifier-free guidance; 1 turns it off and halves the cost. None means
                `default_guidance_scale`: 3, or 1 for a model trained with `class_dropout_prob` 0, which has no other.
            guidance_interval: Noise levels (low, high), 0 = data, 1 = noise, between which to guide.
            guidance_channels: Guide only the first so many latent channels (None: all).
            num_videos_per_label: Clips per entry of `class_labels`, next to each other.
            fps: Frames per second to return beside the frames; changes no frame. None means the training clips'.
            generator: One for the whole batch, or a list with one per clip: then clip i depends on generator i alone.
            latents: (B, C, t, h, w) standard normal noise to start from.
            output_type: "pil" (a list of T images per clip), "np" (B, T, H, W, 3) or "pt" (B, T, 3, H, W), both in
                [0, 1], or "latent" (B, C, t, h, w). None means "pil", and "latent" for a pipeline without VAE.
            return_dict: Whether to return an output object or a tuple.
            attention_kwargs: {"scale": s} scales LoRA layers.
            callback_on_step_end: Called as `callback(pipe, step, timestep, tensors)` after each step; returns a dict,
                in which "latents" replaces the latents.
            callback_on_step_end_tensor_inputs: Names of the tensors given to the callback; "latents" is the only one.

        Returns:
            `.frames` and `.fps`, or a tuple of the frames.

        Raises:
            ValueError: If an argument is out of its range.
            FloatingPointError: If the latents or the decoded pixels are not finite.
        """
        fps = self.config.fps if fps is None else checked_rate(fps)
        frames = self._sample(
            class_labels,
            (num_frames, height, width),
            num_inference_steps,
            sigmas,
            guidance_scale,
            guidance_interval,
            guidance_channels,
            num_videos_per_label,
            generator,
            latents,
            output_type,
            attention_kwargs,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        return IwinDiTVideoPipelineOutput(frames=frames, fps=fps) if return_dict else (frames,)

    def _check_size(self, size: Sequence[int]) -> None:
        super()._check_size(size)
        frames, patch = size[0], self.transformer.patch_size[0]
        if frames < 1:
            raise ValueError(f"num_frames must be at least 1, got {frames}")
        latent_frames = frames if self.codec is None else self.codec.latent_size(size)[0]
        if latent_frames == 1 < patch and self.transformer.config.single_frame == "refuse":
            raise ValueError(
                f"this model takes no single frame: its patches hold {patch} latent frames, and its single_frame is "
                f"'refuse'; got num_frames {frames}, which is one latent frame"
            )
        if latent_frames != 1 and latent_frames % patch:
            raise ValueError(
                f"num_frames must give a number of latent frames that is a multiple of {patch} (patch_size in time), "
                f"got {frames}, which gives {latent_frames}"
            )

    def _to_output(self, latents: torch.Tensor, output_type: str) -> Any:
        # Clip by clip, so that the memory of decoding does not grow with the batch.
        clips = [self.video_processor.postprocess_video(self._decode(one), output_type) for one in latents.split(1)]
        if output_type == "pil":
            return [frames for (frames,) in clips]
        return np.concatenate(clips) if output_type == "np" else torch.cat(clips)
