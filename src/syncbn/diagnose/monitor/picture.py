"""The heat map of a Monitor: layers × steps."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Map(NamedTuple):
    """names: of the rows, from the top; ends: what is said to the right of them; values: (rows,
    columns), nan where there is none; steps: of the columns; label: of the colours.
    """

    names: Sequence[str]
    ends: Sequence[str]
    steps: Sequence[int]
    values: Sequence[Sequence[float]]
    title: str
    label: str


def check_target(target: Any) -> None:
    """Refuse what cannot be drawn to, before anything is drawn."""
    if callable(getattr(target, "add_figure", None)):
        return
    if not isinstance(target, (str, os.PathLike)):
        raise TypeError(
            "Monitor.plot: expected the path of a picture, or a TensorBoard writer with "
            f"add_figure(tag, figure, step), got {type(target).__name__}"
        )
    path = Path(target)
    formats = sorted(_canvas().get_supported_filetypes())
    if path.suffix[1:].lower() not in formats:
        raise ValueError(
            f"Monitor.plot: expected a path that ends in one of .{', .'.join(formats)}, got "
            f"{str(path)!r}"
        )
    if not path.parent.is_dir():
        raise FileNotFoundError(
            f"Monitor.plot: expected a path in a folder that exists, got {str(path)!r}; make "
            f"{str(path.parent)!r} first"
        )
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise PermissionError(
            f"Monitor.plot: expected a path that can be written, got {str(path)!r}; choose another"
        )


def draw(found: Map) -> Any:
    """The figure, matplotlib's."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    rows, columns = len(found.names), len(found.steps)
    figure = Figure(figsize=(9, 1.7 + 0.27 * max(rows, 3)), dpi=150, layout="constrained")
    _canvas()(figure)
    axes = figure.add_subplot()
    axes.set_facecolor("0.85")  # where there is no value
    image = axes.imshow(
        found.values, aspect="auto", cmap="viridis", interpolation="nearest", vmin=0
    )
    axes.set_yticks(range(rows), found.names)
    right = axes.secondary_yaxis("right")
    right.set_yticks(range(rows), found.ends)
    right.tick_params(length=0, labelsize=8)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.xaxis.set_major_formatter(
        lambda at, _: str(found.steps[int(at)]) if 0 <= at < columns else ""
    )
    axes.set_xlabel("step (forward in training)")
    axes.set_ylabel("layer")
    axes.tick_params(axis="y", labelsize=8)
    axes.set_title(found.title, loc="left", fontsize=11)
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.03 if rows > 8 else 0.05)
    bar.set_label(found.label, fontsize=8)
    return figure


def _canvas() -> Any:
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise ImportError(
            f"Monitor.plot: expected matplotlib, which is not installed ({error}); "
            "pip install 'syncbn[plot]'"
        ) from error
    return FigureCanvasAgg
