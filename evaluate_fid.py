"""Measure a model, images or videos against real ones; make a reference file; sweep over sampler settings.

    accelerate launch evaluate_fid.py --model runs/digits
    accelerate launch evaluate_fid.py --model runs/x --reference imagenet256.npz --guidance 1.5 --steps 250
    accelerate launch evaluate_fid.py --images samples.npz --reference imagenet256.npz --metrics fid,sfid,is,kid,pr
    accelerate launch evaluate_fid.py --model runs/moving_digits
    accelerate launch evaluate_fid.py --model runs/ucf101 --reference data/ucf101 --i3d i3d_torchscript.pt
    accelerate launch evaluate_fid.py reference --source data/imagenet/train --resolution 256 --out imagenet256.npz
    accelerate launch evaluate_fid.py sweep --model runs/x --reference imagenet256.npz --guidance 1 1.5 2 --out sweep

All but the last two are the command `evaluate`, which prints a line per value and writes a JSON with every setting
behind it. The commands `reference` and `sweep` have a --help of their own. An evaluation or a sweep that was
interrupted goes on when the same command is given again.
"""

import argparse
import contextlib
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

# What needs torch is imported in the functions, so that --help answers at once.
if TYPE_CHECKING:
    from accelerate import Accelerator

    from iwin_dit.data.sources import ImageSource
    from iwin_dit.evaluation.evaluator import Evaluator, Measurement
    from iwin_dit.evaluation.samples import SampledImages, Sampling
    from iwin_dit.evaluation.saving import KeptSamples, StoredSamples
    from iwin_dit.evaluation.sweep import Opened
    from iwin_dit.evaluation.videos import Cut, VideoFiles
    from iwin_dit.metrics.images import ImageArray, ImageFiles, ImageZip
    from iwin_dit.metrics.network import FeatureNetwork

    Pictures = SampledImages | KeptSamples | StoredSamples

Result = TypeVar("Result")

COMMANDS = ("evaluate", "reference", "sweep")
PROTOCOLS = ("adm", "pytorch-fid", "clean")
DEFAULT_SAMPLES, FVD_CLIPS, DIGITS_SAMPLES, MOVING_DIGITS_CLIPS = 50_000, 2048, 500, 200
DEFAULT_STEPS, DEFAULT_GUIDANCE = 50, 3  # the pipeline's, for --help, which has no time to import it
DEFAULT_CLASSES, DEFAULT_BATCH = 1000, 50
LONGEST_WAIT = timedelta(hours=2)  # of a process for another: for precision and recall, which one of them computes
CLIPS = ("i3d", "frames", "frame_stride", "frame_rate", "resolution", "max_broken", "num_real")
FILES = ("i3d", "frame_rate", "max_broken", "num_real")  # of them, what has a meaning for files alone
SAMPLING = ("steps", "guidance", "guidance_interval", "guidance_channels", "scheduler", "labels", "seed", "compile")


@dataclass(frozen=True)
class Comparison:
    """What is measured, and against what: the metrics' part of the command line, with every default settled.

    Attributes:
        metrics: Keys of `suite.METRICS`.
        reference: What the metrics compare with; None where they need nothing.
        protocol: Of the Inception network.
        cut: How clips are cut out of files.
    """

    metrics: tuple[str, ...]
    reference: str | None
    protocol: str
    cut: "Cut"

    @property
    def batch_size(self) -> int:
        """Images or clips per process at a time where the command line does not say."""
        return 8 if self.metrics == ("fvd",) else DEFAULT_BATCH


