"""Draw the curves of runs: `python -m iwin_dit.training.plot RUN [RUN ...] [--out FILE]`."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from .log import read_metrics


def plot_losses(runs: Sequence[Path], out: Path) -> None:
    """Draw training and validation loss against images seen.

    Args:
        runs: Run folders; each has a metrics.jsonl.
        out: PNG to write.

    Raises:
        ValueError: If a folder has no metrics.jsonl.
        ImportError: If matplotlib is not installed.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError('drawing needs matplotlib: pip install "iwin-dit[plot]"') from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4), layout="constrained")
    for run in runs:
        log = run / "metrics.jsonl"
        if not log.is_file():
            raise ValueError(f"expected a run folder with metrics.jsonl, got {run}")
        records = read_metrics(log)
        for key, style in (("loss", {"alpha": 0.5, "linewidth": 0.8}), ("validation_loss", {"marker": "o"})):
            points = [(record["images"], record[key]) for record in records if record.get(key) is not None]
            axes.plot(*zip(*points, strict=True), label=f"{run.name} {key.replace('_', ' ')}", **style)
    axes.set(xlabel="images seen", ylabel="loss")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(out, dpi=120)


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description="Draw training and validation loss of one or several runs.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, help="PNG to write (default: loss.png in the first run folder)")
    arguments = parser.parse_args()
    out = arguments.out or arguments.runs[0] / "loss.png"
    plot_losses(arguments.runs, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
