"""`IwinDiTPipeline`: class-conditional images from an Iwin DiT, as a diffusers pipeline like any other.

Owns the public call for images, and what it returns; all else is in base.py.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.image_processor import VaeImageProcessor

from ..models import IwinDiTTransformer2DModel
from .base import ClassLabels, IwinDiTPipelineBase


class IwinDiTPipeline(IwinDiTPipelineBase):
    """Sample class-conditional images.

    A model trained with `diffusion.FlowMatching` works with FlowMatchEuler and FlowMatchHeun, and with
    DPMSolverMultistep and UniPC after `from_config(config, prediction_type="flow_prediction", use_flow_sigmas=True,
    flow_shift=config.shift)`; one trained with `diffusion.DDPM` works with DDPM, DDIM, Euler,
    DPMSolverMultistep and UniPC. A scheduler of the other family is an error.

    LoRA loading is Sana's mixin: it serves any pipeline whose only adapted module is called `transformer`.

    Args:
        transformer: The denoiser.
        vae: The autoencoder of its latents. Without one the pipeline returns latents only.
        scheduler: Sampler; its training convention must be the model's.
        id2label: Class names by class index.
        prediction_type: What the model predicts, "flow_prediction" or "epsilon"; None takes the scheduler's word. It is
            saved, so that a scheduler of the other family is noticed later.
        latents_mean: Per-channel mean of the stored latents, for a VAE class whose config has no such field.
        latents_std: Per-channel standard deviation, likewise.

    Raises:
        ValueError: If the model or the VAE is one for videos, the VAE has other latent channels than the transformer,
            or the statistics do not fit it.
    """

    rank = 2
    sample_word = "image"

    def __init__(
        self,
        transformer: IwinDiTTransformer2DModel,
        vae: ModelMixin | None,
        scheduler: SchedulerMixin,
        id2label: dict[int, str] | dict[str, str] | None = None,  # JSON turns the keys into strings
        prediction_type: str | None = None,
        latents_mean: list[float] | None = None,
        latents_std: list[float] | None = None,
    ) -> None:
        super().__init__(transformer, vae, scheduler, id2label, prediction_type, latents_mean, latents_std)
        self.image_processor = VaeImageProcessor()

    def __call__(
        self,
        class_labels: ClassLabels,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 50,
        sigmas: Sequence[float] | None = None,
        guidance_scale: float | None = None,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_channels: int | None = None,
        num_images_per_label: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: torch.Tensor | None = None,
        output_type: str | None = None,
        return_dict: bool = True,
        attention_kwargs: dict[str, Any] | None = None,
        callback_on_step_end: Callable[[Any, int, torch.Tensor, dict[str, Any]], dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Sample images.

        Args:
            class_labels: Class index, class name, or a list of either.
            height: Image height in pixels, a multiple of VAE stride * patch_size; None means the training size. In
                latent cells for a pipeline without VAE.
            width: Image width, likewise.
            num_inference_steps: Scheduler steps. Ignored where `sigmas` are given.
            sigmas: Noise levels from 1 downwards, before the scheduler's shift, in place of even ones.
            guidance_scale: Classifier-free guidance; 1 turns it off and halves the cost. None means
                `default_guidance_scale`: 3, or 1 for a model trained with `class_dropout_prob` 0, which has no other.
            guidance_interval: Noise levels (low, high), 0 = data, 1 = noise, between which to guide.
            guidance_channels: Guide only the first so many latent channels (None: all); for parity with published
                LightningDiT and FlashDiT numbers.
            num_images_per_label: Images per entry of `class_labels`, next to each other.
            generator: One for the whole batch, or a list with one per image: then image i depends on generator i alone.
            latents: (B, C, h, w) standard normal noise to start from.
            output_type: "pil", "np" (B, H, W, 3) or "pt" (B, 3, H, W), both in [0, 1], or "latent" (B, C, h, w). None
                means "pil", and "latent" for a pipeline without VAE.
            return_dict: Whether to return an output object or a tuple.
            attention_kwargs: {"scale": s} scales LoRA layers.
            callback_on_step_end: Called as `callback(pipe, step, timestep, tensors)` after each step; returns a dict,
                in which "latents" replaces the latents.
            callback_on_step_end_tensor_inputs: Names of the tensors given to the callback; "latents" is the only one.

        Returns:
            `.images`, or a tuple of it.

        Raises:
            ValueError: If an argument is out of its range.
            FloatingPointError: If the latents or the decoded pixels are not finite.
        """
        images = self._sample(
            class_labels,
            (height, width),
            num_inference_steps,
            sigmas,
            guidance_scale,
            guidance_interval,
            guidance_channels,
            num_images_per_label,
            generator,
            latents,
            output_type,
            attention_kwargs,
            callback_on_step_end,
            callback_on_step_end_tensor_inputs,
        )
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _to_output(self, latents: torch.Tensor, output_type: str) -> Any:
        return self.image_processor.postprocess(self._decode(latents), output_type=output_type)