@dataclass(frozen=True)
class Made:
    """What is known of the images or clips to be measured, before any is sampled or read.

    Attributes:
        clips: Whether they are clips; None before a model was asked, when all that is said is believed.
        size: (H, W) or (T, H, W) in pixels and frames; None before files were looked at.
        sampled: Whether a model makes them.
        frame_rate: At which a model's training saw videos; None of files, and where it is not known.
        frame_stride: Of a model's training; None likewise.
    """

    clips: bool | None = None
    size: tuple[int, ...] | None = None
    sampled: bool = False
    frame_rate: float | None = None
    frame_stride: int | None = None


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line, and refuse what is wrong without a look at the data.

    Args:
        argv: Arguments without the program's name; None means the process's own.

    Returns:
        The arguments, `command` being one of `COMMANDS`; what is measured and against what, `settle` says.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    command = words.pop(0) if words and words[0] in COMMANDS else "evaluate"
    parser = argparse.ArgumentParser(
        prog="evaluate_fid.py" if command == "evaluate" else f"evaluate_fid.py {command}",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_options, check = {
        "evaluate": (_add_evaluate, _check_evaluate),
        "reference": (_add_reference, _check_reference),
        "sweep": (_add_sweep, _check_sweep),
    }[command]
    add_options(parser)
    args = parser.parse_args(words, argparse.Namespace(command=command))
    try:
        check(args)
    except ValueError as error:
        parser.error(str(error))
    return args


def _add_evaluate(parser: argparse.ArgumentParser) -> None:
    fake = parser.add_mutually_exclusive_group(required=True)
    fake.add_argument("--model", help="run folder, checkpoint folder, pipeline folder or Hub id to sample from")
    fake.add_argument("--images", type=Path, help="generated images: a folder, a .zip, or an .npz (arr_0)")
    fake.add_argument("--videos", type=Path, help="generated clips: a folder of videos, or of folders of frames")
    _add_measuring(parser)
    parser.add_argument("--num-samples", type=int, help="default 50000, clips 2048, digits 500 or 200; of files: all")
    parser.add_argument("--steps", type=int, help=f"sampling steps; default {DEFAULT_STEPS}")
    parser.add_argument(
        "--guidance",
        type=float,
        help=f"guidance scale, 1: none; default {DEFAULT_GUIDANCE}, of models trained without class dropout 1",
    )
    parser.add_argument(
        "--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="noise levels between which to guide"
    )
    parser.add_argument("--guidance-channels", type=int, help="guide only the first so many latent channels")
    parser.add_argument("--scheduler", help="such as UniPCMultistep or DDIM; default: the pipeline's own")
    _add_sampling(parser)
    kept = parser.add_mutually_exclusive_group()
    kept.add_argument("--save-images", type=Path, metavar="DIR", help="keep the images as PNG, and reuse those there")
    kept.add_argument("--save-npz", type=Path, metavar="FILE", help="the same in one .npz, as ADM's evaluator reads it")
    parser.add_argument(
        "--out",
        type=Path,
        help="result file; default <run folder>/fid.json, else ./fid.json. Another result there is moved to fid.1.json",
    )


def _add_reference(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--source", required=True, help="folder of images or class folders, tars, hf:NAME, or digits")
    parser.add_argument("--resolution", type=int, required=True, help="side in pixels, after ADM's centre crop")
    parser.add_argument("--out", type=Path, required=True, help=".npz file to write")
    _add_networks(parser)
    parser.add_argument("--keep-images", type=int, default=10_000, help="for kid, pr; default 10000, as in ADM's files")
    parser.add_argument("--seed", type=int, default=0, help="of the choice of those images; default 0")
    parser.add_argument("--max-broken", type=int, default=0, help="images that may be broken, and are left out")
    parser.add_argument("--split", default="train", help="of a Hugging Face data set; default train")
    parser.add_argument("--revision", help="of a Hugging Face data set")
    parser.add_argument("--config", help="configuration of a Hugging Face data set that has several")
    parser.add_argument("--streaming", action="store_true", help="read a Hugging Face data set as it comes")
    parser.add_argument("--image-key", help="image column of a Hugging Face data set, or extension in tars")
    parser.add_argument("--label-key", help="label column of a Hugging Face data set, or extension in tars")
    parser.add_argument("--num-classes", type=int, help=f"of tars and Hugging Face; default {DEFAULT_CLASSES}")


def _add_sweep(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", nargs="+", required=True, help="models, checkpoint folders among them")
    _add_measuring(parser)
    parser.add_argument("--num-samples", type=int, help="of each point; default 50000, clips 2048, digits 500 or 200")
    parser.add_argument("--steps", type=int, nargs="+", default=[], help=f"sampling steps; default {DEFAULT_STEPS}")
    parser.add_argument(
        "--guidance",
        type=float,
        nargs="+",
        default=[],
        help=f"guidance scales, 1: none; default {DEFAULT_GUIDANCE}, of models trained without class dropout 1",
    )
    parser.add_argument(
        "--guidance-interval",
        type=float,
        nargs=2,
        action="append",
        default=[],
        metavar=("LOW", "HIGH"),
        help="noise levels between which to guide; may be given several times",
    )
    parser.add_argument("--guidance-channels", type=int, nargs="+", default=[], help="numbers of channels to guide")
    parser.add_argument("--scheduler", nargs="+", default=[], help="such as UniPCMultistep or DDIM")
    _add_sampling(parser)
    parser.add_argument("--out", type=Path, required=True, help="folder for results, table and plot")


def _add_measuring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--reference",
        help="folder, .zip or .npz of images; .npz of statistics; 'digits'; folder of videos; 'moving_digits'",
    )
    _add_networks(parser)
    parser.add_argument("--i3d", type=Path, help="TorchScript file of I3D, for fvd")
    parser.add_argument("--frames", type=int, help="of each clip; default: the model's, of files 16")
    parser.add_argument(
        "--frame-stride",
        type=int,
        help="frames of a video, or of moving digits, from one of a clip to the next; default: the model's, of files 1",
    )
    parser.add_argument(
        "--frame-rate",
        type=float,
        help="frames per second at which videos are seen before --frame-stride, as by data.frame_rate of training; "
        "default: the model's, of files their own",
    )
    parser.add_argument("--resolution", type=int, help="crop videos to this square, as for training; default: no crop")
    parser.add_argument("--num-real", type=int, help="so many of the reference's videos, a seeded choice; default all")
    parser.add_argument(
        "--max-broken",
        type=int,
        help="videos of the reference that may be left out since they are broken or too short; default 0",
    )


def _add_networks(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--metrics",
        type=lambda text: tuple(part.strip() for part in text.split(",")),
        help="of fid,sfid,is,kid,pr,fd_dinov2,frechet_digits; fvd; moving_digits; default by what is compared",
    )
    parser.add_argument("--protocol", choices=PROTOCOLS, help="resize and normalisation for Inception; default adm")
    parser.add_argument("--inception-weights", type=Path, help="file, where it is not in torch's cache")
    parser.add_argument("--dinov2", help="folder or Hub id of the network for fd_dinov2")
    parser.add_argument("--batch-size", type=int, help="per process at a time; default 50, of video files 8")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--labels", choices=("balanced", "random"), help="classes: i mod their number (default), drawn")
    parser.add_argument("--seed", type=int, help="image i is drawn with seed * 2^20 + i; default 0, below 4096")
    parser.add_argument("--weights", choices=("ema", "raw"), help="of a checkpoint folder; default ema")
    parser.add_argument(
        "--compile", action="store_true", default=None, help="compile the model's blocks: pays off in long runs"
    )


def _check_evaluate(args: argparse.Namespace) -> None:
    source = "--model" if args.model is not None else "--images" if args.images is not None else "--videos"
    if source == "--images":
        _refuse(args, CLIPS, "--images: they are for clips")
    if source == "--model":
        _refuse(args, ("resolution",), "--model: real clips are cropped to its size")
    else:
        _refuse(args, (*SAMPLING, "weights", "save_images", "save_npz"), f"{source}: they are sampled already")
    _check_counts(args)
    metrics = settle(args, Made({"--model": None, "--images": False, "--videos": True}[source])).metrics
    if source == "--videos" and metrics != ("fvd",):
        raise ValueError(f"--videos have no labels: expected --metrics fvd, got {','.join(metrics)}")
    _check_guidance(args, [] if args.guidance is None else [args.guidance])
    if args.save_npz is not None and args.save_npz.suffix != ".npz":
        raise ValueError(f"expected --save-npz to be named .npz, got {args.save_npz}")
    if args.out is None:
        is_run = args.model is not None and (Path(args.model) / "pipeline" / "model_index.json").is_file()
        args.out = Path(args.model) / "fid.json" if is_run else Path("fid.json")
    _check_place("--out", args.out)
    _check_place("--save-npz", args.save_npz)


def _check_reference(args: argparse.Namespace) -> None:
    if args.metrics is None:
        args.metrics = ("frechet_digits",) if args.source == "digits" else ("fid", "sfid")
    _check_networks(args, args.metrics)
    args.protocol, args.batch_size = args.protocol or "adm", args.batch_size or DEFAULT_BATCH
    unusual = {"fvd", "is", "moving_digits"} & set(args.metrics)
    if unusual:
        raise ValueError(f"no reference file is made for {', '.join(sorted(unusual))}")
    if args.source == "moving_digits":
        raise ValueError("no reference file is made of clips: give --reference moving_digits to an evaluation")
    if args.out.suffix != ".npz" or args.resolution < 1 or args.keep_images < 0:
        raise ValueError("expected --out to be named .npz, a positive --resolution and --keep-images of at least 0")
    if args.source == "digits" or Path(args.source).is_dir():
        _refuse(args, ("num_classes",), f"--source {args.source}: it is for tars and Hugging Face")
    args.num_classes = DEFAULT_CLASSES if args.num_classes is None else args.num_classes
    _check_place("--out", args.out)


def _check_sweep(args: argparse.Namespace) -> None:
    _refuse(args, ("resolution",), "--model: real clips are cropped to its size")
    _check_counts(args)
    settle(args, Made())
    _check_guidance(args, args.guidance)
    args.guidance_interval = [tuple(interval) for interval in args.guidance_interval]


def _check_guidance(args: argparse.Namespace, scales: Sequence[float]) -> None:
    """Refuse what says how to guide where nothing is guided."""
    if scales and max(scales) == 1 and (args.guidance_interval or args.guidance_channels):
        given = "--guidance-interval" if args.guidance_interval else "--guidance-channels"
        raise ValueError(f"{given} has no meaning with --guidance 1, which turns guidance off")


def _check_counts(args: argparse.Namespace) -> None:
    """Refuse numbers that cannot be."""
    cuts = ("frames", "frame_stride", "frame_rate", "resolution")
    if any(getattr(args, name) is not None and getattr(args, name) <= 0 for name in cuts):
        given = ", ".join(str(getattr(args, name)) for name in cuts)
        raise ValueError(f"expected --frames, --frame-stride, --frame-rate and --resolution above 0, got {given}")
    for name, least in (("num_samples", 2), ("num_real", 2), ("max_broken", 0)):
        if getattr(args, name) is not None and getattr(args, name) < least:
            raise ValueError(f"expected --{name.replace('_', '-')} of at least {least}, got {getattr(args, name)}")


def settle(args: argparse.Namespace, made: Made) -> Comparison:
    """Settle metrics and reference, each by the other where one is not given, and how real clips are cut.

    Args:
        args: Of the command line.
        made: What is to be measured.

    Returns:
        What is compared. Real clips are cut as a model's training cut its own, but for what the command line says.

    Raises:
        ValueError: What is said does not go together, or not with what is to be measured.
    """
    from iwin_dit.evaluation.suite import METRICS, check_size, needs_reference, of_clips

    metrics = args.metrics or _default_metrics(args, made.clips)
    _check_networks(args, metrics)
    if made.clips is not None and made.clips != of_clips(metrics):
        fitting = [name for name, metric in METRICS.items() if metric.clips == made.clips]
        measured, given = ("clips", "images")[:: 1 if made.clips else -1]
        raise ValueError(
            f"--metrics {','.join(metrics)} is of {given}, to measure are {measured}: expected {' or '.join(fitting)}"
        )
    needing = [name for name in metrics if needs_reference(name)]
    if args.reference is not None and not needing:
        raise ValueError(f"--reference has no meaning with --metrics {','.join(metrics)}")
    reference = args.reference
    if reference is None and needing:
        built_in = {"frechet_digits": "digits", "moving_digits": "moving_digits"}
        if len(needing) > 1 or needing[0] not in built_in:
            raise ValueError(f"--metrics {','.join(metrics)} needs a --reference")
        reference = built_in[needing[0]]
    if made.size is not None:
        try:
            check_size(metrics, made.size[-2:])
        except ValueError as error:
            taken = ": --reference is missing, without which images are taken for digits"
            raise ValueError(f"{error}{taken if args.reference is None else ''}") from error
    return Comparison(metrics, reference, args.protocol or "adm", _cut(args, metrics, made))


def _cut(args: argparse.Namespace, metrics: tuple[str, ...], made: Made) -> "Cut":
    """How clips are cut out of files, or moving digits made; of images it means nothing."""
    from iwin_dit.data.clips import ClipSettings
    from iwin_dit.evaluation.videos import Cut

    *frames, height, width = made.size or (16, None, None)
    if not frames:
        return Cut()
    rate, stride = args.frame_rate or made.frame_rate, args.frame_stride or made.frame_stride
    if made.sampled and metrics == ("fvd",):
        if rate is None:
            raise ValueError(
                f"{args.model} does not say how its training cut clips (frame_stride of the pipeline): give "
                "--frame-rate, at which real videos are seen, and --frame-stride"
            )
        if height != width:
            raise ValueError(
                f"real clips are cropped to squares, got a model of {height} x {width} pixels: evaluate folders"
            )
    resolution = height if made.sampled else args.resolution
    return Cut.of_real(metrics, ClipSettings(args.frames or frames[0], rate, stride or 1), resolution)


def _default_metrics(args: argparse.Namespace, clips: bool | None) -> tuple[str, ...]:
    """The metric that the rest of the command line speaks of."""
    if clips is None:
        clips = args.reference == "moving_digits" or any(getattr(args, name) is not None for name in CLIPS)
    if not clips:
        return ("frechet_digits",) if args.reference in (None, "digits") else ("fid",)
    are_files = getattr(args, "videos", None) is not None or args.reference not in (None, "digits", "moving_digits")
    return ("fvd",) if are_files or args.i3d is not None else ("moving_digits",)


def _check_networks(args: argparse.Namespace, metrics: tuple[str, ...]) -> None:
    """The metrics, and that what is said of their networks has a meaning."""
    from iwin_dit.evaluation.suite import METRICS, check_metrics, uses_protocol

    check_metrics(metrics, args.protocol or "adm")
    wording = f"--metrics {','.join(metrics)}"
    if not uses_protocol(metrics):
        _refuse(args, ("protocol", "inception_weights"), wording)
    if "dinov2" not in {METRICS[name].network for name in metrics}:
        _refuse(args, ("dinov2",), wording)
    if args.command != "reference" and "fvd" not in metrics:
        _refuse(args, FILES if metrics == ("moving_digits",) else CLIPS, wording)
    if args.batch_size is not None and args.batch_size < 1:
        raise ValueError(f"expected --batch-size of at least 1, got {args.batch_size}")


def _refuse(args: argparse.Namespace, names: Sequence[str], wording: str) -> None:
    """Refuse what is given and would be ignored."""
    for name in names:
        if getattr(args, name) is not None:
            raise ValueError(f"--{name.replace('_', '-')} has no meaning with {wording}")


def _check_place(flag: str, path: Path | None) -> None:
    """Write something there, since no permission tells whether that can be done."""
    if path is None:
        return
    if path.is_dir():
        raise ValueError(f"expected {flag} to be a file, got {path}, which is a folder")
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".probe-") as probe:
            probe.write(b"\0" * 2**12)
    except OSError as error:
        raise ValueError(f"{flag} {path}: its folder does not exist or cannot be written: {error}") from error


def start() -> "Accelerator":
    """Join the processes of the launch."""
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    from iwin_dit.training.runtime import check_launch, use_all_cores

    accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=LONGEST_WAIT)])
    check_launch(accelerator)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("iwin_dit").setLevel(logging.INFO if accelerator.is_main_process else logging.ERROR)
    if accelerator.device.type == "cpu":
        use_all_cores()
    return accelerator


