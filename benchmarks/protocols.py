"""How much the FID of the same images changes with the protocol, rounding, JPEG, the number of images, the covariance.

    python -m benchmarks.protocols [--weights FILE] [--images 100] [--out FILE.json]

Random crops of scikit-learn's two photographs: of china.jpg as the real images, of flower.jpg as the generated ones.
Unless --weights names the real Inception's, they are drawn from a seed: the sizes of the effects then stand for the
code paths, and no value compares with a published one. How to read the table: docs/evaluation.md.
"""

import argparse
import io
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from sklearn.datasets import load_sample_image
from torch import Tensor
from tqdm import tqdm

from benchmarks.measure import check_device
from benchmarks.options import positive
from benchmarks.seeded_inception import open_inception
from iwin_dit.files import write_json
from iwin_dit.metrics.frechet import frechet_distance
from iwin_dit.metrics.inception import INPUT_SIZE, PROTOCOLS, InceptionFeatures
from iwin_dit.metrics.moments import Moments
from iwin_dit.metrics.result import environment

CROP_SIZE, IMAGE_SIZE = 320, 256
REFERENCE = "adm"
JPEG_QUALITIES = (95, 75)
PARTS = (2, 4)

Prepare = Callable[[Tensor], Tensor]
Pair = tuple[Tensor, Tensor]  # features of the real and of the generated images, (N, 2048) each


def crops(photo: str, count: int, seed: int) -> Tensor:
    """Cut random squares of 320 pixels and scale them to 256, without rounding, as a decoder would give them.

    Args:
        photo: Name of one of scikit-learn's sample images.
        count: How many.
        seed: Of the places.

    Returns:
        (count, 3, 256, 256) float32 in 0..255.
    """
    pixels = torch.from_numpy(np.array(load_sample_image(photo))).permute(2, 0, 1).float()  # (3, H, W)
    generator = torch.Generator().manual_seed(seed)
    cut = []
    for _ in range(count):
        top, left = (int(torch.randint(length - CROP_SIZE + 1, (), generator=generator)) for length in pixels.shape[1:])
        cut.append(pixels[:, top : top + CROP_SIZE, left : left + CROP_SIZE])
    size = (IMAGE_SIZE, IMAGE_SIZE)
    return F.interpolate(torch.stack(cut), size=size, mode="bicubic", antialias=True).clamp(0, 255)


def through_jpeg(images: Tensor, quality: int) -> Tensor:
    """Encode and decode by Pillow, (N, 3, H, W) uint8 -> the same."""
    decoded = []
    for image in images.permute(0, 2, 3, 1).numpy():
        file = io.BytesIO()
        Image.fromarray(image).save(file, "JPEG", quality=quality)
        decoded.append(np.array(Image.open(file)))
    return torch.from_numpy(np.stack(decoded)).permute(0, 3, 1, 2).contiguous()


def prepare_antialiased(images: Tensor) -> Tensor:
    """Resize as torchmetrics does unless it is told `antialias=False`, normalise as `adm` does."""
    size = (INPUT_SIZE, INPUT_SIZE)
    return (F.interpolate(images.float(), size=size, mode="bilinear", antialias=True) - 128) / 128


def pooled(network: InceptionFeatures, images: Tensor, prepare: Prepare, batch_size: int = 10) -> Tensor:
    """Pooled features of (N, 3, H, W) uint8 images under any preprocessing, (N, 2048)."""
    device = next(network.parameters()).device
    batches = [
        network.features_of_input(prepare(batch.to(device)))["pool"]
        for batch in tqdm(images.split(batch_size), leave=False)
    ]
    return torch.cat(batches).cpu()


def distance(features: Pair, *, unbiased: bool = True) -> float:
    """The Frechet distance of two sets of features."""
    sides = []
    for side in features:
        moments = Moments(side.shape[1])
        moments.update(side)
        sides.append(moments.gaussian(unbiased=unbiased))
    return frechet_distance(*sides)


