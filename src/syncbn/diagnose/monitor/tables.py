"""The rows of a Monitor, and how they print."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch.nn as nn

from .layers import Layer
from .record import Record, effective_size_of, rms


class Row(NamedTuple):
    """One layer over the steps that were observed. Formulas: docs/monitor.md.

    mean_distance, var_distance: root mean square over ranks and steps; noise: likewise, of the mean
    of one batch; effective_size: how many independent values such a batch is worth. All nan where
    the layer got no values. mean_distances, var_distances: those of each rank.
    dead: channels whose variance was below eps in the last step that was observed.
    nonfinite: channels that were infinite or nan on some rank, the most in a step;
    nonfinite_steps: steps with any. skipped: steps in which the layer got no values, or was not
    called, on some rank. skipped_batches: what the layer counts where it has ``skip_nonfinite``.
    """

    layer: str
    channels: int
    mean_distance: float
    var_distance: float
    noise: float
    effective_size: float
    dead: int
    nonfinite: int
    nonfinite_steps: int
    skipped: int
    skipped_batches: int
    mean_distances: tuple[float, ...]
    var_distances: tuple[float, ...]


_HEADINGS = (
    "layer",
    "channels",
    "mean",
    "var",
    "noise",
    "effective",
    "dead",
    "nonfinite",
    "skipped",
)


class Table(list[Row]):
    """Rows in the model's order; ``str()`` shows them."""

    def __init__(self, rows: Sequence[Row], title: str) -> None:
        super().__init__(rows)
        self.title = title

    def __str__(self) -> str:
        lines = [_HEADINGS, *map(_cells, self)]
        wide = [max(len(line[i]) for line in lines) for i in range(len(_HEADINGS))]
        shown = (
            "  ".join(f"{cell:{'<' if i == 0 else '>'}{wide[i]}}" for i, cell in enumerate(line))
            for line in lines
        )
        return "\n".join((self.title, *shown))


def table_of(record: Record, layers: Sequence[Layer], ranks: int, every: int) -> Table:
    series, distances = record.series(), record.distances()
    rows = []
    for number, layer in enumerate(layers):
        own = {name: values[:, number] for name, values in series.items()}
        rows.append(
            Row(
                layer=layer.name,
                channels=layer.channels,
                mean_distance=rms(own["mean_distance"]),
                var_distance=rms(own["var_distance"]),
                noise=rms(own["noise"]),
                effective_size=effective_size_of(own["noise"]),
                dead=int(own["dead"][-1]),
                nonfinite=int(own["nonfinite"].max()),
                nonfinite_steps=int((own["nonfinite"] > 0).sum()),
                skipped=int((own["skipped"] > 0).sum()),
                skipped_batches=_skipped_batches(layer.module()),
                mean_distances=tuple(distances[0, :, number].tolist()),
                var_distances=tuple(distances[1, :, number].tolist()),
            )
        )
    steps = len(record.steps)
    title = f"{_counted(ranks, 'rank')}, {_counted(steps, 'step')} observed, every {every}"
    alone = "; one rank is not distant from itself" if ranks == 1 else ""
    return Table(rows, f"{title}{alone}")


def _counted(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _cells(row: Row) -> tuple[str, ...]:
    figures = (row.mean_distance, row.var_distance, row.noise)
    return (
        *(row.layer, str(row.channels)),
        *(_shown(figure, 3) for figure in figures),
        *(_shown(row.effective_size, 1), str(row.dead), str(row.nonfinite)),
        str(row.skipped + row.skipped_batches),
    )


def _shown(figure: float, digits: int) -> str:
    return "–" if math.isnan(figure) else f"{figure:.{digits}f}"


def _skipped_batches(module: nn.Module | None) -> int:
    counter = None if module is None else module._buffers.get("num_batches_skipped")
    return 0 if counter is None else int(counter)