def opened(accelerator: "Accelerator", action: "Callable[[], Result]") -> "Result":
    """Do something on the main process first; an error of any process ends all of them.

    Args:
        accelerator: The processes.
        action: What to do.

    Returns:
        What it gave.

    Raises:
        ValueError: The main process's, or that a file is missing there or cannot be read or written.
        ImportError: The main process's.
        EvaluationError: Another process failed; the text names its rank.
    """
    from iwin_dit.evaluation.passes import settle
    from iwin_dit.training.ranks import main_first

    failures: list[Exception] = []

    def guarded() -> "Result | None":
        try:
            return action()
        except Exception as error:
            if accelerator.is_main_process and isinstance(error, ValueError | ImportError):
                raise
            if accelerator.is_main_process and isinstance(error, OSError):  # which main_first does not tell the others
                raise ValueError(str(error)) from error
            failures.append(error)
            return None

    result = main_first(accelerator, guarded)
    settle(failures[0] if failures else None)
    return cast("Result", result)


def open_evaluator(args: argparse.Namespace, comparison: Comparison, accelerator: "Accelerator") -> "Evaluator":
    """Open networks and reference, so that what is missing or broken is refused before the long work."""
    from iwin_dit.evaluation.evaluator import Evaluator, Request

    request = Request(
        comparison.metrics,
        comparison.reference,
        protocol=comparison.protocol,
        inception_weights=args.inception_weights,
        dinov2=args.dinov2,
        i3d=args.i3d,
        cut=comparison.cut,
        batch_size=args.batch_size or comparison.batch_size,
        max_broken=args.max_broken or 0,
        num_real=args.num_real,
    )
    return Evaluator(request, accelerator.device)


