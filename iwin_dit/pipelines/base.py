"""What image and video pipelines share: labels, guidance, noise, the scheduler's steps, the denoising loop, decoding.

Latent statistics belong to `iwin_dit.data.codec`; steps to the scheduler; public calls and the form of what they return
to image.py and video.py. A *size* is (H, W) or (T, H, W) in pixels and frames; in latent cells where there is no VAE.
Letters: B batch, C latent channels, T frames, H W pixels; in the shape of latents, *S stands for (h, w) or (t, h, w).
"""

import inspect
import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import Any, ClassVar

import numpy as np
import torch
from diffusers import DDPMScheduler, DiffusionPipeline, ModelMixin, SchedulerMixin
from diffusers.callbacks import PipelineCallback
from diffusers.loaders import SanaLoraLoaderMixin
from diffusers.utils import logging
from diffusers.utils.torch_utils import randn_tensor

from ..data.codec import LatentCodec
from ..models.transformer import IwinDiTCore

logger = logging.get_logger(__name__)

ClassLabels = int | str | Sequence[int | str] | torch.Tensor
Generators = torch.Generator | list[torch.Generator] | None
Callback = Callable[[Any, int, torch.Tensor, dict[str, Any]], dict[str, Any]]
OUTPUT_TYPES = ("pil", "np", "pt", "latent")


