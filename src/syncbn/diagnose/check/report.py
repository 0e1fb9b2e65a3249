"""What a check found: as an object, a table in plain text, and JSON."""

from __future__ import annotations

import json
import math
import textwrap
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from .causes import Cause
from .compare import (
    LOSS,
    OUTPUT,
    OUTPUT_GRADIENT,
    QUANTITIES,
    STATISTICS,
    WEIGHT,
    WEIGHT_GRADIENT,
)
from .options import Task, spoken
from .rows import Row

COLUMNS = {
    "output": (OUTPUT, LOSS),
    "gradients": (OUTPUT_GRADIENT, WEIGHT_GRADIENT),
    "weights": (WEIGHT,),
    "statistics": (STATISTICS,),
}
HEADINGS = ("layer", "kind", "sync", "calls", *COLUMNS, "verdict")
_WIDTH = 100


@dataclass(frozen=True)
class Report:
    """What :func:`syncbn.check` returns; ``str()`` of it is the table that the command prints.

    Attributes:
        ok: whether everything is equal, to rounding that does not grow.
        first: the name of the first layer that departs, "(model)" or "(loss)"; None if none does.
        verdict: equal, rounding or different.
        rows: a :class:`Row` for each layer in forward order, the model as a whole and the loss.
        causes: why, in plain words, of the first departure.
        notes: what is no fault, but good to know.
        task: what was checked, and how.
        seconds: how long it took.
        versions: of syncbn and torch.
    """

    ok: bool
    first: str | None
    verdict: str
    rows: tuple[Row, ...]
    causes: tuple[Cause, ...]
    notes: tuple[str, ...]
    task: Task
    seconds: float
    versions: dict[str, str]

    def __str__(self) -> str:
        lines = [self.headline, *_wrapped(self.configuration), "", *table(self), ""]
        for each in self.causes:
            lines += _wrapped(f"{each.layer}: {each.text}")
        for note in self.notes:
            lines += _wrapped(f"Note: {note}")
        return "\n".join(lines).rstrip()

    @property
    def headline(self) -> str:
        """The finding in one line."""
        if self.ok:
            return "EQUAL: ranks train as one process with the whole batch does"
        if self.verdict == "rounding":
            return f"NOT SHOWN: rounding grows from {self.first} on"
        return f"DIFFERENT: {self.first} is the first to depart"

    @property
    def configuration(self) -> str:
        """What was compared, in one sentence."""
        task = self.task
        what = spoken(task.factory) + (", converted" if task.convert else "")
        split = " + ".join(map(str, task.shares))
        return (
            f"{what}: {_count(task.batch, 'sample')} on {_count(task.ranks, 'rank')} ({split}), "
            f"{_count(task.steps, 'step')} in {task.dtype}; equal is up to {task.tolerance:.0e} of "
            f"the largest value; {self.seconds:.0f} s"
        )

    def as_json(self) -> str:
        """One JSON object; a number that is not finite is a string."""
        content = {
            "ok": self.ok,
            "verdict": self.verdict,
            "first": self.first,
            "causes": [asdict(each) for each in self.causes],
            "notes": list(self.notes),
            "rows": [_row_as_dict(row) for row in self.rows],
            "options": _options(self.task),
            "tolerance": self.task.tolerance,
            "shares": self.task.shares,
            "seconds": self.seconds,
            "versions": self.versions,
        }
        return json.dumps(content, indent=2, allow_nan=False)


def _options(task: Task) -> dict[str, Any]:
    named = {name: getattr(task, name) for name in ("factory", "data", "loss")}
    return asdict(task) | {name: each and spoken(each) for name, each in named.items()}


def _row_as_dict(row: Row) -> dict[str, Any]:
    differences = {
        name: _finite(row.differences[name]) if name in row.differences else None
        for name in QUANTITIES
    }
    return asdict(row) | {"differences": differences}


def _finite(value: float) -> float | str:
    return value if math.isfinite(value) else str(value)


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def cells(row: Row) -> list[str]:
    """A row's texts, below :data:`HEADINGS`."""
    sync = {None: "", True: "yes", False: "no"}[row.synchronised]
    calls = [str(row.calls)] if row.calls_on_ranks else []
    if any(count != row.calls for count in row.calls_on_ranks):
        calls += ["/", ",".join(map(str, row.calls_on_ranks))]
    numbers = [
        max((row.differences[name] for name in names if name in row.differences), default=None)
        for names in COLUMNS.values()
    ]
    texts = ["" if number is None else _short(number) for number in numbers]
    return [row.layer, row.kind, sync, "".join(calls), *texts, row.verdict]


def _short(number: float) -> str:
    return "0" if number == 0 else f"{number:.0e}"


def table(report: Report) -> Sequence[str]:
    """Lines of plain text; the first that departs is marked."""
    marked = [(">" if row.first else " ", cells(row)) for row in report.rows]
    lines = [(" ", list(HEADINGS)), *marked]
    wide = [max(len(line[place]) for _, line in lines) for place in range(len(HEADINGS))]
    found = []
    for mark, line in lines:
        padded = (
            f"{text:>{width}}" if 3 <= place <= 7 else f"{text:{width}}"
            for place, (text, width) in enumerate(zip(line, wide, strict=True))
        )
        found.append(f"{mark} {'  '.join(padded)}".rstrip())
    return found


def _wrapped(text: str) -> list[str]:
    return textwrap.wrap(text, _WIDTH, subsequent_indent="  ", break_long_words=False)