def open_pipeline(model: str, args: argparse.Namespace, accelerator: "Accelerator") -> "tuple[Opened, Comparison]":
    """Load a pipeline in the precision of the launch, identify its weights, and settle what they are compared with."""
    import torch

    from iwin_dit.pipelines.loading import Weights, identify, load_pipeline

    dtypes = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    precision: str = accelerator.mixed_precision
    weights: Weights = args.weights or "ema"
    if precision not in dtypes:
        raise ValueError(f"expected a mixed precision of {list(dtypes)} to sample with, got {precision!r}")
    about = identify(model, weights)
    if args.weights is not None and about["weights"] == "as stored":
        raise ValueError(f"--weights {weights}: {model} has one set of weights, and does not say which it is")
    pipe = load_pipeline(model, accelerator.device, dtypes[precision], weights)
    if args.compile:
        pipe.transformer.compile_repeated_blocks(fullgraph=True)
    made = Made(pipe.rank == 3, pipe.default_size, sampled=True)
    if (stride := pipe.config.get("frame_stride")) is not None:
        made = replace(made, frame_rate=pipe.config.fps * stride, frame_stride=stride)
    return (pipe, about), settle(args, made)


def open_images(args: argparse.Namespace, accelerator: "Accelerator") -> "tuple[Pictures | VideoFiles, Comparison]":
    """Open what is to be measured, files, or samples that are drawn when they are read; and what it is compared with.

    Args:
        args: The command line.
        accelerator: Of this process.

    Returns:
        Both.

    Raises:
        ValueError: If there are more or fewer files than --num-samples says.
    """
    from iwin_dit.evaluation.samples import SampledImages
    from iwin_dit.evaluation.saving import SavedArray, SavedImages, StoredSamples, find_settings
    from iwin_dit.evaluation.videos import VideoFiles
    from iwin_dit.metrics import images

    if args.model is not None:
        (pipe, about), comparison = open_pipeline(args.model, args, accelerator)
        samples = SampledImages(pipe, count(args, comparison), common_sampling(args), about)
        if samples.frames is not None:
            wording = f"{args.model}, which makes clips: `sample.py --format frames` writes those"
            _refuse(args, ("save_images", "save_npz"), wording)
        if args.save_images is not None:
            return SavedImages(samples, args.save_images), comparison
        return (samples if args.save_npz is None else SavedArray(samples, args.save_npz)), comparison
    files: StoredSamples | VideoFiles
    if args.images is not None:
        found = cast("ImageFiles | ImageZip | ImageArray", images.open_images(args.images, allow_lossy=False))
        files = StoredSamples(found, find_settings(args.images))
        comparison = settle(args, Made(clips=False, size=tuple(files.image_size)))
    else:
        comparison = settle(args, Made(clips=True))
        files = VideoFiles(args.videos, comparison.cut)
    if args.num_samples not in (None, len(files)):
        place = args.images or args.videos
        raise ValueError(f"expected {args.num_samples} in {place}, as --num-samples says, got {len(files)}")
    return files, comparison


