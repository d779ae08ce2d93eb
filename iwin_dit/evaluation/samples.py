"""A pipeline as a set of images that are sampled when they are read: image i depends on its index and the seed alone.

Owns labels, noise, sampler settings and rounding of the samples that are scored, and the record of them; for a video
pipeline an image is a clip. Must not know metrics, or where images and results are kept.

Letters: B batch, T frames, H W image axes.
"""

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import diffusers
import numpy as np
import torch
from diffusers import SchedulerMixin
from diffusers.utils.torch_utils import is_compiled_module
from torch import Tensor

from ..pipelines import IwinDiTPipeline, IwinDiTVideoPipeline

Pipeline = IwinDiTPipeline | IwinDiTVideoPipeline
Labels = Literal["balanced", "random"]

# Names for --scheduler, which are diffusers' without "Scheduler", by what the model was trained to predict. DEIS is
# not among them: with the flow sigmas of diffusers its last step changes nothing, and noise of 1 / steps remains.
SCHEDULERS: Mapping[str, tuple[str, ...]] = {
    "flow_prediction": ("FlowMatchEulerDiscrete", "FlowMatchHeunDiscrete", "DPMSolverMultistep", "UniPCMultistep"),
    "epsilon": ("DDPM", "DDIM", "EulerDiscrete", "DPMSolverMultistep", "UniPCMultistep"),
}


# Images of one seed at most, and seeds: torch's generator on the CPU tells 32 bits apart and no more.
MAX_COUNT, MAX_SEED = 2**20, 2**12


@dataclass(frozen=True)
class Sampling:
    """How to sample; None takes the pipeline's own value.

    Attributes:
        steps: Scheduler steps.
        guidance: Scale of classifier-free guidance, at least 1, which turns it off.
        guidance_interval: Noise levels (low, high) between which to guide.
        guidance_channels: Guide only the first so many latent channels.
        scheduler: A name of `SCHEDULERS`.
        labels: "balanced": image i has class i mod the number of classes; "random": a class drawn by (seed, i), as
            DiT's published samples had.
        seed: In [0, 4096); the noise of image i comes from `generator_seed(seed, i)`.
        frames: Of a clip; only for a video pipeline.

    Raises:
        ValueError: If `labels` is another word, or the seed or the number of frames is out of range.
    """

    steps: int | None = None
    guidance: float | None = None
    guidance_interval: tuple[float, float] | None = None
    guidance_channels: int | None = None
    scheduler: str | None = None
    labels: Labels = "balanced"
    seed: int = 0
    frames: int | None = None

    def __post_init__(self) -> None:
        if self.labels not in get_args(Labels):
            raise ValueError(f"labels must be one of {', '.join(get_args(Labels))}, got {self.labels!r}")
        if not 0 <= self.seed < MAX_SEED:
            raise ValueError(f"the seed must be at least 0 and less than {MAX_SEED}, got {self.seed}")
        if self.frames is not None and self.frames < 1:
            raise ValueError(f"a clip must have at least 1 frame, got {self.frames}")


