"""Draw the curves of runs: `python -m iwin_dit.training.plot RUN [RUN ...] [--out FILE]`."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .log import read_metrics

PANELS: dict[str, dict[str, dict[str, Any]]] = {  # title: keys of metrics.jsonl and how they are drawn
    "loss": {"loss": {"alpha": 0.5, "linewidth": 0.8}, "validation_loss": {"marker": "."}},
    "gradient norm": {"grad_norm": {"linewidth": 0.8}},
    "images / s": {"images_per_second": {"linewidth": 0.8}},
}


def plot_runs(runs: Sequence[Path], out: Path) -> None:
    """Draw losses, gradient norm and speed against images seen.

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

    figure, panels = pyplot.subplots(
        len(PANELS), figsize=(7, 7), sharex=True, height_ratios=(3, 1, 1), layout="constrained"
    )
    for number, run in enumerate(runs):
        log = run / "metrics.jsonl"
        if not log.is_file():
            raise ValueError(f"expected a run folder with metrics.jsonl, got {run}")
        records = read_metrics(log)
        for axes, (title, keys) in zip(panels, PANELS.items(), strict=True):
            for key, style in keys.items():
                points = [(record["images"], record[key]) for record in records if record.get(key) is not None]
                label = f"{run.name} {key.replace('_', ' ')}"
                axes.plot(*zip(*points, strict=True), label=label, color=f"C{number}", **style)
            axes.set(ylabel=title)
            axes.grid(alpha=0.3)
    panels[0].legend()
    panels[-1].set(xlabel="images seen")
    figure.savefig(out, dpi=120)


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description="Draw the curves of one or several runs.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, help="PNG to write (default: curves.png in the first run folder)")
    arguments = parser.parse_args()
    out = arguments.out or arguments.runs[0] / "curves.png"
    plot_runs(arguments.runs, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