def count(args: argparse.Namespace, comparison: Comparison) -> int:
    """Number of images or clips to sample."""
    defaults: dict[tuple[str, ...], int] = {
        ("frechet_digits",): DIGITS_SAMPLES,
        ("moving_digits",): MOVING_DIGITS_CLIPS,
        ("fvd",): FVD_CLIPS,
    }
    return args.num_samples or defaults.get(comparison.metrics, DEFAULT_SAMPLES)


def common_sampling(args: argparse.Namespace) -> "Sampling":
    """Settings of the samples; for a sweep those that all points have in common."""
    from iwin_dit.evaluation.samples import Sampling

    common = Sampling(labels=args.labels or "balanced", seed=args.seed or 0, frames=args.frames)
    if args.command == "sweep":
        return common
    given: dict[str, Any] = {name: getattr(args, name) for name in ("steps", "guidance", "guidance_channels")}
    interval = None if args.guidance_interval is None else tuple(args.guidance_interval)
    return replace(common, **given, guidance_interval=interval, scheduler=args.scheduler)


@contextlib.contextmanager
def used_alone(accelerator: "Accelerator", folders: Sequence[Path]) -> "Iterator[None]":
    """Refuse to start where another evaluation is writing; the main process keeps the locks of `saving.used_alone`."""
    from iwin_dit.evaluation import saving

    with contextlib.ExitStack() as stack:
        mine = folders if accelerator.is_main_process else ()
        opened(accelerator, lambda: stack.enter_context(saving.used_alone(mine)))
        yield


