"""Score a model or a folder of images by its Frechet distance to a reference.

    accelerate launch evaluate_fid.py --model runs/digits
    accelerate launch evaluate_fid.py --model runs/x --reference imagenet256.npz --guidance 1.5 --steps 250
    python evaluate_fid.py --images samples/ --reference photos/

Prints one line and writes a JSON with every setting behind the number.
"""

import argparse
import hashlib
import inspect
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

# What needs torch is imported in the functions, so that --help answers at once.
if TYPE_CHECKING:
    import torch
    from accelerate import Accelerator

    from iwin_dit.metrics.frechet import FeatureNetwork, FrechetDistance, FrechetResult
    from iwin_dit.pipelines import IwinDiTPipeline

CLASSIFIER = Path("data/digits/classifier")
HOLDOUT, SPLIT_SEED, MIN_ACCURACY = 300, 0, 0.98  # of the digits classifier
DEFAULT_SAMPLES = {"digits": 500, "inception": 50_000}
# Arguments of the pipeline's call that the command line can set.
SETTINGS = ("num_inference_steps", "guidance_scale", "guidance_interval", "guidance_channels")


@dataclass(frozen=True)
class ImageSet:
    """Images by index: of a folder, of the digits, or sampled when they are read.

    Attributes:
        count: Number of images.
        read: Indices, B of them, to uint8 `(B, 3, H, W)`.
        name: What the printed line says of them.
        record: Gives what the JSON says of them.
    """

    count: int
    read: "Callable[[Sequence[int]], torch.Tensor]"
    name: str
    record: Callable[[], dict[str, Any]]


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line and settle what needs no data.

    Args:
        argv: Arguments without the program's name; None means the process's own.

    Returns:
        The arguments; `features` is "digits" or "inception", `out` is set.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    fake = parser.add_mutually_exclusive_group(required=True)
    fake.add_argument("--model", help="run folder, pipeline folder or Hub id to sample from")
    fake.add_argument("--images", type=Path, help="folder of generated images instead (PNG, WEBP or BMP)")
    parser.add_argument("--reference", default="digits", help="folder, ADM .npz, or 'digits' (default)")
    parser.add_argument(
        "--features", choices=("auto", "inception", "digits"), default="auto", help="auto: by reference"
    )
    parser.add_argument("--num-samples", type=int, help="default 50000, with digits features 500; of --images: all")
    parser.add_argument("--guidance", type=float, help="guidance scale; default: the pipeline's own")
    parser.add_argument(
        "--guidance-interval", type=float, nargs=2, metavar=("LOW", "HIGH"), help="noise levels between which to guide"
    )
    parser.add_argument("--guidance-channels", type=int, help="guide only the first so many latent channels")
    parser.add_argument("--steps", type=int, help="sampling steps; default: the pipeline's own")
    parser.add_argument("--seed", type=int, help="image i is drawn with seed + i; default 0")
    parser.add_argument("--batch-size", type=int, default=50, help="images per process at a time; default 50")
    parser.add_argument("--inception-weights", type=Path, help="file, where it is not in torch's cache")
    parser.add_argument("--out", type=Path, help="result file; default <run folder>/fid.json, else ./fid.json")
    args = parser.parse_args(argv)

    if args.features == "auto":
        args.features = "digits" if args.reference == "digits" else "inception"
    if args.features == "digits" and args.inception_weights is not None:
        parser.error("--inception-weights has no meaning with digits features")
    if args.features == "digits" and args.reference.endswith(".npz"):
        parser.error("an .npz reference holds Inception statistics: use --features inception")
    sampling = ("guidance", "guidance_interval", "guidance_channels", "steps", "seed")
    given = [name.replace("_", "-") for name in sampling if getattr(args, name) is not None]
    if args.images is not None and given:
        parser.error(f"--{given[0]} has no meaning with --images: they are sampled already")
    if args.batch_size < 1 or (args.num_samples is not None and args.num_samples < 2):
        parser.error("expected --batch-size of at least 1 and --num-samples of at least 2")
    if args.out is None:
        args.out = Path(args.model) / "fid.json" if _is_run_folder(args.model) else Path("fid.json")
    if not args.out.parent.is_dir() or not os.access(args.out.parent, os.W_OK):
        parser.error(f"--out {args.out}: its folder does not exist or cannot be written")
    return args


