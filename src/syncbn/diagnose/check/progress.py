"""A progress bar on standard error: standard output is for the report."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn


@contextmanager
def bar(
    unit: str = "steps", *, everywhere: bool = True
) -> Iterator[Callable[[str, int, int], None]]:
    """Shows it while open; yields what :func:`syncbn.check` calls on progress.

    everywhere: also where standard error is no terminal, once it ends.
    """
    console = Console(stderr=True)
    shown = Progress(
        TextColumn("{task.description:26}"),
        BarColumn(bar_width=24),
        MofNCompleteColumn(),
        TextColumn(unit),
        TimeElapsedColumn(),
        console=console,
        refresh_per_second=5,
        disable=not (everywhere or console.is_terminal),
    )
    task = shown.add_task("starting", total=None)

    def on_progress(what: str, done: int, total: int) -> None:
        shown.update(task, description=what, completed=done, total=total)

    with shown:
        yield on_progress