def measure(network: InceptionFeatures, real: Tensor, fake: Tensor) -> dict[str, float]:
    """Measure the FID under every variant; the first is what the others are compared with.

    Args:
        network: The Inception; its own protocol plays no part.
        real: (N, 3, H, W) float in 0..255.
        fake: (N, 3, H, W) float in 0..255.

    Returns:
        FID by variant.
    """
    adm = PROTOCOLS[REFERENCE].prepare
    real_images, fake_images = real.round().to(torch.uint8), fake.round().to(torch.uint8)
    prepares = {name: protocol.prepare for name, protocol in PROTOCOLS.items()}
    prepares["antialiased resize, torchmetrics' default"] = prepare_antialiased
    pairs: dict[str, Pair] = {
        name: (pooled(network, real_images, prepare), pooled(network, fake_images, prepare))
        for name, prepare in prepares.items()
    }
    real_features, fake_features = pairs[REFERENCE]
    changed = {"generated images truncated to uint8, not rounded": fake.to(torch.uint8)}
    changed |= {f"generated images as JPEG, quality {q}": through_jpeg(fake_images, q) for q in JPEG_QUALITIES}
    pairs |= {name: (real_features, pooled(network, images, adm)) for name, images in changed.items()}
    for part in PARTS:
        n = len(real) // part
        pairs[f"{n} images on each side"] = real_features[:n], fake_features[:n]
    values = {name: distance(pair) for name, pair in pairs.items()}
    values["covariance over n, not n - 1"] = distance(pairs[REFERENCE], unbiased=False)
    return values


def rows_of(values: dict[str, float]) -> list[dict[str, Any]]:
    """Put each variant beside its difference from the first."""
    reference = values[REFERENCE]
    return [
        {"variant": name, "fid": value, "difference_percent": 100 * (value / reference - 1)}
        for name, value in values.items()
    ]


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Format rows for the terminal and for Markdown."""
    lines = [f"| variant | FID | difference from {REFERENCE} |", "|---|---:|---:|"]
    for row in rows:
        difference = "" if row["variant"] == REFERENCE else f"{row['difference_percent']:+.2f} %"
        lines.append(f"| {row['variant']} | {row['fid']:.4f} | {difference} |")
    return "\n".join(lines)


def several(text: str) -> int:
    """Parse a number of images of which the smallest part still has a covariance."""
    count = positive(text)
    if count < 2 * max(PARTS):
        raise argparse.ArgumentTypeError(f"expected at least {2 * max(PARTS)} images, got {count}")
    return count


def build_parser() -> argparse.ArgumentParser:
    """Build the command line."""
    description = "Measure what moves the FID of the same images."
    parser = argparse.ArgumentParser(prog="python -m benchmarks.protocols", description=description)
    parser.add_argument("--weights", type=Path, help="the real Inception's; drawn from a seed otherwise")
    parser.add_argument("--images", type=several, default=100, help="on each side")
    parser.add_argument("--seed", type=int, default=0, help="of the crops")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--out", type=Path, help="JSON file to write")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line."""
    parser = build_parser()
    arguments = parser.parse_args(argv)
    check_device(parser, arguments.device)
    network = open_inception(arguments.weights, ("pool",)).to(arguments.device)
    real, fake = (crops(photo, arguments.images, arguments.seed) for photo in ("china.jpg", "flower.jpg"))
    rows = rows_of(measure(network, real, fake))
    print(table(rows))
    if arguments.out is not None:
        record = {
            "command": " ".join(["python -m benchmarks.protocols", *(sys.argv[1:] if argv is None else argv)]),
            "weights": "seeded random" if arguments.weights is None else "given",
            "weights_sha256": network.weights_sha256,
            "images_per_side": arguments.images,
            "image_size": [IMAGE_SIZE, IMAGE_SIZE],
            "seed": arguments.seed,
            "device": arguments.device,
            "rows": rows,
            "environment": environment(),
        }
        write_json(arguments.out, record)


if __name__ == "__main__":
    main()
