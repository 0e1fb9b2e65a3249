"""The picture of scale.py: time and received bytes against the number of ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from syncbn.comm import are_many

# Okabe & Ito's, in the order of ways; syncbn's lies below the one that it takes.
COLOURS = ("#D55E00", "#E69F00", "#CC79A7", "#0072B2", "#F0E442", "#009E73")
WIDE = "syncbn"


def draw(rows: list[dict[str, Any]], model: str, path: Path) -> None:
    figure = Figure(figsize=(11, 5.2), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    time, received = figure.subplots(1, 2)
    names = list(dict.fromkeys(row["way"] for row in rows))
    for name, colour in zip(names, COLOURS, strict=True):
        own = [row for row in rows if row["way"] == name]
        style = {"color": colour, "linewidth": 1.6, "label": name}
        if name == WIDE:
            style |= {"linewidth": 9, "zorder": 1, "solid_capstyle": "butt"}
        for part in split(own) if name == WIDE else [own]:
            ranks = [row["ranks"] for row in part]
            time.plot(ranks, [row["NCCL_us"] for row in part], **style)
            received.plot(ranks, [row["received_bytes"] for row in part], **style)
            style["label"] = f"_{name}"
        if name != WIDE and any(row["NCCL_us"] != row["MPI_us"] for row in own):
            dotted = style | {"linestyle": ":"}
            time.plot(ranks, [row["MPI_us"] for row in own], **dotted)
    time.plot([], [], ":", color="0.4", label="over MPI (solid: over NCCL)")
    time.set(title="time per layer, forward and backward, µs", xlabel="ranks")
    received.set(title="bytes received per rank and layer, forward and backward", xlabel="ranks")
    for axes in (time, received):
        axes.title.set_fontsize(10)
        axes.set(xscale="log", yscale="log")
        axes.grid(color="0.92")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    handles, labels = time.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False)
    finding = "Beyond 64 ranks each receives as much, however many they are"
    figure.suptitle(f"{finding}\n", fontsize=12, x=0.01, ha="left")
    figure.text(0.01, 0.945, model, fontsize=7, color="0.4", va="top")
    figure.savefig(path)


def split(rows: list[dict[str, Any]]) -> list[list[dict[str, Any]]]:
    """Those of ranks that gather, and those of more."""
    parts = [[row for row in rows if are_many(row["ranks"]) == many] for many in (False, True)]
    return [part for part in parts if part]