def _is_run_folder(model: str | None) -> bool:
    return model is not None and (Path(model) / "pipeline" / "model_index.json").is_file()


def load_features(args: argparse.Namespace) -> "FeatureNetwork":
    """Load the feature network; download or train what is missing.

    Args:
        args: The command line.

    Returns:
        The network.
    """
    from huggingface_hub import is_offline_mode

    from iwin_dit.metrics.digits import DigitsFeatures
    from iwin_dit.metrics.inception import InceptionFeatures, find_inception_weights

    if args.features == "inception":
        return InceptionFeatures(find_inception_weights(args.inception_weights, download=not is_offline_mode()))
    if not DigitsFeatures.is_saved(CLASSIFIER):
        train_classifier(CLASSIFIER)
    return DigitsFeatures.load(CLASSIFIER)


def train_classifier(folder: Path) -> None:
    """Train the digits classifier on the training split and save it.

    Args:
        folder: Where to save it.

    Raises:
        ValueError: If it recognises too few of the held-out digits for its features to mean anything.
    """
    import torch

    from iwin_dit.data.digits import Digits
    from iwin_dit.data.sources import split_indices
    from iwin_dit.metrics.digits import train_digits_features

    digits = Digits()
    images, labels = torch.stack([digits[i] for i in range(len(digits))]), torch.tensor(digits.labels)
    train, held_out = (torch.from_numpy(rows) for rows in split_indices(digits.labels, HOLDOUT, SPLIT_SEED))
    features = train_digits_features(images[train], labels[train], seed=SPLIT_SEED)
    accuracy = features.accuracy(images[held_out], labels[held_out])
    if accuracy < MIN_ACCURACY:
        raise ValueError(
            f"the digits classifier recognises {accuracy:.1%} of held-out digits, under {MIN_ACCURACY:.0%}"
        )
    features.save(folder, {"held_out_accuracy": accuracy, "holdout": HOLDOUT, "seed": SPLIT_SEED})


def image_folder(folder: Path, *, allow_jpeg: bool) -> ImageSet:
    """Open a folder of images as a set.

    Args:
        folder: Searched with its subfolders.
        allow_jpeg: Whether JPEG may count.

    Returns:
        The set, its headers checked.
    """
    from iwin_dit.metrics.images import ImageFiles

    files = ImageFiles(folder, allow_jpeg=allow_jpeg)
    return ImageSet(len(files), files.read, str(folder), lambda: {"sha256": files.sha256(), "image_size": files.size})


def generated_images(args: argparse.Namespace) -> ImageSet:
    """Open the folder of generated images, all of which count.

    Args:
        args: The command line.

    Returns:
        The set.

    Raises:
        ValueError: If the folder holds another number of images than was asked for.
    """
    images = image_folder(args.images, allow_jpeg=False)
    if args.num_samples not in (None, images.count):
        raise ValueError(
            f"expected {args.num_samples} images in {args.images}, as --num-samples says, got {images.count}"
        )
    return images


def reference_images(reference: str) -> ImageSet:
    """Open a reference that comes as images.

    Args:
        reference: "digits" or a folder.

    Returns:
        The set.
    """
    if reference != "digits":
        return image_folder(Path(reference), allow_jpeg=True)
    import torch

    from iwin_dit.data.digits import Digits

    digits = Digits()
    images = torch.stack([digits[i] for i in range(len(digits))])
    digest = hashlib.sha256(images.numpy().tobytes()).hexdigest()
    record = {"sha256": digest, "image_size": tuple(images.shape[-2:])}
    return ImageSet(len(images), lambda indices: images[list(indices)], "digits", lambda: record)