class SampledImages:
    """Images or clips of a pipeline, an `ImageSet`; it keeps its own scheduler, its progress bar is switched off.

    Args:
        pipe: Samples the images, on the device and in the precision that it has; settings stay as they are now.
        count: Number of images, at most `MAX_COUNT`.
        sampling: How.
        about: JSON that identifies the pipeline's weights, as `pipelines.loading.identify` gives it.

    Attributes:
        name: The settings that a number must not be without.
        prefetch: False: sampling is the work of the device that also measures the images.
        settings: Arguments of the pipeline's call, its own defaults as values.
        image_size: Height and width in pixels.
        frames: T; None of images.
        fps: Frames per second of the clips that the model was trained on; None of images.

    Raises:
        ValueError: If the pipeline makes no images, the scheduler does not fit the model or the steps, or a setting is
            out of range or for clips alone.
    """

    prefetch = False

    def __init__(self, pipe: Pipeline, count: int, sampling: Sampling, about: Mapping[str, Any]) -> None:
        if pipe.codec is None:
            raise ValueError("the pipeline has no VAE, so there are latents but no images to score: add a VAE to it")
        if count > MAX_COUNT:
            raise ValueError(f"expected at most {MAX_COUNT} images, which have noise of their own, got {count}")
        self.pipe, self.count, self.sampling, self.about = pipe, count, sampling, dict(about)
        self.num_classes: int = pipe.transformer.config.num_classes
        given: dict[str, Any] = {
            "num_inference_steps": sampling.steps,
            "guidance_scale": sampling.guidance,
            "guidance_interval": sampling.guidance_interval,
            "guidance_channels": sampling.guidance_channels,
        }
        if isinstance(pipe, IwinDiTVideoPipeline):
            given["num_frames"] = sampling.frames
        elif sampling.frames is not None:
            raise ValueError(f"frames are for video pipelines alone, got {sampling.frames} for {type(pipe).__name__}")
        self.image_size = list(pipe.default_size[-2:])
        self.fps: float | None = pipe.config.get("fps")
        self.scheduler = build_scheduler(pipe, sampling.scheduler)
        self._vae = {"class": type(pipe.vae).__name__, "sha256": pipe.codec.fingerprint()}  # of the weights in `dtype`
        pipe.set_progress_bar_config(disable=True)
        with self._scheduler_in_use():
            self.settings = pipe.call_settings(**given)
            self._timesteps = pipe.set_timesteps(self.settings["num_inference_steps"], None).tolist()
        self.frames: int | None = self.settings.pop("num_frames", None)
        sigmas = getattr(self.scheduler, "sigmas", None)  # DDPM and DDIM have none
        self._sigmas = None if sigmas is None else sigmas.tolist()
        self.name = describe(self.request())

    def __len__(self) -> int:
        return self.count

    def read(self, indices: Sequence[int]) -> Tensor:
        """Sample some of the images.

        Args:
            indices: Which ones, B of them.

        Returns:
            `(B, 3, H, W)` uint8 on the pipeline's device, clips `(B, T, 3, H, W)`.

        Raises:
            FloatingPointError: If the latents or pixels of one are not finite.
        """
        # Noise from the CPU, so that every device starts from the same.
        generators = [torch.Generator().manual_seed(generator_seed(self.sampling.seed, i)) for i in indices]
        arguments = {**self.settings, "generator": generators, "output_type": "pt", "return_dict": False}
        if self.frames is not None:
            arguments["num_frames"] = self.frames
        with self._scheduler_in_use():
            (images,) = self.pipe(self.labels(indices), **arguments)
        return to_uint8(images)

    def labels(self, indices: Sequence[int]) -> list[int]:
        """Classes of some of the images.

        Args:
            indices: Which ones.

        Returns:
            A class each.
        """
        if self.sampling.labels == "balanced":
            return [i % self.num_classes for i in indices]
        return [random_label(self.sampling.seed, i, self.num_classes) for i in indices]

    def request(self) -> dict[str, Any]:
        """Everything that decides the pixels of image i, ready for JSON: equal requests give equal images."""
        rules = {
            "balanced": f"balanced: i mod {self.num_classes}",
            "random": f"random: floor({self.num_classes} u), u the first number of Philox4x64 keyed by (seed, i)",
        }
        config = json.loads(self.scheduler.to_json_string(), parse_constant=str)  # some hold -Infinity, no JSON
        model = json.loads(self.pipe.transformer.to_json_string())  # weights alone do not say how they are used
        request = {
            **{key: value for key, value in self.about.items() if key != "path"},
            "image_size": self.image_size,
            **({} if self.frames is None else {"frames": self.frames, "fps": self.fps}),
            "transformer": {key: value for key, value in model.items() if not key.startswith("_")},
            "dtype": str(self.pipe.transformer.dtype).removeprefix("torch."),
            **({"compiled": True} if is_compiled(self.pipe.transformer) else {}),
            "vae": self._vae,
            "labels": rules[self.sampling.labels],
            "seed": self.sampling.seed,
            "noise": f"torch.Generator on the CPU, seed * {MAX_COUNT} + i",
            "rounding": "round(255 x)",
            **self.settings,
            "scheduler": {"class": type(self.scheduler).__name__, "config": config},
        }
        plain: dict[str, Any] = json.loads(json.dumps(request))  # tuples as JSON has them, so that requests compare
        return plain

    def record(self) -> dict[str, Any]:
        """What the JSON of a result says of the images: the request, and what follows from it."""
        return {
            **self.about,
            **self.request(),
            "seeds": [generator_seed(self.sampling.seed, i) for i in (0, self.count - 1)],
            "timesteps": self._timesteps,
            "sigmas": self._sigmas,
        }

    @contextlib.contextmanager
    def _scheduler_in_use(self) -> Iterator[None]:
        """Lend the pipeline this set's scheduler: several sets may share one pipeline."""
        own, self.pipe.scheduler = self.pipe.scheduler, self.scheduler
        try:
            yield
        finally:
            self.pipe.scheduler = own