def evaluate(args: argparse.Namespace, accelerator: "Accelerator") -> None:
    """Measure a model or files: a JSON, and a line per metric."""
    from iwin_dit.evaluation import report
    from iwin_dit.evaluation.partial import Partial
    from iwin_dit.evaluation.saving import KeptSamples, SavedArray
    from iwin_dit.training.stop import StopRequest

    started = time.monotonic()
    folder = args.out.with_name(f"{args.out.name}.partial")
    folders = [folder] if args.save_npz is None else [folder, SavedArray.folder_of(args.save_npz)]
    with used_alone(accelerator, folders):
        # 1. Open everything, so that what is missing or broken is refused before the long work. The images first:
        # they say whether images or clips are measured, and their size may save the training of a classifier.
        images, comparison = opened(accelerator, lambda: open_images(args, accelerator))
        evaluator = opened(accelerator, lambda: open_evaluator(args, comparison, accelerator))
        opened(accelerator, lambda: evaluator.check(images))
        early = early_warnings(comparison, evaluator, images)
        warn(accelerator, early)
        request = evaluator.request_for(images)
        partial = opened(accelerator, lambda: Partial(folder, request))

        # 2. Sample or read, each process its share; what was kept or measured before is not sampled again.
        with StopRequest() as stop:
            measurement = evaluator.measure(images, partial=partial, stopping=lambda: stop.requested)
        if measurement is None:
            raise SystemExit(stop.exit_code or 1)  # the same command goes on
        if isinstance(images, KeptSamples):
            images.finish(args.batch_size or comparison.batch_size)

        # 3. Report, from one process; the numbers first, for a disk may be full.
        warn(accelerator, [warning for warning in report.warnings(measurement) if warning not in early])
        if accelerator.is_main_process:
            print("\n".join(report.lines(measurement, images.name, args.out)), flush=True)
        seconds = time.monotonic() - started
        opened(accelerator, lambda: write_report(accelerator, measurement, args.out, request, seconds))
        if accelerator.is_main_process:
            partial.remove()


