"""Progress bars on standard error: standard output is for results. By rich, extra ``[cli]``."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.progress import Progress


def check_progress(operation: str) -> None:
    """Refuse where the extra is missing."""
    try:
        import rich.progress  # noqa: F401
    except ImportError as error:
        raise ImportError(
            f"{operation}: expected rich, which progress=True shows its bar with, got none; "
            "pip install 'syncbn[cli]', or leave progress out"
        ) from error


def bars(unit: str = "", *, width: int = 0, after: str = "", everywhere: bool = True) -> Progress:
    """Bars to add tasks to and to open: description, bar, how many of how many, time.

    unit: what is counted. width: of descriptions, at least. after: a format of the task's fields.
    everywhere: also where standard error is no terminal, once they end.
    """
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    console = Console(stderr=True)
    return Progress(
        TextColumn(f"{{task.description:{width or ''}}}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        *([TextColumn(unit)] if unit else []),
        TimeElapsedColumn(),
        *([TextColumn(after)] if after else []),
        console=console,
        refresh_per_second=5,
        disable=not (everywhere or console.is_terminal),
    )


@contextmanager
def step_bar(description: str, total: int | None, shown: bool) -> Iterator[Callable[[], Any]]:
    """Shows a bar while open, if it is to; yields what is to be called after each of the steps."""
    if not shown:
        yield lambda: None
        return
    with bars() as progress:
        task = progress.add_task(description, total=total)
        yield lambda: progress.advance(task)


@contextmanager
def phase_bar(unit: str, *, everywhere: bool = True) -> Iterator[Callable[[str, int, int], None]]:
    """Shows a bar while open; yields what is to be told what is being done, and how far it is."""
    with bars(unit, width=26, everywhere=everywhere) as progress:
        task = progress.add_task("starting", total=None)

        def on_progress(what: str, done: int, total: int) -> None:
            progress.update(task, description=what, completed=done, total=total)

        yield on_progress