def sampled_images(args: argparse.Namespace, device: "torch.device", precision: str) -> ImageSet:
    """Load the pipeline; image i has label i mod classes and its own generator, seeded by seed + i.

    Args:
        args: The command line.
        device: Where to sample.
        precision: "no", "fp16" or "bf16", as Accelerate words it.

    Returns:
        The set, whose images are sampled as they are read.

    Raises:
        ValueError: If the precision is another one, or the pipeline makes no images.
    """
    import torch

    from iwin_dit.pipelines.loading import load_pipeline

    dtypes = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
    if precision not in dtypes:
        raise ValueError(f"expected a mixed precision of {list(dtypes)} to sample with, got {precision!r}")
    pipe = load_pipeline(args.model, device, dtypes[precision])
    if pipe.codec is None:
        raise ValueError(f"{args.model} has no VAE, so there are latents but no images to score: add a VAE to it")
    pipe.set_progress_bar_config(disable=True)
    count = args.num_samples or DEFAULT_SAMPLES[args.features]
    first_seed = args.seed or 0
    num_classes = pipe.transformer.config.num_classes
    record = {
        "weights": "ema" if _is_run_folder(args.model) else "as stored in the pipeline",
        "weights_sha256": weights_sha256(args.model),
        "vae": {"class": type(pipe.vae).__name__, "sha256": pipe.codec.fingerprint()},  # of the weights in `dtype`
        "dtype": str(dtypes[precision]).removeprefix("torch."),
        "labels": f"i mod {num_classes}",
        "seeds": [first_seed, first_seed + count - 1],
        "rounding": "round(255 x)",
        **sampler_record(pipe, args),
    }
    settings = {name: record[name] for name in SETTINGS}

    def read(indices: Sequence[int]) -> torch.Tensor:
        (images,) = pipe(
            [i % num_classes for i in indices],
            **settings,
            # On the CPU, so that every device starts from the same noise.
            generator=[torch.Generator().manual_seed(first_seed + i) for i in indices],
            output_type="pt",
            return_dict=False,
        )
        record["image_size"] = tuple(images.shape[-2:])
        return to_uint8(images)

    sampler = type(pipe.scheduler).__name__.removesuffix("Scheduler")
    name = f"guidance {settings['guidance_scale']:g}, {settings['num_inference_steps']} steps, {sampler}"
    return ImageSet(count, read, name, lambda: record)


def weights_sha256(model: str) -> dict[str, str] | None:
    """Identify the transformer that is scored.

    Args:
        model: Run folder, pipeline folder or Hub id.

    Returns:
        The sha256 of its weight files by name; None for a Hub id, whose files lie in the Hub's cache.
    """
    from iwin_dit.files import sha256

    folder = Path(model) / "pipeline" if _is_run_folder(model) else Path(model)
    return {path.name: sha256(path) for path in sorted((folder / "transformer").glob("*.safetensors"))} or None


def sampler_record(pipe: "IwinDiTPipeline", args: argparse.Namespace) -> dict[str, Any]:
    """What the images depend on besides weights and noise, with the pipeline's own defaults as values.

    Args:
        pipe: The pipeline.
        args: The command line.

    Returns:
        Values for the call and for the JSON.
    """
    parameters = inspect.signature(pipe.__call__).parameters
    given = (
        args.steps,
        args.guidance,
        args.guidance_interval and tuple(args.guidance_interval),
        args.guidance_channels,
    )
    values = dict(zip(SETTINGS, given, strict=True))
    return {
        **{name: parameters[name].default if value is None else value for name, value in values.items()},
        "scheduler": {
            "class": type(pipe.scheduler).__name__,
            "config": json.loads(pipe.scheduler.to_json_string()),
        },
    }


def to_uint8(images: "torch.Tensor") -> "torch.Tensor":
    """Round images as saving them to PNG would.

    Args:
        images: `(B, 3, H, W)` floating point in [0, 1].

    Returns:
        `(B, 3, H, W)` uint8.

    Raises:
        FloatingPointError: If a value is not finite, which uint8 would turn into a plausible grey.
    """
    import torch

    if not images.isfinite().all():
        raise FloatingPointError("the pipeline gave NaN or infinite pixels; a Frechet distance of them means nothing")
    return (images.float() * 255).round().clamp(0, 255).to(torch.uint8)


def accumulate(
    metric: "FrechetDistance", images: ImageSet, *, real: bool, accelerator: "Accelerator", batch_size: int
) -> None:
    """Add this process's share of a set to the metric.

    Args:
        metric: To update.
        images: The set, of all processes.
        real: Which side it is.
        accelerator: Tells the share.
        batch_size: Images at a time.
    """
    from tqdm import tqdm

    share = range(accelerator.process_index, images.count, accelerator.num_processes)
    bar = tqdm(total=len(share), desc="real" if real else "fake", unit="img", disable=not accelerator.is_main_process)
    with bar:
        for start in range(0, len(share), batch_size):
            indices = share[start : start + batch_size]
            metric.update(images.read(indices), real=real)
            bar.update(len(indices))