def write_report(
    accelerator: "Accelerator", measurement: "Measurement", out: Path, request: dict[str, Any], seconds: float
) -> None:
    """Write the JSON of an evaluation, from one process, and say what became of another result there."""
    from iwin_dit.evaluation import report

    if accelerator.is_main_process:
        aside = report.write_report(measurement, out, request, wall_seconds=seconds)
        if aside is not None:
            print(f"{out} had another result, which is {aside} now", file=sys.stderr)


def early_warnings(comparison: Comparison, evaluator: "Evaluator", images: "Pictures | VideoFiles") -> list[str]:
    """What is wrong with the comparison, as far as it is known before the work."""
    from iwin_dit.evaluation import report

    about = {"path": comparison.reference, **evaluator.about_reference()}
    kinds = {path.suffix.lower() for path in getattr(images, "paths", ())}
    return report.early_warnings(about, images.image_size, comparison.protocol, getattr(images, "fps", None), kinds)


def warn(accelerator: "Accelerator", warnings: Sequence[str]) -> None:
    """Say warnings, from one process."""
    for warning in warnings if accelerator.is_main_process else ():
        print(f"warning: {warning}", file=sys.stderr, flush=True)


def reference(args: argparse.Namespace, accelerator: "Accelerator") -> None:
    """Make a reference file from an image source."""
    from iwin_dit.evaluation.networks import open_networks
    from iwin_dit.evaluation.reference import make_reference, open_reference_source

    def prepare() -> tuple["ImageSource", dict[str, "FeatureNetwork"]]:
        keys = ("split", "revision", "config", "streaming", "image_key", "label_key", "num_classes")
        source = open_reference_source(args.source, **{key: getattr(args, key) for key in keys})
        chosen = {"protocol": args.protocol, "inception_weights": args.inception_weights, "dinov2": args.dinov2}
        return source, open_networks(args.metrics, **chosen, i3d=None, device=accelerator.device)

    source, networks = opened(accelerator, prepare)
    keys = ("resolution", "keep_images", "seed", "batch_size", "max_broken")
    settings = {key: getattr(args, key) for key in keys}
    provenance = make_reference(source, networks, args.out, **settings, device=accelerator.device)
    if accelerator.is_main_process:
        kept = (provenance["images"] or {"n": 0})["n"]
        print(f"{args.out}: {provenance['n']} images of {args.source} at {args.resolution} pixels, {kept} kept in it")
        for features, floor in provenance["floor"].items():
            print(f"  {features}: {floor['n']} of them score {floor['value']:.5g} against the other {floor['against']}")


