"""The picture: for each input a bar per layer, syncbn's split into where its time goes."""

from __future__ import annotations

import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .figures import ARITHMETIC, MESSAGES, WAITING, Row, balance_of
from .measure import LOCAL_PEER, NAIVE, SYNC_PEER, SYNCBN
from .report import Report, described, milliseconds, sentence, sized, title

# Okabe & Ito's colours, told apart by colour-blind readers.
_PARTS = {
    ARITHMETIC: ("arithmetic", "#0072B2"),
    MESSAGES: ("messages", "#D55E00"),
    WAITING: ("waiting for other ranks", "#F0C27B"),
}
_PEERS = {
    LOCAL_PEER: ("torch.nn.BatchNorm, not synchronised", "0.75"),
    SYNC_PEER: ("torch.nn.SyncBatchNorm", "#CC79A7"),
    NAIVE: ("naive synchronised layer", "#999933"),
}
_MOST = 12  # cases; of more, those that take longest
_HEIGHT, _GAP = 0.22, 0.7  # inches of a bar; bars between cases


def draw(report: Report, path: Path) -> None:
    """Write it to ``path``: time of forward and backward, times calls."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = _chosen(report)
    bars = len([kind for kind in (SYNCBN, *_PEERS) if kind in report.total])
    size = (9, 2.7 + _HEIGHT * (bars + _GAP) * len(rows))
    figure = Figure(figsize=size, dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for number, row in enumerate(rows):
        _draw_case(axes, row, number * (bars + _GAP))
    middles = [number * (bars + _GAP) + (bars - 1) / 2 for number in range(len(rows))]
    axes.set_yticks(middles, [_label(row) for row in rows])
    axes.set_ylim((bars + _GAP) * len(rows) - _GAP, -0.8)
    axes.set_xlim(0, axes.get_xlim()[1] * 1.08)
    per = "step" if report.options.model is not None else "call"
    axes.set_xlabel(f"forward + backward per {per} and rank (ms)")
    axes.grid(axis="x", color="0.92")
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    handles, labels = axes.get_legend_handles_labels()
    shown = dict(zip(labels, handles, strict=True))
    figure.legend(shown.values(), shown, loc="outside lower center", ncols=3, frameon=False)
    figure.suptitle(title(report), x=0.01, ha="left", weight="bold", fontsize=11)
    axes.set_title(_texts(report, len(rows)), loc="left", fontsize=8)
    figure.savefig(path)


def _texts(report: Report, drawn: int) -> str:
    more = len(report.rows) - drawn
    lines = [sentence(report), f"{described(report)}."]
    lines += [f"Drawn: the {drawn} inputs that take longest, of {len(report.rows)}."] * bool(more)
    return "\n".join(textwrap.fill(line, 120) for line in lines) + "\n"


def _chosen(report: Report) -> list[Row]:
    def cost(row: Row) -> float:
        return row.case.calls * row.times[SYNCBN]["both"].median_ms

    least = sorted(map(cost, report.rows), reverse=True)[:_MOST][-1]
    return [row for row in report.rows if cost(row) >= least][:_MOST]


def _label(row: Row) -> str:
    case = row.case
    calls = f" ({case.calls} layers)" if case.calls > 1 else ""
    return sized(case) + calls


def _draw_case(axes: Any, row: Row, place: float) -> None:
    def both(kind: str) -> float:
        return row.case.calls * row.times[kind]["both"].median_ms

    ours, found = both(SYNCBN), balance_of(row.times)
    parts = {ARITHMETIC: 1.0} if found is None else asdict(found)
    end = 0.0
    for name, share in parts.items():
        label, colour = _PARTS[name]
        axes.barh(place, share * ours, 0.86, left=end, color=colour, label=f"syncbn: {label}")
        end += share * ours
    _say(axes, ours, place, f"{milliseconds(ours)} ms")
    for kind, (name, colour) in _PEERS.items():
        if kind in row.times:
            place += 1
            axes.barh(place, both(kind), 0.86, color=colour, label=name)
            _say(axes, both(kind), place, f"{row.times[kind]['both'].over_syncbn:.2f} × syncbn")


def _say(axes: Any, end: float, place: float, text: str) -> None:
    axes.text(end, place, f" {text}", va="center", fontsize=7, color="0.2")
