"""Curves as a picture; the one file that imports matplotlib. Must not know what is drawn."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .files import write_durably

_WIDTH, _UNIT = 7.0, 1.4  # inches: of the picture, and of a panel of height 1


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes:
        label: Its name in the legend; an empty one has no entry there.
        x: Horizontal positions.
        y: Vertical positions, as many.
        style: Arguments of matplotlib's `Axes.plot`: color, marker, alpha and so on.
    """

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Panel:
    """Curves on common axes.

    Attributes:
        xlabel: Name of the horizontal axis.
        ylabel: Name of the vertical axis.
        series: The curves.
        height: Relative to that of the other panels.
    """

    xlabel: str
    ylabel: str
    series: Sequence[Series]
    height: float = 1


def require_matplotlib() -> None:
    """Ask for matplotlib before the work whose result is to be drawn.

    Raises:
        ImportError: If it is not installed.
    """
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise ImportError('drawing needs matplotlib: pip install "iwin-dit[plot]"') from error


def save_charts(panels: Sequence[Panel], path: Path, *, share_x: bool = False) -> None:
    """Draw panels, one below the other.

    Args:
        panels: At least one.
        path: Picture to write or replace; its suffix says in which format.
        share_x: One horizontal axis for all, named at the last panel.

    Raises:
        ImportError: If matplotlib is not installed.
        ValueError: If the suffix is no format that matplotlib writes.
    """
    require_matplotlib()
    from matplotlib.figure import Figure  # not pyplot, which keeps every figure and wants a display

    heights = [panel.height for panel in panels]
    figure = Figure(figsize=(_WIDTH, _UNIT * sum(heights)), layout="constrained")
    grid = figure.subplots(len(panels), squeeze=False, sharex=share_x, height_ratios=heights)
    for number, (panel, axes) in enumerate(zip(panels, grid[:, 0], strict=True), 1):
        for series in panel.series:
            axes.plot(series.x, series.y, label=series.label or None, **series.style)
        axes.set(ylabel=panel.ylabel, xlabel="" if share_x and number < len(panels) else panel.xlabel)
        axes.grid(alpha=0.3)
        if any(series.label for series in panel.series):
            axes.legend()
    file_format = path.suffix.removeprefix(".")
    if file_format not in figure.canvas.get_supported_filetypes():
        raise ValueError(f"expected a picture such as {path.with_suffix('.png').name}, got {path.name}")
    write_durably(path, lambda temporary: figure.savefig(temporary, dpi=120, format=file_format))