def describe(request: Mapping[str, Any]) -> str:
    """Say the settings that a number must not be without.

    Args:
        request: `SampledImages.request`, or what was read of one.

    Returns:
        As "guidance 1.5, 250 steps, DDIM".

    Raises:
        KeyError: It is no such request; a TypeError or ValueError likewise.
    """
    scale, (low, high), channels = (request[f"guidance_{name}"] for name in ("scale", "interval", "channels"))
    words = [f"guidance {scale:g}"]
    if scale > 1 and (low, high) != (0, 1):
        words[0] += f" in [{low:g}, {high:g}]"
    if scale > 1 and channels is not None:
        words[0] += f" on {channels} channels"
    words += [f"{request['num_inference_steps']} steps", request["scheduler"]["class"].removesuffix("Scheduler")]
    words += ["random labels"] * request["labels"].startswith("random")
    words += ["raw weights"] * (request.get("weights") == "raw")
    words += ["compiled"] * request.get("compiled", False)
    return ", ".join(words)


def is_compiled(module: torch.nn.Module) -> bool:
    """Whether a module or a part of it runs compiled."""
    return is_compiled_module(module) or any(part._compiled_call_impl is not None for part in module.modules())


def generator_seed(seed: int, index: int) -> int:
    """Seed of the generator that an image's noise comes from: no two sets of images have one in common.

    Args:
        seed: Of the set of images.
        index: Of the image.

    Returns:
        `seed * MAX_COUNT + index`; of seed 0 the index, as `sample.py --seeds` takes it.
    """
    return seed * MAX_COUNT + index


def build_scheduler(pipe: Pipeline, name: str | None) -> SchedulerMixin:
    """Build a scheduler by name, set up for the pipeline's model.

    Args:
        pipe: Has a scheduler, whose configuration is kept, and the prediction type.
        name: A name of `SCHEDULERS`, or None.

    Returns:
        A new scheduler; for None a copy of the pipeline's own.

    Raises:
        ValueError: If the name is unknown, or the scheduler is made for another kind of model.
    """
    config, trained = pipe.scheduler.config, pipe.config.prediction_type
    if name is None:
        return type(pipe.scheduler).from_config(config)
    fitting = SCHEDULERS.get(trained, ())
    if name not in fitting:
        raise ValueError(f"the model predicts {trained!r}: expected a scheduler of {', '.join(fitting)}, got {name!r}")
    scheduler = getattr(diffusers, f"{name}Scheduler")
    if trained != "flow_prediction":
        return scheduler.from_config(config)
    # The two families of diffusers word one thing, the shift of the noise levels, in two ways.
    shift = config.get("shift", config.get("flow_shift", 1.0))
    only_one_has = ("shift", "flow_shift", "use_flow_sigmas", "prediction_type")
    config = {key: value for key, value in config.items() if key not in only_one_has}
    if name.startswith("FlowMatch"):
        return scheduler.from_config(config, shift=shift)
    return scheduler.from_config(config, prediction_type=trained, use_flow_sigmas=True, flow_shift=shift)


def random_label(seed: int, index: int, num_classes: int) -> int:
    """Draw the class of an image from a counter-based generator, whose raw stream numpy promises for good.

    Args:
        seed: Of the set of images, in [0, 2**64).
        index: Of the image.
        num_classes: How many classes there are.

    Returns:
        A class, uniform but for a bias of less than `num_classes` in 2**64.
    """
    raw = np.random.Philox(key=np.array([seed, index], dtype=np.uint64)).random_raw()
    return int(raw) * num_classes >> 64


def to_uint8(images: Tensor) -> Tensor:
    """Round images as saving them to PNG would.

    Args:
        images: `(B, 3, H, W)` floating point in [0, 1], or clips `(B, T, 3, H, W)`.

    Returns:
        The same shape, uint8.

    Raises:
        FloatingPointError: If a value is not finite, which uint8 would turn into a plausible grey.
    """
    if not images.isfinite().all():
        raise FloatingPointError("the pipeline gave NaN or infinite pixels; a distance between them means nothing")
    return (images.float() * 255).round().clamp(0, 255).to(torch.uint8)
