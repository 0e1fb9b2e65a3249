"""A progress bar on standard error, for what users ask for by ``progress=True``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


def check_progress(operation: str) -> None:
    """Refuse where the extra is missing."""
    try:
        import rich.progress  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{operation}: expected rich, which progress=True shows its bar with, got none; "
            "pip install 'syncbn[cli]', or leave progress out"
        ) from error


@contextmanager
def bar(description: str, total: int | None, shown: bool) -> Iterator[Callable[[], Any]]:
    """Shows a bar while open, if it is to; yields what is to be called after each of the steps."""
    if not shown:
        yield lambda: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = TextColumn("{task.description}"), BarColumn(bar_width=24), MofNCompleteColumn()
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True)) as progress:
        task = progress.add_task(description, total=total)
        yield lambda: progress.advance(task)