class IwinDiTPipelineBase(DiffusionPipeline, SanaLoraLoaderMixin):
    """A pipeline for latents of any rank; public classes add a signature, a call, and how pixels are returned.

    Args:
        transformer: The denoiser.
        vae: The autoencoder of its latents, or None.
        scheduler: Sampler; its training convention must be the model's.
        id2label: Class names by class index.
        prediction_type: What the model predicts; None takes the scheduler's word.
        latents_mean: Per-channel mean of the stored latents, for a VAE class whose config has no such field.
        latents_std: Per-channel standard deviation, likewise.

    Raises:
        ValueError: If the model has another rank, or the VAE, its sizes or the statistics do not fit it.
    """

    model_cpu_offload_seq = "transformer->vae"
    _optional_components: ClassVar[list[str]] = ["vae"]
    _callback_tensor_inputs: ClassVar[list[str]] = ["latents"]

    rank: ClassVar[int]
    sample_word: ClassVar[str]  # "image" or "video", as in num_images_per_label

    def __init__(
        self,
        transformer: IwinDiTCore,
        vae: ModelMixin | None,
        scheduler: SchedulerMixin,
        id2label: dict[int, str] | dict[str, str] | None,  # JSON turns the keys into strings
        prediction_type: str | None,
        latents_mean: list[float] | None,
        latents_std: list[float] | None,
    ) -> None:
        super().__init__()
        if transformer.rank != self.rank:
            raise ValueError(
                f"{type(self).__name__} needs an IwinDiTTransformer{self.rank}DModel, got {type(transformer).__name__}"
            )
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler)
        id2label = {int(index): name for index, name in (id2label or {}).items()}
        self.register_to_config(
            id2label=id2label,
            prediction_type=prediction_type or _prediction_type(scheduler),
            latents_mean=latents_mean,
            latents_std=latents_std,
        )
        self.id2label = id2label
        self.label_ids = _index_names(id2label)
        self._codec: LatentCodec | None = None
        self._guidance_scale = 1.0
        self._attention_kwargs: dict[str, Any] | None = None
        self._interrupt, self._current_timestep, self._num_timesteps = False, None, 0
        if self.codec is not None and self.codec.is_video and self.rank == 2:
            raise ValueError(f"expected an image VAE, got {type(vae).__name__}, a video VAE")
        if self.codec is not None and self.codec.latent_channels != transformer.config.in_channels:
            raise ValueError(
                f"the VAE has {self.codec.latent_channels} latent channels, the transformer takes "
                f"{transformer.config.in_channels}"
            )
        try:
            _ = self.default_size
        except ValueError as error:
            raise ValueError(
                f"the VAE decodes no latents of the transformer's sample_size {transformer.latent_size}: {error}"
            ) from error

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> Any:
        """Build from another pipeline's components; diffusers would not recognise the type of an optional VAE.

        Args:
            pipeline: Gives its components.
            kwargs: Components to use instead.

        Returns:
            The new pipeline.
        """
        return super().from_pipe(pipeline, **{"vae": pipeline.vae, **kwargs})

    @property
    def codec(self) -> LatentCodec | None:
        """Codec of the VAE that the pipeline has now; None without one."""
        if self.vae is None:
            return None
        if self._codec is None or self._codec.vae is not self.vae:
            self._codec = LatentCodec(self.vae, self.config.latents_mean, self.config.latents_std)
        return self._codec

    @property
    def default_guidance_scale(self) -> float:
        """Guidance scale of a call that gives none: 3, or 1 for a model whose null class was never trained."""
        return 3.0 if self.transformer.config.class_dropout_prob > 0 else 1.0

    @property
    def guidance_scale(self) -> float:
        """Guidance scale of the running call."""
        return self._guidance_scale

    @property
    def do_classifier_free_guidance(self) -> bool:
        """Whether the running call guides at all."""
        return self._guidance_scale > 1.0

    @property
    def attention_kwargs(self) -> dict[str, Any] | None:
        """Attention keyword arguments of the running call."""
        return self._attention_kwargs

    @property
    def num_timesteps(self) -> int:
        """Number of scheduler steps of the running call."""
        return self._num_timesteps

    @property
    def current_timestep(self) -> torch.Tensor | None:
        """Timestep of the running step, None between calls."""
        return self._current_timestep

    @property
    def interrupt(self) -> bool:
        """Set `pipe._interrupt = True` in a callback to stop after the step."""
        return self._interrupt

    def get_label_ids(self, class_labels: ClassLabels) -> list[int]:
        """Turn class names and indices into indices.

        Args:
            class_labels: An index, a name, a list of either (mixed is fine), or an integer tensor. A name is a whole
                entry of `id2label` or one of its comma-separated synonyms.

        Returns:
            Class indices.

        Raises:
            ValueError: If an index is out of range, or a name is unknown or stands for several classes.
        """
        if isinstance(class_labels, torch.Tensor):
            class_labels = class_labels.tolist()
        labels = [class_labels] if isinstance(class_labels, Integral | str) else class_labels
        if not isinstance(labels, Iterable) or not all(isinstance(label, Integral | str) for label in labels):
            raise ValueError(
                f"class_labels must be a class index, a class name or a list of them, got {class_labels!r}"
            )
        num_classes = self.transformer.config.num_classes
        indices: list[int] = []
        for label in labels:
            found = self.label_ids.get(label, []) if isinstance(label, str) else [int(label)]
            if len(found) > 1:
                raise ValueError(f"class name {label!r} stands for classes {found}: give the index")
            if not found:
                known = ", ".join(map(repr, list(self.id2label.values())[:10])) or "none: this model has no class names"
                raise ValueError(f"unknown class name {label!r}; the model's names begin with: {known}")
            if not 0 <= found[0] < num_classes:
                raise ValueError(f"class labels must be in [0, {num_classes - 1}], got {found[0]}")
            indices += found
        if not indices:
            raise ValueError("class_labels is empty: give at least one class")
        return indices

    def check_inputs(
        self,
        size: Sequence[int],
        num_inference_steps: int,
        sigmas: Sequence[float] | None,
        guidance_scale: float,
        guidance_interval: tuple[float, float],
        guidance_channels: int | None,
        num_per_label: int,
        output_type: str,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> None:
        """Refuse what cannot work, before any work.

        Args:
            size: (H, W) or (T, H, W) in pixels and frames (latent cells for a pipeline without VAE).
            num_inference_steps: At least 1.
            sigmas: None, or noise levels in (0, 1], falling, for a flow-matching model.
            guidance_scale: At least 1, and finite; 1 for a model whose null class was never trained.
            guidance_interval: Noise levels, low before high, in [0, 1].
            guidance_channels: None or 1 to the model's channels.
            num_per_label: At least 1.
            output_type: One of "pil", "np", "pt", "latent".
            callback_on_step_end_tensor_inputs: Names among `_callback_tensor_inputs`.

        Raises:
            ValueError: If an argument is out of its range; the message says which, what was expected and given.
        """
        counts = {"num_inference_steps": num_inference_steps, f"num_{self.sample_word}s_per_label": num_per_label}
        sizes = zip(("num_frames", "height", "width")[-self.rank :], size, strict=True)
        for name, value in (*sizes, *counts.items()):
            if not isinstance(value, Integral) or isinstance(value, bool):
                raise ValueError(f"{name} must be a whole number, got {value!r}")
        self._check_size(size)
        for name, value in counts.items():
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if sigmas is not None:
            levels = [*sigmas, 0.0]
            if len(levels) < 2 or levels[0] > 1 or any(a <= b for a, b in itertools.pairwise(levels)):
                raise ValueError(f"sigmas must be noise levels that fall from at most 1 and stay above 0, got {sigmas}")
        self._check_scheduler()
        if not 1.0 <= guidance_scale < math.inf:  # NaN compares with nothing
            wanted = "finite" if guidance_scale == math.inf else "at least 1, and 1 turns guidance off"
            raise ValueError(f"guidance_scale must be {wanted}, got {guidance_scale}")
        if guidance_scale > 1.0 and self.transformer.config.class_dropout_prob == 0:
            raise ValueError(
                "guidance_scale must be 1 for this model, which was trained with class_dropout_prob 0: its null class, "
                f"which guidance needs, was never trained; got {guidance_scale}"
            )
        low, high = guidance_interval
        if not 0.0 <= low <= high <= 1.0:
            raise ValueError(f"guidance_interval must be (low, high) noise levels in [0, 1], got {guidance_interval}")
        channels = self.transformer.config.in_channels
        if guidance_channels is not None and not 1 <= guidance_channels <= channels:
            raise ValueError(f"guidance_channels must be None (all) or 1 to {channels}, got {guidance_channels}")
        if output_type not in OUTPUT_TYPES:
            raise ValueError(f"output_type must be one of {OUTPUT_TYPES}, got {output_type!r}")
        if self.codec is None and output_type != "latent":
            raise ValueError(
                f"this pipeline has no VAE, so output_type must be 'latent', got {output_type!r}: load it with "
                f"from_pretrained(..., vae=...) to get {self.sample_word}s"
            )
        unknown = [name for name in callback_on_step_end_tensor_inputs if name not in self._callback_tensor_inputs]
        if unknown:
            raise ValueError(
                f"callback_on_step_end_tensor_inputs must be among {self._callback_tensor_inputs}, got {unknown}"
            )

    def call_settings(self, **given: Any) -> dict[str, Any]:
        """Settle arguments of a call beforehand, so that what is recorded is what will run, and refuse what cannot.

        Args:
            given: Arguments of the sampler, sizes and `fps`, by their names in the call; None takes the default.

        Returns:
            The same names, each with its value.

        Raises:
            ValueError: As by `check_inputs`, or for an `fps` that is not above 0.
        """
        sizes = ("num_frames", "height", "width")[-self.rank :]
        defaults = {name: parameter.default for name, parameter in inspect.signature(self.__call__).parameters.items()}
        defaults |= {"guidance_scale": self.default_guidance_scale, "fps": self.config.get("fps")}
        defaults |= zip(sizes, self.default_size, strict=True)
        settings = {name: defaults[name] if value is None else value for name, value in given.items()}
        full = {**defaults, **settings}
        self.check_inputs(
            [full[name] for name in sizes],
            full["num_inference_steps"],
            full["sigmas"],
            full["guidance_scale"],
            full["guidance_interval"],
            full["guidance_channels"],
            num_per_label=1,
            output_type="latent",
            callback_on_step_end_tensor_inputs=(),
        )
        if "fps" in settings:
            checked_rate(settings["fps"])
        return settings

    def _check_size(self, size: Sequence[int]) -> None:
        for name, value, patch in zip(("height", "width"), size[-2:], self.transformer.patch_size[-2:], strict=True):
            multiple = self.stride * patch
            if value < 1 or value % multiple:
                raise ValueError(
                    f"{name} must be a positive multiple of {multiple} (VAE stride {self.stride} * patch_size "
                    f"{patch}), got {value}"
                )

    def _check_scheduler(self) -> None:
        trained, sampled = self.config.prediction_type, _prediction_type(self.scheduler)
        if sampled != trained:
            name = type(self.scheduler).__name__
            recipe = 'prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=config.shift'
            hint = f": build it with {name}.from_config(config, {recipe})" if trained == "flow_prediction" else ""
            raise ValueError(f"the model predicts {trained!r}, but {name} is set up for {sampled!r}{hint}")

    @property
    def stride(self) -> int:
        """Pixels per latent cell in height and width; 1 without VAE, where sizes count latent cells."""
        return 1 if self.codec is None else self.codec.stride

    @property
    def default_size(self) -> tuple[int, ...]:
        """Size of the training samples: (H, W) or (T, H, W), in pixels and frames (latent cells without VAE)."""
        latent_size = self.transformer.latent_size
        return latent_size if self.codec is None else self.codec.pixel_size(latent_size)

    def prepare_latents(
        self,
        batch_size: int,
        size: Sequence[int],
        generator: Generators,
        latents: torch.Tensor | None,
    ) -> torch.Tensor:
        """Draw the initial noise, or check the one given. Always float32: the loop accumulates in it.

        Args:
            batch_size: B.
            size: (H, W) or (T, H, W), one that `check_inputs` accepts.
            generator: One for the batch, or one per sample, on which alone that sample then depends.
            latents: (B, C, *S) standard normal noise to start from, or None.

        Returns:
            (B, C, *S) noise at the scheduler's first level, float32.

        Raises:
            ValueError: If there are not as many generators as samples, or `latents` has another shape.
        """
        latent_size = tuple(size) if self.codec is None else self.codec.latent_size(size)
        shape = (batch_size, self.transformer.config.in_channels, *latent_size)
        generator = list(generator) if isinstance(generator, tuple) else generator
        if isinstance(generator, list) and len(generator) != batch_size:
            raise ValueError(f"expected one generator per {self.sample_word} ({batch_size}), got {len(generator)}")
        if latents is None:
            latents = randn_tensor(shape, generator=generator, device=self._execution_device, dtype=torch.float32)
        elif tuple(latents.shape) != shape:
            raise ValueError(f"latents must have shape {shape}, got {tuple(latents.shape)}")
        latents = latents.to(self._execution_device, torch.float32)
        return latents * getattr(
            self.scheduler, "init_noise_sigma", 1.0
        )  # flow matching has none: its first level is 1

    def set_timesteps(self, num_inference_steps: int, sigmas: Sequence[float] | None) -> torch.Tensor:
        """Set the scheduler's steps.

        FlowMatchEuler left to itself applies its shift twice to the last steps, so it is always given its sigmas.
        FlowMatchHeun does the same but takes none: its last steps are crowded where the shift is not 1.

        Args:
            num_inference_steps: Number of steps.
            sigmas: Noise levels before the scheduler's shift, or None for even ones.

        Returns:
            Timesteps, as the scheduler counts them.

        Raises:
            ValueError: If `sigmas` are given and the scheduler takes none.
        """
        set_timesteps = self.scheduler.set_timesteps
        takes_sigmas = "sigmas" in inspect.signature(set_timesteps).parameters
        if sigmas is not None and not (takes_sigmas and self.config.prediction_type == "flow_prediction"):
            raise ValueError(f"{type(self.scheduler).__name__} takes no custom sigmas in [0, 1]")
        if sigmas is None and takes_sigmas and hasattr(self.scheduler, "scale_noise"):  # FlowMatchEuler and its kin
            sigmas = np.linspace(1.0, 0.0, num_inference_steps + 1)[:-1].tolist()
        if sigmas is None:
            set_timesteps(num_inference_steps, device=self._execution_device)
        else:
            set_timesteps(sigmas=np.asarray(sigmas, dtype=np.float32), device=self._execution_device)
        if hasattr(self.scheduler, "set_begin_index"):
            self.scheduler.set_begin_index(0)  # rounded timesteps can repeat, and the first step must be the first
        return self.scheduler.timesteps

    def predict(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        class_labels: torch.Tensor,
        guidance_scale: float = 1.0,
        guidance_interval: tuple[float, float] = (0.0, 1.0),
        guidance_channels: int | None = None,
    ) -> torch.Tensor:
        """Predict with classifier-free guidance (arXiv 2207.12598): uncond + scale * (cond - uncond).

        Outside the interval (arXiv 2404.07724) the unconditional half is not computed at all.

        Args:
            latents: (B, C, *S), scaled as the scheduler wants its model input.
            timestep: Scalar in [0, 1000]; the noise level of the interval is a thousandth of it.
            class_labels: (B,) integers.
            guidance_scale: 1 turns guidance off.
            guidance_interval: Noise levels (low, high), both included, between which to guide.
            guidance_channels: Guide only the first so many channels and keep the conditional prediction in the others,
                as published LightningDiT and FlashDiT numbers were made; None guides all.

        Returns:
            (B, C_out, *S) in float32. A learned variance, channels C and up, is the conditional one.
        """
        model_input = latents.to(self.transformer.dtype)
        low, high = guidance_interval
        guided = guidance_scale > 1.0 and low <= float(timestep) / 1000.0 <= high
        if guided:
            null = torch.full_like(class_labels, self.transformer.null_class)
            model_input, class_labels = torch.cat([model_input] * 2), torch.cat([class_labels, null])
        output = self.transformer(
            model_input, timestep, class_labels, attention_kwargs=self._attention_kwargs, return_dict=False
        )[0].float()
        if not guided:
            return output
        cond, uncond = output.chunk(2)
        channels = guidance_channels or latents.shape[1]
        guided_part = uncond[:, :channels] + guidance_scale * (cond[:, :channels] - uncond[:, :channels])
        return torch.cat([guided_part, cond[:, channels:]], dim=1)

    @torch.no_grad()
    def _sample(
        self,
        class_labels: ClassLabels,
        size: Sequence[int | None],
        num_inference_steps: int,
        sigmas: Sequence[float] | None,
        guidance_scale: float | None,
        guidance_interval: tuple[float, float],
        guidance_channels: int | None,
        num_per_label: int,
        generator: Generators,
        latents: torch.Tensor | None,
        output_type: str | None,
        attention_kwargs: dict[str, Any] | None,
        callback_on_step_end: Callback | None,
        callback_on_step_end_tensor_inputs: Sequence[str],
    ) -> Any:
        """Do what a public call does; arguments as there, `size` being theirs by axis."""
        # 1. Arguments
        output_type = output_type or self._default_output_type()
        guidance_scale = self.default_guidance_scale if guidance_scale is None else guidance_scale
        full_size = [default if n is None else n for n, default in zip(size, self.default_size, strict=True)]
        if isinstance(callback_on_step_end, PipelineCallback):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        self.check_inputs(
            full_size,
            num_inference_steps,
            sigmas,
            guidance_scale,
            guidance_interval,
            guidance_channels,
            num_per_label,
            output_type,
            callback_on_step_end_tensor_inputs,
        )
        indices = [i for i in self.get_label_ids(class_labels) for _ in range(num_per_label)]
        self._guidance_scale, self._attention_kwargs = guidance_scale, attention_kwargs
        self._interrupt = False

        # 2. Labels, noise, steps
        labels = torch.tensor(indices, device=self._execution_device)
        timesteps = self.set_timesteps(num_inference_steps, sigmas)
        latents = self.prepare_latents(len(indices), full_size, generator, latents)
        self._num_timesteps = len(timesteps)
        step_kwargs = {"generator": generator} if "generator" in _parameters(self.scheduler.step) else {}

        # 3. Denoise
        with self.progress_bar(total=len(timesteps)) as progress_bar:
            for i, timestep in enumerate(timesteps):
                if self.interrupt:
                    continue
                self._current_timestep = timestep
                model_input = latents
                if hasattr(self.scheduler, "scale_model_input"):
                    model_input = self.scheduler.scale_model_input(latents, timestep)
                # Read from the pipeline, so that a callback may change the scale between steps.
                prediction = self.predict(
                    model_input, timestep, labels, self.guidance_scale, guidance_interval, guidance_channels
                )
                prediction = self._match_scheduler(prediction, latents.shape[1])
                latents = self.scheduler.step(prediction, timestep, latents, return_dict=False, **step_kwargs)[0]
                if callback_on_step_end is not None:
                    tensors = dict.fromkeys(callback_on_step_end_tensor_inputs, latents)
                    latents = callback_on_step_end(self, i, timestep, tensors).pop("latents", latents)
                progress_bar.update()
        self._current_timestep = None

        # 4. Decode
        samples = self._finish(latents, output_type)
        self.maybe_free_model_hooks()
        return samples

    def _default_output_type(self) -> str:
        if self.codec is not None:
            return "pil"
        logger.warning(
            f"This pipeline has no VAE: returning latents. Load it with from_pretrained(..., vae=...) for "
            f"{self.sample_word}s."
        )
        return "latent"

    def _match_scheduler(self, prediction: torch.Tensor, channels: int) -> torch.Tensor:
        """Keep a learned variance, (B, 2C, *S), only for DDPM: no other scheduler of diffusers uses one."""
        if isinstance(self.scheduler, DDPMScheduler) and self.scheduler.config.variance_type.startswith("learned"):
            return prediction
        return prediction[:, :channels]

    def _finish(self, latents: torch.Tensor, output_type: str) -> Any:
        if not torch.isfinite(latents).all():
            raise FloatingPointError(
                "the latents are not finite: the model diverged in training, or overflows in "
                f"{self.transformer.dtype}; try float32"
            )
        if output_type == "latent":
            return latents
        return self._to_output(latents, output_type)

    def _to_output(self, latents: torch.Tensor, output_type: str) -> Any:
        """Decode finite latents to what a call returns for "pil", "np" or "pt"."""
        raise NotImplementedError

    def _decode(self, latents: torch.Tensor) -> torch.Tensor:
        """Finite latents, (B, C, *S), to pixels in about [-1, 1], (B, 3, *size)."""
        codec = self.codec
        assert codec is not None, "check_inputs lets a pipeline without VAE return latents alone"
        pixels = codec.decode(latents)
        if not torch.isfinite(pixels).all():
            raise FloatingPointError(
                f"the VAE gave pixels that are not finite from finite latents: it overflows in {codec.vae.dtype}; "
                "load it in float32"
            )
        return pixels


def checked_rate(fps: float) -> float:
    """Check a number of frames per second.

    Args:
        fps: The number.

    Returns:
        The same as float.

    Raises:
        ValueError: If it is not above 0 and finite.
    """
    if not isinstance(fps, Real) or isinstance(fps, bool) or not 0.0 < fps < math.inf:  # NaN compares with nothing
        raise ValueError(f"fps must be a number above 0 and finite, got {fps!r}")
    return float(fps)


def _prediction_type(scheduler: SchedulerMixin) -> str:
    """What a scheduler takes a model's output for; flow matching only where its noise levels are those too."""
    if type(scheduler).__name__.startswith("FlowMatch"):
        return "flow_prediction"
    prediction_type = scheduler.config.get("prediction_type", "epsilon")
    if prediction_type == "flow_prediction" and not scheduler.config.get("use_flow_sigmas"):
        return "flow_prediction without use_flow_sigmas"
    return prediction_type


def _parameters(function: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(function).parameters)


def _index_names(id2label: dict[int, str]) -> dict[str, list[int]]:
    """Class indices by name: the whole entry, and each of its comma-separated synonyms."""
    indices: dict[str, list[int]] = {}
    for index, entry in id2label.items():
        for name in {entry, *(synonym.strip() for synonym in entry.split(","))}:
            indices.setdefault(name, []).append(index)
    return indices
