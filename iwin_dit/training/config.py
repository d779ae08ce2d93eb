"""The training configuration: dataclasses, filled from defaults, a YAML file and the command line, in that order.

The model section is the signature of the model itself, so that no size is declared twice; the modality, which is found
before anything else, says of which. Every key is checked; an unknown one is an error that lists the valid ones.
"""

import argparse
import contextlib
import dataclasses
import difflib
import math
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn, get_origin

import yaml
from jsonargparse import ArgumentParser
from torch._inductor import config as inductor

from ..data.clips import ClipSettings
from ..diffusion import DDPM, FlowMatching, Objective
from ..evaluation.samples import MAX_COUNT, MAX_SEED
from ..evaluation.suite import METRICS, check_metrics, needs_reference, of_clips
from ..models.transformer import IwinDiTCore, IwinDiTTransformer2DModel, IwinDiTTransformer3DModel

Modality = Literal["image", "video"]
InitClasses = Literal["keep", "fresh"]
MODELS: dict[str, type[IwinDiTCore]] = {"image": IwinDiTTransformer2DModel, "video": IwinDiTTransformer3DModel}


@dataclass
class DataConfig:
    """Where the latents come from; `extract_latents.py` makes them, training reads them.

    What is said of images here holds of clips, too, where the modality is video.

    Attributes:
        source: Of images "digits" (scikit-learn's, built in), a folder with one folder of images per class, WebDataset
            tars ("photos/{000..099}.tar" or a glob that ends in .tar), or a Hugging Face data set ("hf:user/name" or
            "hf:folder"). Of video "moving_digits" (built in), or a folder with one folder per class of video files and
            folders of frames.
        source_split: Split of a Hugging Face data set.
        source_revision: Its commit, branch or tag on the Hub; null takes the newest commit.
        source_config: Its configuration, where it has several.
        streaming: Read a Hugging Face data set without downloading it first.
        image_key: Column of a Hugging Face data set (null: "image") or extension in the tars (null: any image's).
        label_key: The same for labels (null: "label", in tars "cls").
        class_names: Text file with a class name per line; null takes the source's own, or else "0", "1" and so on.
        vae: VAE folder or Hub id of any diffusers image VAE, which takes clips frame by frame, or for video of a video
            VAE. For the digits, still or moving, it is trained where it is missing.
        latents: Folder of encoded latents.
        resolution: Side of an image or a frame in pixels.
        frames: Video only, and needed there: frames of a clip.
        frame_rate: Video only, and needed there: frames per second at which videos are read.
        frame_stride: Video only: every so manieth of those frames is taken.
        clips_per_video: Video only: clips cut from every video, evenly spaced.
        image_steps: Video only: share of the steps that train on one latent frame of every clip, as an image: any frame
            where the VAE is an image VAE; the first, which is an image's, where it is a video VAE.
        posterior: What of the VAE's posterior is stored: its "mean", one "sample", or "mean_std", from which training
            draws a new sample each time.
        flips: Encode the mirror image too; training then takes one of the two at random.
        latents_dtype: Of the latents on disk.
        latent_statistics: What normalises the latents: the statistics of the "vae", or those of the "data", which the
            extraction measures per channel.
        shard_size: Images per file, at most, and per unit of work of the extraction.
        encode_batch_size: Images per VAE call while encoding.
        decode_threads: Threads that read and crop while encoding, an image or a video each.
        max_broken: Broken images or videos to skip, with a warning each, before giving up.
        holdout: Images held out for validation: a count, a fraction below 1, or 0.
        split_seed: Decides which; the same for every run on these latents.
        shares: 1 where every node sees all files; K where process r of n reads share r // (n / K) alone, so that a node
            may hold no more than that; `python -m iwin_dit.data.manifest FOLDER SHARE K` lists its files.
        verify: Check the sha256 of the latents at the start; else only sizes and headers.
        num_workers: Processes that read latents and draw noise ahead of the loop; 0 does it in the loop.
    """

    source: str = "digits"
    source_split: str = "train"
    source_revision: str | None = None
    source_config: str | None = None
    streaming: bool = False
    image_key: str | None = None
    label_key: str | None = None
    class_names: str | None = None
    vae: str = "data/digits/vae"
    latents: str = "data/digits/latents"
    resolution: int = 32
    frames: int | None = None
    frame_rate: float | None = None
    frame_stride: int = 1
    clips_per_video: int = 1
    image_steps: float = 0.0
    posterior: Literal["mean", "sample", "mean_std"] = "mean_std"
    flips: bool = False
    latents_dtype: Literal["float32", "float16", "bfloat16"] = "float16"
    latent_statistics: Literal["vae", "data"] = "vae"
    shard_size: int = 4096
    encode_batch_size: int = 64
    decode_threads: int = 4
    max_broken: int = 0
    holdout: int | float = 300
    split_seed: int = 0
    shares: int = 1
    verify: bool = True
    num_workers: int = 0

    @property
    def clips(self) -> ClipSettings | None:
        """How clips are cut; None of images."""
        if self.frames is None or self.frame_rate is None:
            return None
        return ClipSettings(self.frames, self.frame_rate, self.frame_stride, self.clips_per_video)