def report(
    args: argparse.Namespace,
    result: "FrechetResult",
    features: "FeatureNetwork",
    fake: ImageSet,
    real: ImageSet | None,
    run: dict[str, Any],
) -> None:
    """Write the JSON, then print the line: no number without its settings.

    Args:
        args: The command line.
        result: The distance.
        features: What it was measured in.
        fake: The generated images.
        real: The reference images; None where the reference is a statistics file.
        run: Facts about this run.
    """
    from iwin_dit.files import sha256, write_json
    from iwin_dit.metrics.result import environment

    metric = features.metric_name(result.n_fake)
    reference = {"sha256": sha256(Path(args.reference))} if real is None else real.record()
    content: dict[str, Any] = {
        "metric": metric,
        "value": result.value,
        "value_before_clamping_to_0": result.raw,
        "features": features.describe(),
        "statistics": "torchmetrics FrechetInceptionDistance, float64, covariance over n - 1",
        "reference": {"path": args.reference, "n": result.n_real, **reference},
        "generated": {"path": str(args.model or args.images), "n": result.n_fake, **fake.record()},
        "run": run,
        "environment": environment(),
    }
    write_json(args.out, content)
    sizes = content["reference"].get("image_size"), content["generated"]["image_size"]
    if real is not None and sizes[0] != sizes[1]:
        print(f"warning: the reference images are {sizes[0]}, the generated ones {sizes[1]} pixels", file=sys.stderr)
    if result.n_fake <= features.num_features:
        print(
            f"warning: {result.n_fake} samples cannot span {features.num_features} features: the distance is biased "
            f"upwards and compares only with others of {result.n_fake} samples",
            file=sys.stderr,
        )
    versus = Path(args.reference).name if real is None else f"{result.n_real} real"
    print(f"{metric} ({result.n_fake} samples vs {versus}, {fake.name}): {result.value:.4g}   [{args.out}]")


def main(argv: Sequence[str] | None = None) -> None:
    """Run the evaluation.

    Args:
        argv: Arguments without the program's name; None means the process's own.
    """
    args = parse_arguments(argv)

    import torch
    from accelerate import Accelerator

    from iwin_dit.metrics.frechet import FrechetDistance, load_statistics
    from iwin_dit.metrics.inception import InceptionFeatures
    from iwin_dit.training.runtime import use_all_cores

    accelerator = Accelerator()
    if accelerator.device.type == "cpu":
        use_all_cores()
    torch.backends.cudnn.allow_tf32 = False  # TF32 makes the features of an image depend on its batch

    # 1. Open everything, so that what is missing or broken is refused before the long work.
    statistics = real = None
    if args.reference.endswith(".npz"):
        statistics = load_statistics(Path(args.reference), InceptionFeatures.num_features)
    else:
        real = reference_images(args.reference)
    folder = None if args.images is None else generated_images(args)
    with accelerator.main_process_first():
        features = load_features(args)
    fake = folder or sampled_images(args, accelerator.device, accelerator.mixed_precision)
    # float64, which the statistics need, does not exist on MPS.
    metric = FrechetDistance(features, "cpu" if accelerator.device.type == "mps" else accelerator.device)

    # 2. Statistics of both sides, each process with its share of the images.
    if statistics is not None:
        metric.set_real_statistics(statistics)
    if real is not None:
        accumulate(metric, real, real=True, accelerator=accelerator, batch_size=args.batch_size)
    start = time.perf_counter()
    accumulate(metric, fake, real=False, accelerator=accelerator, batch_size=args.batch_size)
    accelerator.wait_for_everyone()
    seconds = time.perf_counter() - start

    # 3. The distance, on every process since the statistics are summed over them; one reports.
    result = metric.compute()
    if accelerator.is_main_process:
        run = {
            "processes": accelerator.num_processes,
            "device": str(accelerator.device),
            "batch_size": args.batch_size,
            "seconds_for_generated": round(seconds, 3),
            "images_per_second": round(result.n_fake / seconds, 3),
        }
        report(args, result, features, fake, real, run)
    accelerator.end_training()


if __name__ == "__main__":
    try:
        main()
    except (ValueError, ImportError, FileNotFoundError, FloatingPointError) as error:  # one line for a user's mistake
        sys.exit(f"evaluate_fid.py: error: {error}")
