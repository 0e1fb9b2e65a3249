"""The picture of the three validation curves."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .options import PLAIN, SYNCBN, WHOLE, Arm
from .report import configuration, of
from .run import Report

# Okabe & Ito's colours, told apart by colour-blind readers; the one process lies pale and broad
# beneath syncbn's dashes, so that both are seen where they coincide.
_STYLES: dict[Arm, dict[str, Any]] = {
    WHOLE: {"color": "#56B4E9", "linewidth": 8, "alpha": 0.55, "solid_capstyle": "round"},
    SYNCBN: {"color": "#0B3C5D", "linewidth": 2, "linestyle": (0, (5, 2))},
    PLAIN: {"color": "#D55E00", "linewidth": 2, "marker": "o", "markersize": 4},
}
_NAMES = {
    WHOLE: "one process, whole batch",
    SYNCBN: "syncbn",
    PLAIN: "BatchNorm on each rank",
}


def draw(report: Report, path: Path) -> None:
    """Write validation accuracy against epochs, three curves, to ``path``."""
    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for arm, style in _STYLES.items():
        found = of(report, arm)
        axes.plot(
            [point.epoch for point in found.curve],
            [point.accuracy_percent for point in found.curve],
            label=_NAMES[arm],
            **style,
        )
    options = report.options
    seen = options.steps_per_epoch * options.global_batch
    axes.set_xlabel(f"training time (epochs of {seen:,} images)")
    axes.set_ylabel("validation accuracy (%)")
    axes.set_xlim(0, options.epochs * 1.02)
    axes.set_ylim(0, 102)
    axes.axhline(10, color="0.6", linewidth=1, linestyle=":")
    axes.text(options.epochs, 11, "guessing", color="0.4", ha="right", va="bottom", fontsize=9)
    axes.grid(color="0.92")
    axes.spines[["top", "right"]].set_visible(False)
    # Below, not inside: plain BatchNorm's curve may be anywhere.
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    axes.set_title(_title(report), loc="left", fontsize=12)
    figure.savefig(path)


def _title(report: Report) -> str:
    plain, sync, whole = (of(report, arm).accuracy_percent for arm in (PLAIN, SYNCBN, WHOLE))
    return (
        f"{configuration(report.options)}: BatchNorm reaches {plain:.0f} %, syncbn {sync:.0f} %,\n"
        f"one process with the whole batch {whole:.0f} %"
    )