def sweep(args: argparse.Namespace, accelerator: "Accelerator") -> None:
    """Measure every combination of models and settings: a JSON each, a table and a plot of those so far."""
    import torch

    from iwin_dit.charts import require_matplotlib
    from iwin_dit.evaluation.sweep import grid, measure_grid, write_sweep
    from iwin_dit.training.stop import StopRequest

    def prepare() -> None:
        require_matplotlib()
        args.out.mkdir(parents=True, exist_ok=True)
        _check_place("--out", args.out / "sweep.md")

    opened(accelerator, prepare)
    with used_alone(accelerator, [args.out / "sweep"]), StopRequest() as stop:
        # The first model says what all are measured by: one table, one comparison.
        comparison = opened(accelerator, lambda: open_pipeline(args.model[0], args, accelerator)[1])
        evaluator = opened(accelerator, lambda: open_evaluator(args, comparison, accelerator))
        settled = {"metrics": comparison.metrics, "reference": comparison.reference}

        def open_alike(model: str) -> "Opened":
            if args.compile:
                torch.compiler.reset()  # variants of the models before would count
            found, needed = open_pipeline(model, argparse.Namespace(**{**vars(args), **settled}), accelerator)
            if needed != comparison:
                raise ValueError(
                    f"expected models to be measured alike, got {args.model[0]} against clips of {comparison.cut} and "
                    f"{model} of {needed.cut}: sweep them apart"
                )
            return found

        varying = ("steps", "guidance", "guidance_interval", "guidance_channels", "scheduler")
        points = grid(args.model, common_sampling(args), {name: getattr(args, name) for name in varying})
        results = measure_grid(
            points,
            lambda model: opened(accelerator, lambda: open_alike(model)),
            evaluator,
            count(args, comparison),
            args.out,
            stopping=lambda: stop.requested,
        )
        if results is None:
            raise SystemExit(stop.exit_code or 1)
        if accelerator.is_main_process:
            print(f"{write_sweep(results, args.out)}\n[{args.out}]")


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        argv: Arguments without the program's name; None means the process's own.
    """
    args = parse_arguments(argv)
    accelerator = start()
    {"evaluate": evaluate, "reference": reference, "sweep": sweep}[args.command](args, accelerator)
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except Exception as error:
        from iwin_dit.evaluation.passes import EvaluationError

        if not isinstance(error, ValueError | ImportError | OSError | FloatingPointError | EvaluationError):
            raise
        # All processes raise a user's mistake; one says it, in one line.
        sys.exit(f"evaluate_fid.py: error: {error}" if os.environ.get("RANK", "0") == "0" else 1)
