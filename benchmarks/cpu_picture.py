"""What cpu.py shows: the environment, tables, and the picture of ratios, gpu_speed.py's too."""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullLocator

import syncbn
from tabular import print_table

COLOURS = {"forward": "#0072B2", "backward": "#E69F00"}  # Okabe & Ito's
HEIGHT = 0.38


def draw(rows: list[dict[str, Any]], environment: str, path: Path) -> None:
    """A panel per number of threads."""
    panels: dict[str, list[dict[str, Any]]] = {}
    for row in sorted(rows, key=lambda row: row["threads"]):
        count = row["threads"]
        panels.setdefault(f"{count} thread{'s' * (count > 1)}", []).append(row)
    draw_panels(panels, finding(rows), environment, path)


def draw_panels(
    rows_of: dict[str, list[dict[str, Any]]],
    finding: str,
    environment: str,
    path: Path,
    peer: str = "torch.nn.BatchNorm",
) -> None:
    """A panel for each name, in it two bars per tensor."""
    rows = [row for each in rows_of.values() for row in each]
    places, groups = placed(rows)
    size = (3 + 4.2 * len(rows_of), 1.9 + 0.29 * max(places.values()))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(rows_of), sharex=True, sharey=True, squeeze=False)[0]
    for (name, own), axes in zip(rows_of.items(), panels, strict=True):
        for row in own:
            bar(axes, row, places[tensor(row)])
        axes.axvline(1, color="black", linewidth=1)
        axes.set_title(name, fontsize=10)
        axes.set_xlabel(f"time of {peer} / time of syncbn (×, log scale)")
        axes.grid(axis="x", color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    first = panels[0]
    first.set_yticks(list(places.values()), ["×".join(map(str, shape)) for _, shape in places])
    first.set_ylabel("shape of the tensor (N × C × …)")
    top = max(row["ratio"] for row in rows)
    bottom = min(0.8, *(row["ratio"] for row in rows))
    first.set(
        xscale="log", xlim=(bottom / 1.05, top * 1.25), ylim=(max(places.values()) + 0.7, -0.6)
    )
    first.set_xticks([n for n in (0.25, 0.5, 1, 2, 4, 8, 16, 32) if bottom <= n <= top * 1.25])
    first.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
    first.xaxis.set_minor_locator(NullLocator())
    for axes in panels:
        for name, place in groups.items():
            axes.text(1.02, place, f" {name}", fontsize=8, va="center", weight="bold", color="0.25")
    handles, labels = first.get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(f"{finding}\n", fontsize=12, x=0.01, ha="left")
    figure.text(0.01, 0.965, environment, fontsize=7, color="0.4", va="top")
    figure.savefig(path)


def tensor(row: dict[str, Any]) -> tuple[str, tuple[int, ...]]:
    return f"{row['dtype']} {row['layout']}", tuple(row["shape"])


def placed(rows: list[dict[str, Any]]) -> tuple[dict[tuple, float], dict[str, float]]:
    """Where every tensor's bars lie, and every group's name above them."""
    places: dict[tuple, float] = {}
    groups: dict[str, float] = {}
    place = 0.0
    for key in dict.fromkeys(map(tensor, rows)):
        if key[0] not in groups:
            groups[key[0]] = place
            place += 0.85
        places[key] = place
        place += 1
    return places, groups


def bar(axes: Any, row: dict[str, Any], place: float) -> None:
    forward = row["pass"] == "forward"
    middle = place + (-HEIGHT / 2 if forward else HEIGHT / 2)
    ratio = row["ratio"]
    axes.barh(middle, ratio - 1, HEIGHT, left=1, color=COLOURS[row["pass"]], label=row["pass"])
    axes.text(max(ratio, 1), middle, f"  {ratio:.2f}", va="center", fontsize=6.5, color="0.2")


def finding(rows: list[dict[str, Any]]) -> str:
    ratios = [row["ratio"] for row in rows]
    range_ = f"{min(ratios):.1f} to {max(ratios):.1f}×"
    faster = sum(ratio >= 1 for ratio in ratios)
    where = "everywhere" if faster == len(ratios) else f"in {faster} of {len(ratios)} cases"
    return f"BatchNorm in training on the CPU: syncbn is faster than torch {where} ({range_})"


def environment(what: str) -> str:
    kernels = syncbn.kernels.select_kernels(torch.empty(1, 1)).steps.NAME
    versions = f"torch {torch.__version__}, syncbn {syncbn.__version__} ({kernels} kernels)"
    machine = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return f"{what}; {versions}, Python {platform.python_version()}, {machine}"


def report(title: str, what: str, rows: list[dict[str, Any]], as_json: bool) -> None:
    if as_json:
        json.dump({"environment": environment(what), "rows": rows}, sys.stdout, indent=1)
        return
    print_table(title, environment(what), rows)