@dataclass
class OptimConfig:
    """AdamW and its learning rate.

    Attributes:
        lr: Peak learning rate.
        betas: Decay rates of the moments.
        weight_decay: Decoupled weight decay, on every weight.
        eps: Added to the denominator.
        warmup_images: Images over which the rate rises linearly.
        schedule: "constant", or "cosine" down to `final_lr_factor` at the last image.
        final_lr_factor: Last learning rate over the peak one, for "cosine".
        max_grad_norm: Gradients are clipped to this norm.
    """

    lr: float = 2e-4
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: float = 0.0
    eps: float = 1e-8
    warmup_images: int = 0
    schedule: Literal["constant", "cosine"] = "constant"
    final_lr_factor: float = 0.0
    max_grad_norm: float = 1.0

    def learning_rate(self, images: int, batch_size: int, total: int) -> float:
        """Return the learning rate of the step that takes image number `images` and the `batch_size` - 1 after it."""
        warm = min(1.0, (images + batch_size) / self.warmup_images) if self.warmup_images else 1.0
        if self.schedule == "constant":
            return self.lr * warm
        progress = min(1.0, max(0, images - self.warmup_images) / max(1, total - self.warmup_images))
        cosine = 0.5 * (1 + math.cos(math.pi * progress))
        return self.lr * warm * (self.final_lr_factor + (1 - self.final_lr_factor) * cosine)


