"""Check the evaluation against the numbers that ADM's repository publishes for a file of samples.

    python -m benchmarks.published --samples SAMPLES.npz --reference VIRTUAL_imagenet256_labeled.npz

SAMPLES is admnet_guided_upsampled_imagenet256.npz. Both files are linked from the README in `evaluations` of
https://github.com/openai/guided-diffusion, which gives the numbers (ADM-G, ADM-U at 256 pixels). Exits with status 1 if
one of them is not met.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from iwin_dit.evaluation.evaluator import Evaluator, Request
from iwin_dit.files import write_json
from iwin_dit.metrics.images import open_images
from iwin_dit.metrics.inception import WIDTHS
from iwin_dit.metrics.reference import load_reference

# What is published, and by how much we may miss it: the port of the network is 6e-4 (relative) off TensorFlow's.
PUBLISHED = {
    "is": (215.84, 1.0),
    "fid": (3.9426, 0.02),
    "sfid": (6.1404, 0.03),
    "precision": (0.8265, 0.005),
    "recall": (0.5309, 0.005),
}


def compare(values: Mapping[str, Mapping[str, Any]]) -> list[tuple[str, float, float, bool]]:
    """Set what was measured against what is published.

    Args:
        values: `Measurement.values` of 50,000 samples.

    Returns:
        Name, published value, ours, and whether ours is near enough, of each metric.
    """
    rows = []
    for name, (published, tolerance) in PUBLISHED.items():
        ours = values[name]["value"]
        rows.append((name, published, ours, abs(ours - published) <= tolerance))
    return rows


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, and return the exit status."""
    parser = argparse.ArgumentParser(description="Check the evaluation against ADM's published numbers.")
    parser.add_argument("--samples", type=Path, required=True, help="ADM's samples, an .npz")
    parser.add_argument("--reference", type=Path, required=True, help="ADM's reference, an .npz")
    parser.add_argument("--inception-weights", type=Path, help="file, where it is not in torch's cache")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, help="JSON to write")
    arguments = parser.parse_args(argv)
    spatial = load_reference(arguments.reference, {"spatial": WIDTHS["spatial"]}).gaussians["spatial"]
    if (spatial.mean < 0).any():  # ours are the output of a ReLU
        raise ValueError(f"{arguments.reference} has negative means in mu_s: its sFID is of other features than ours")
    request = Request(
        metrics=("fid", "sfid", "is", "pr"),
        reference=str(arguments.reference),
        inception_weights=arguments.inception_weights,
    )
    samples = open_images(arguments.samples, allow_lossy=False)
    if len(samples) != 50_000:  # a download that was cut, or another file
        raise ValueError(f"expected 50,000 images in {arguments.samples}, got {len(samples)}")
    evaluator = Evaluator(request, arguments.device)
    evaluator.prepare(len(samples))
    measurement = evaluator.measure(samples)
    assert measurement is not None  # nothing asks it to stop
    rows = compare(measurement.values)
    print("| metric | published | ours | |\n|---|---:|---:|---|")
    for name, published, ours, near in rows:
        print(f"| {name} | {published:g} | {ours:.4f} | {'met' if near else 'NOT MET'} |")
    if arguments.out:
        write_json(arguments.out, {"metrics": measurement.values, **measurement.record})
    return 0 if all(near for *_, near in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
