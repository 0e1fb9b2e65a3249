"""Rows of figures as a table: (median, spread) as 1.2 ± 0.1, shapes as 2×3×4."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

_WIDTH = 150  # of a table that goes to a file


def print_table(
    title: str,
    caption: str,
    rows: Sequence[dict[str, Any]],
    ends: Callable[[dict[str, Any]], bool] = lambda row: False,
) -> None:
    """A column for each key of any row. ends: whether a line is drawn below a row."""
    table = Table(title=title, caption=caption)
    columns = list(dict.fromkeys(key for row in rows for key in row))
    for key in columns:
        heading = key.replace("_us", " µs").replace("_over_", " / ").replace("_", " ")
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        table.add_row(*(shown(row.get(key, "")) for key in columns), end_section=ends(row))
    Console(width=None if sys.stdout.isatty() else _WIDTH).print(table)


def shown(value: Any) -> str:
    if isinstance(value, (tuple, list)):
        floats = isinstance(value[0], float)
        return " ± ".join(map(shown, value)) if floats else "×".join(map(str, value))
    if not isinstance(value, float):
        return str(value)
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