@dataclass
class TrainConfig:
    """The loop. What acts on learning is counted in images, so that it stays the same at another batch size.

    For video, an image here and in what is logged is a clip, or its one frame in a step that trains on images.

    Attributes:
        images: Images to see, rounded up to whole batches. A finished run given more goes on, unless a cosine schedule
            has ended with it.
        batch_size: Global batch: samples per optimizer step over all processes and micro-batches.
        micro_batch_size: Most samples that a process takes through the model at once; null sets no limit.
        gradient_accumulation_steps: Micro-batches per step; "auto" takes the fewest that respect `micro_batch_size` (or
            ACCELERATE_GRADIENT_ACCUMULATION_STEPS, where the launcher sets it).
        mixed_precision: "auto" takes the launcher's, or "no".
        gradient_checkpointing: Recompute blocks in the backward pass, for memory.
        compile: Compile the repeated block, once for every window of a schedule, and once more where some steps are of
            single frames and others not.
        compile_options: Of torch's compiler (`torch._inductor.config`), by name; they are added to ours and win over
            them.
        ema_halflife_images: Images after which a weight counts half in the averaged weights; a twentieth of the images
            seen so far where that is less. 1,774,000 is DiT's decay of 0.9999 per step of 256.
        max_skipped_steps: So many steps with a non-finite loss or gradient in a row end the run.
        max_time: Hours after which the run writes a checkpoint and ends, to be started again; null sets no limit.
        timeout: Seconds after which a process that waits for another gives up.
        seed: Of the initial weights, data order, noise, times and label dropout.
    """

    images: int = 25_600_000
    batch_size: int = 256
    micro_batch_size: int | None = None
    gradient_accumulation_steps: int | Literal["auto"] = "auto"
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = "auto"
    gradient_checkpointing: bool = False
    compile: bool = False
    compile_options: dict[str, Any] = field(default_factory=dict)
    ema_halflife_images: int = 1_774_000
    max_skipped_steps: int = 20
    max_time: float | None = None
    timeout: float = 1800.0
    seed: int = 0

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return -(-self.images // self.batch_size)


@dataclass
class LogConfig:
    """What is written, and every how many steps (and at the last one); 0 turns validation and previews off.

    Previews go to the tracker, too: to TensorBoard's and W&B's images, those of video as moving GIFs. In these a frame
    is scaled down to at most 128 pixels a side; a GIF of many clips is large all the same, so name a few classes.

    Attributes:
        every: Loss, rate and speed to metrics.jsonl and the tracker; at least 1.
        validate_every: Validation loss of the averaged weights.
        validation_samples: At most so many held-out latents.
        preview_every: A grid of samples from the trained and from the averaged weights.
        preview_classes: Classes in the grid, one row each; empty means the first ten.
        preview_columns: Images per class.
        preview_steps: Sampler steps.
        preview_guidance_scale: Guidance scale; null takes the pipeline's own, 3, or 1 with model.class_dropout_prob 0.
        checkpoint_every: A checkpoint to resume from and the pipeline; 0 writes them at the last step alone.
        keep_last: How many checkpoints to keep, at least 1.
        keep_every: Checkpoints whose step this divides are kept besides; 0 keeps none.
        asynchronous: Write checkpoints while training goes on, from a copy in CPU memory.
        tracker: "none", "tensorboard" or "wandb", through Accelerate.
    """

    every: int = 50
    validate_every: int = 1000
    validation_samples: int = 10_000
    preview_every: int = 5000
    preview_classes: list[int] = field(default_factory=list)
    preview_columns: int = 8
    preview_steps: int = 50
    preview_guidance_scale: float | None = None
    checkpoint_every: int = 5000
    keep_last: int = 2
    keep_every: int = 0
    asynchronous: bool = True
    tracker: Literal["none", "tensorboard", "wandb"] = "none"


@dataclass
class EvalConfig:
    """Metrics of samples from the averaged weights, during training: the code of `evaluate_fid.py`, on fewer samples.

    Attributes:
        every: Steps between evaluations (and one at the last step); 0 turns them off.
        metrics: Comma-separated, as `evaluate_fid.py --metrics` takes them; the first decides which checkpoint is the
            best, and that one is kept.
        reference: What the samples are compared with: "digits", a reference .npz (ADM's, or our own), or images; for
            video "moving_digits" or a folder of videos; null for metrics that need none.
        num_samples: Images or clips, over all processes, balanced over the classes.
        num_inference_steps: Sampler steps.
        guidance_scale: Guidance scale; 1 turns guidance off, which model.class_dropout_prob 0 asks for.
        batch_size: Images per process at a time; changes no image.
        seed: Below 4096. The noise of image i is decided by seed and i alone, the same in every evaluation.
        protocol: Resize and normalisation of the images for Inception.
        inception_weights: File of its weights; null takes the cached ones.
        dinov2: Folder or Hub id of DINOv2, for fd_dinov2; null takes the Hub's ViT-L/14.
        i3d: TorchScript file of I3D, for fvd.
        max_broken: For fvd: so many of the reference's videos may be broken or too short, and are left out.
        num_real: For fvd: so many of the others count, a seeded choice; null takes all.
    """

    every: int = 0
    metrics: str = "fid"
    reference: str | None = None
    num_samples: int = 5000
    num_inference_steps: int = 50
    guidance_scale: float = 1.0
    batch_size: int = 50
    seed: int = 0
    protocol: Literal["adm", "pytorch-fid", "clean"] = "adm"
    inception_weights: str | None = None
    dinov2: str | None = None
    i3d: str | None = None
    max_broken: int = 0
    num_real: int | None = None

    @property
    def metric_names(self) -> tuple[str, ...]:
        """The metrics, one by one."""
        return tuple(name.strip() for name in self.metrics.split(","))


@dataclass
class Config:
    """Everything that decides a training run.

    Attributes:
        run: Run folder.
        resume: "latest", which goes past damaged checkpoints, or the one to go on from; a run without any starts.
        overwrite: Start afresh in a run folder that holds another run.
        dry_run: Print the resolved configuration and the size of the model, load what `init_from` names, then exit.
        modality: "image" or "video": which model, pipeline and data.
        init_from: Run, checkpoint, pipeline or Hub id whose weights, the averaged ones, a new run starts from: of the
            same model, or of an image model for a video model. A run that goes on does not read it again.
        init_classes: "keep" starts from the label embeddings there, too; "fresh" takes of them the one that stands for
            no class alone, for other classes, and as many as model.num_classes.
        model: Keyword arguments of `IwinDiTTransformer2DModel`, for video of `IwinDiTTransformer3DModel`.
        objective: Which of the two objectives below trains.
        flow_matching: Settings of objective "flow_matching".
        ddpm: Settings of objective "ddpm".
        data: Where the latents come from.
        optim: AdamW and its learning rate.
        train: The loop.
        log: What is written, and when.
        eval: Metrics of samples, and the best checkpoint.
    """

    run: str
    model: dict[str, Any]
    resume: str = "latest"
    overwrite: bool = False
    dry_run: bool = False
    modality: Modality = "image"
    init_from: str | None = None
    init_classes: InitClasses = "keep"
    objective: Literal["flow_matching", "ddpm"] = "flow_matching"
    flow_matching: FlowMatching = field(default_factory=FlowMatching)
    ddpm: DDPM = field(default_factory=DDPM)
    data: DataConfig = field(default_factory=DataConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    log: LogConfig = field(default_factory=LogConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)

    def __post_init__(self) -> None:
        idle = "ddpm" if self.objective == "flow_matching" else "flow_matching"
        if getattr(self, idle) != type(getattr(self, idle))():
            raise ValueError(f"{idle} settings have no effect with objective {self.objective!r}: remove them")
        if self.init_classes == "fresh" and self.init_from is None:
            raise ValueError("init_classes 'fresh' has no effect without init_from: leave it out")
        self._check_numbers()
        self._check_clips()
        self._check_metrics()
        self._check_guidance()
        self._check_compile_options()
        expected = self.build_objective().out_channels(self.model["in_channels"])
        if self.model["out_channels"] not in (None, expected):
            raise ValueError(
                f"model.out_channels must be {expected} (or null) for objective {self.objective!r}, got "
                f"{self.model['out_channels']}"
            )
        self.model["out_channels"] = expected

    def _check_numbers(self) -> None:
        """Raise a ValueError for the first number that is out of its range."""
        numbers = _numbers(self.to_dict())
        for expected, (in_range, names) in RANGES.items():
            for name in names:
                if name in numbers and not in_range(numbers[name]):
                    raise ValueError(f"{name} must be {expected}, got {numbers[name]}")
        classes = self.model["num_classes"]
        if not all(0 <= label < classes for label in self.log.preview_classes):
            raise ValueError(f"log.preview_classes must be 0 to {classes - 1}, got {self.log.preview_classes}")

    def _check_clips(self) -> None:
        """Raise a ValueError for settings of clips that are missing, or given for images."""
        data = self.data
        if self.modality == "image":
            given = [name for name in CLIP_KEYS if getattr(data, name) != getattr(DataConfig, name)]
            if given:
                names = ", ".join(f"data.{name}" for name in given)
                raise ValueError(f"{names} is for modality 'video' alone, got modality 'image': leave it out")
            return
        if data.clips is None:
            raise ValueError(
                f"data.frames and data.frame_rate must be given for modality 'video', got {data.frames} and "
                f"{data.frame_rate}"
            )
        if isinstance(data.holdout, int) and data.holdout % data.clips_per_video:
            raise ValueError(
                f"data.holdout must be a multiple of data.clips_per_video {data.clips_per_video}, as all clips of a "
                f"video are held out together, got {data.holdout}"
            )
        patch_size = self.model["patch_size"]
        temporal_patch = patch_size if isinstance(patch_size, int) else patch_size[0]
        if data.image_steps and temporal_patch > 1 and self.model["single_frame"] == "refuse":
            raise ValueError(
                f"data.image_steps {data.image_steps} trains on single latent frames, which model.single_frame "
                f"'refuse' does not take at model.patch_size {patch_size}: set model.single_frame to 'repeat', or "
                "data.image_steps to 0"
            )

    def _check_metrics(self) -> None:
        """Raise a ValueError for metrics that cannot be measured here; what lies on disk is checked at the start."""
        names = self.eval.metric_names
        try:
            check_metrics(names, self.eval.protocol)
        except ValueError as error:
            raise ValueError(f"eval.metrics {self.eval.metrics!r}: {error}") from error
        if self.eval.every and of_clips(names) != (self.modality == "video"):
            fitting = ", ".join(name for name in METRICS if METRICS[name].clips == (self.modality == "video"))
            raise ValueError(
                f"eval.metrics {self.eval.metrics!r} cannot be of {self.sample_word}s, which modality "
                f"{self.modality!r} samples: expected {fitting}. Set eval.every to 0 to train without evaluation"
            )
        needing = [name for name in names if needs_reference(name)]
        if self.eval.every and needing and self.eval.reference is None:
            raise ValueError(
                f"eval.reference must be given for {', '.join(needing)}: 'digits', or a file that `evaluate_fid.py "
                "reference` makes; for video 'moving_digits', or a folder of videos. Set eval.every to 0 to train "
                "without evaluation"
            )
        for name in ("max_broken", "num_real"):
            if self.eval.every and getattr(self.eval, name) and names != ("fvd",):
                raise ValueError(
                    f"eval.{name} is for fvd, whose reference is a folder of videos, got {getattr(self.eval, name)} "
                    f"with eval.metrics {self.eval.metrics!r}: leave it out"
                )

    def _check_guidance(self) -> None:
        """Raise a ValueError where samples would be guided by a null class that is never trained."""
        if self.model["class_dropout_prob"]:
            return
        for section, name, every in (
            ("log", "preview_guidance_scale", self.log.preview_every),
            ("eval", "guidance_scale", self.eval.every),
        ):
            scale = getattr(getattr(self, section), name)
            if every and scale is not None and scale > 1:
                raise ValueError(
                    f"{section}.{name} must be 1 where model.class_dropout_prob is 0, which leaves the null class "
                    f"that guidance needs untrained, got {scale}"
                )

    def _check_compile_options(self) -> None:
        """Raise a ValueError for options that the compiler does not have."""
        options = self.train.compile_options
        if options and not self.train.compile:
            raise ValueError(f"train.compile_options needs train.compile true, got {options}")
        known = inductor.get_config_copy()
        for name, value in options.items():
            if name not in known:
                close = difflib.get_close_matches(name, known, n=3)
                hint = f", did you mean {' or '.join(close)}?" if close else ""
                raise ValueError(f"train.compile_options: torch._inductor.config has no {name!r}{hint}")
            kind = inductor.get_type(name)  # type: ignore[attr-defined]  # made at import
            if get_origin(kind) is None and not isinstance(value, kind):  # what torch checks, when it compiles
                raise ValueError(f"train.compile_options.{name} must be of type {kind.__name__}, got {value!r}")

    def build_objective(self) -> Objective:
        """Return the objective that trains."""
        return self.flow_matching if self.objective == "flow_matching" else self.ddpm

    def build_model(self) -> IwinDiTCore:
        """Build the model, its weights drawn from torch's global generator."""
        return MODELS[self.modality](**self.model)

    @property
    def sample_word(self) -> str:
        """What a sample is called: "image" or "clip"."""
        return "image" if self.modality == "image" else "clip"

    @property
    def fps(self) -> float | None:
        """Frames per second of the clips that are trained on; None of images."""
        return None if self.data.clips is None else self.data.clips.fps

    def to_dict(self) -> dict[str, Any]:
        """Return everything as plain nested values, for JSON and YAML."""
        return dataclasses.asdict(self)


def _numbers(values: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """Return the numbers of nested values by dotted name."""
    numbers: dict[str, float] = {}
    for key, value in values.items():
        if isinstance(value, dict | tuple):
            parts = value if isinstance(value, dict) else {str(i): part for i, part in enumerate(value)}
            numbers |= _numbers(parts, f"{prefix}{key}.")
        elif isinstance(value, int | float):
            numbers[prefix + key] = value
    return numbers


CLIP_KEYS = ("frames", "frame_rate", "frame_stride", "clips_per_video", "image_steps")  # of the data, for video

# What a number must be, in words and as a test, and the numbers that must be it. NaN is in no range. The upper ends
# are far beyond use: they turn a slip of the finger into a message instead of a machine without memory.
RANGES: dict[str, tuple[Callable[[float], bool], tuple[str, ...]]] = {
    "from 1 to 10**15": (
        lambda value: 1 <= value <= 1e15,
        ("train.images", "train.ema_halflife_images", "log.validation_samples"),
    ),
    "from 2 to 2**20": (
        lambda value: 2 <= value <= MAX_COUNT,
        ("eval.num_samples", "eval.num_real"),
    ),  # a covariance needs two
    "from 1 to 10**6": (
        lambda value: 1 <= value <= 1e6,
        (
            *("train.batch_size", "train.micro_batch_size", "train.gradient_accumulation_steps"),
            *("train.max_skipped_steps", "data.shard_size", "data.encode_batch_size", "data.shares"),
            *("log.every", "log.keep_last", "eval.batch_size"),
            *("model.num_classes", "model.in_channels", "model.attention_head_dim"),
        ),
    ),
    "from 1 to 10**4": (
        lambda value: 1 <= value <= 1e4,
        (
            *("data.resolution", "data.frames", "data.frame_stride", "data.clips_per_video"),
            *("data.decode_threads", "model.num_layers", "model.num_attention_heads"),
            *("log.preview_columns", "log.preview_steps", "log.preview_guidance_scale"),
            *("eval.num_inference_steps", "eval.guidance_scale"),
        ),
    ),
    "from 0 to 10**4": (lambda value: 0 <= value <= 1e4, ("data.num_workers",)),
    "at least 0": (
        lambda value: 0 <= value < math.inf,
        (
            *("data.max_broken", "data.holdout", "data.split_seed", "optim.warmup_images", "optim.weight_decay"),
            *("log.validate_every", "log.preview_every", "log.checkpoint_every", "log.keep_every"),
            *("eval.every", "eval.max_broken"),
        ),
    ),
    "above 0": (
        lambda value: 0 < value < math.inf,
        ("optim.lr", "optim.eps", "optim.max_grad_norm", "train.max_time", "train.timeout", "data.frame_rate"),
    ),
    "in [0, 1)": (lambda value: 0 <= value < 1, ("optim.betas.0", "optim.betas.1")),
    "in [0, 1]": (lambda value: 0 <= value <= 1, ("optim.final_lr_factor", "data.image_steps")),
    "in [0, 2**32)": (lambda value: 0 <= value < 2**32, ("train.seed",)),  # what numpy's generator takes
    "in [0, 4096)": (lambda value: 0 <= value < MAX_SEED, ("eval.seed",)),
}


class ConfigParser(ArgumentParser):
    """jsonargparse's parser, whose error for an unknown key lists the valid ones of its section."""

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:  # noqa: ARG002  (argparse's signature)
        """Print the message, with the valid keys where a key is unknown, and exit with status 2."""
        in_file = re.search(r"(?:Group '([\w.]+)' does not accept o|O)ption '([\w.]+)'", message)
        in_arguments = re.search(r"unrecognized arguments: --([\w.-]+)", message)
        if in_file:
            message = f"{message}\n{self._valid_keys('.'.join(filter(None, in_file.groups())))}"
        elif in_arguments:
            message = f"{message}\n{self._valid_keys(in_arguments.group(1).replace('-', '_'))}"
        sys.stderr.write(f"{self.prog}: error: {message}\n")
        raise SystemExit(2)

    def _valid_keys(self, unknown: str) -> str:
        keys = sorted(set(self.get_defaults().keys()) - {"config"})
        close = difflib.get_close_matches(unknown, keys, n=1)
        section = unknown.rpartition(".")[0]
        siblings = [key for key in keys if section and key.rpartition(".")[0] == section]
        siblings = siblings or sorted({key.partition(".")[0] for key in keys})
        hint = f"Did you mean '{close[0]}'? " if close else ""
        return f"{hint}Valid keys: {', '.join(siblings)}"


def build_parser(prog: str, modality: str = "image") -> ConfigParser:
    """Build the command line of `train_dit.py` and `extract_latents.py`; `parse_config` makes a `Config` of it.

    Args:
        prog: Script that the help and the errors name.
        modality: A key of `MODELS`, whose signature the model section is.

    Returns:
        The parser.
    """
    parser = ConfigParser(
        prog=prog,
        allow_abbrev=False,
        description="The same command again goes on where it stopped, or says that it is done.",
    )
    parser.add_argument("--config", action="config", help="YAML file; the command line overrides it")
    parser.add_argument("--run", type=str, required=True, help="run folder")
    parser.add_argument("--resume", type=str, default="latest", help='"latest", or a checkpoint of this run')
    parser.add_argument("--overwrite", action="store_true", help="start afresh in a run folder that holds another run")
    parser.add_argument("--dry-run", action="store_true", help="print configuration and model size, then exit")
    parser.add_argument("--modality", type=Modality, default="image", help="decides the keys of the model section")
    parser.add_argument("--init_from", type=str | None, default=None, help="whose weights a new run starts from")
    parser.add_argument(
        "--init_classes", type=InitClasses, default="keep", help="label embeddings: theirs, or new ones"
    )
    parser.add_class_arguments(MODELS[modality], "model")
    parser.add_argument("--objective", type=Literal["flow_matching", "ddpm"], default="flow_matching")
    for name, section in SECTIONS.items():
        parser.add_class_arguments(section, name)
    return parser


SECTIONS: dict[str, type] = {
    "flow_matching": FlowMatching,
    "ddpm": DDPM,
    "data": DataConfig,
    "optim": OptimConfig,
    "train": TrainConfig,
    "log": LogConfig,
    "eval": EvalConfig,
}


def find_modality(arguments: list[str], prog: str) -> str:
    """Find the modality, which must be known before the rest is parsed.

    Args:
        arguments: Command line, with `--config`.
        prog: Script that the errors name.

    Returns:
        That of the command line, else that of the YAML file, else "image"; not checked.
    """
    parser = argparse.ArgumentParser(prog, add_help=False, allow_abbrev=False)
    parser.add_argument("--config", action="append", default=[])
    parser.add_argument("--modality")
    given, _ = parser.parse_known_args(arguments)
    found = "image"
    for path in given.config:
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError):  # which the whole parser reports
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
            found = content.get("modality", found) if isinstance(content, dict) else found
    return str(given.modality or found)


def parse_config(
    arguments: list[str] | None = None, default_config: str | None = None, prog: str = "train_dit.py"
) -> Config:
    """Read the configuration from the command line.

    Args:
        arguments: Command line; None means this process's.
        default_config: YAML file that is read where `--config` is not given.
        prog: Script that the help and the errors name.

    Returns:
        The checked configuration.

    Raises:
        SystemExit: With status 2 and a message, if a key is unknown or a value is wrong.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if default_config is not None and not any(a == "--config" or a.startswith("--config=") for a in arguments):
        arguments = ["--config", default_config, *arguments]
    modality = find_modality(arguments, prog)
    parser = build_parser(prog, modality if modality in MODELS else "image")
    values = parser.parse_args([*arguments, f"--modality={modality}"]).as_dict()  # which refuses another one
    values.pop("config", None)
    try:
        sections = {name: section(**values.pop(name)) for name, section in SECTIONS.items()}
        return Config(**values, **sections)
    except ValueError as error:
        parser.error(str(error))
