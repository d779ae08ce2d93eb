"""Draw the curves of runs: `python -m iwin_dit.training.plot RUN [RUN ...] [--out FILE]`."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..charts import Panel, Series, save_charts
from .log import read_metrics

PANELS: dict[str, dict[str, dict[str, Any]]] = {  # title: keys of metrics.jsonl and how they are drawn
    "loss": {"loss": {"alpha": 0.5, "linewidth": 0.8}, "validation_loss": {"marker": "."}},
    "gradient norm": {"grad_norm": {"linewidth": 0.8}},
    "images / s": {"images_per_second": {"linewidth": 0.8}},
}
NO_METRIC = "eval_seconds"  # of what evaluations write under eval_*


def plot_runs(runs: Sequence[Path], out: Path) -> None:
    """Draw losses, gradient norm and speed against images seen, and a panel for each metric of evaluations.

    Args:
        runs: Run folders; each has a metrics.jsonl.
        out: Picture to write.

    Raises:
        ValueError: If a folder has no metrics.jsonl.
        ImportError: If matplotlib is not installed.
    """
    for run in runs:
        if not (run / "metrics.jsonl").is_file():
            raise ValueError(f"expected a run folder with metrics.jsonl, got {run}")
    records = {run: read_metrics(run / "metrics.jsonl") for run in runs}
    keys = {key: None for lines in records.values() for line in lines for key in line}  # a set in order
    metrics = [key for key in keys if key.startswith("eval_") and key != NO_METRIC]
    panels = PANELS | {key.removeprefix("eval_"): {key: {"marker": "."}} for key in metrics}
    save_charts(
        [
            Panel("images seen", title, _series(records, styles, title == "loss"), height=3 if title == "loss" else 1)
            for title, styles in panels.items()
        ],
        out,
        share_x=True,
    )


def _series(
    records: Mapping[Path, Sequence[Mapping[str, Any]]], styles: Mapping[str, Mapping[str, Any]], labelled: bool
) -> list[Series]:
    """Curves of a panel: each key of each run, which has the same colour in all panels."""
    series = []
    for number, (run, lines) in enumerate(records.items()):
        for key, style in styles.items():
            points = [(line["images"], line[key]) for line in lines if line.get(key) is not None]
            label = f"{run.name} {key.replace('_', ' ')}" if labelled else ""
            images, values = [x for x, _ in points], [y for _, y in points]
            series.append(Series(label, images, values, {"color": f"C{number}", **style}))
    return series


def main() -> None:
    """Read the command line and draw."""
    parser = argparse.ArgumentParser(description="Draw the curves of one or several runs.")
    parser.add_argument("runs", nargs="+", type=Path, help="run folders")
    parser.add_argument("--out", type=Path, help="picture to write (default: curves.png in the first run folder)")
    arguments = parser.parse_args()
    out = arguments.out or arguments.runs[0] / "curves.png"
    plot_runs(arguments.runs, out)
    print(f"wrote {out}")


if __name__ == "__main__":
    main()
