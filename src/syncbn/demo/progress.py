"""A progress bar per arm."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from ..progress import bars
from .options import ARMS, Arm, DemoOptions
from .train import Progress


@contextmanager
def arm_bars(options: DemoOptions) -> Iterator[Callable[[Arm, Progress], None]]:
    """Shows the bars while open; yields what :func:`syncbn.demo.run.run` calls on progress."""
    steps = options.epochs * options.steps_per_epoch
    shown = bars("steps", after="{task.fields[accuracy]}")
    tasks = {arm: shown.add_task(arm.label, total=steps, start=False, accuracy="") for arm in ARMS}

    def on_progress(arm: Arm, progress: Progress) -> None:
        task, accuracy = tasks[arm], progress.accuracy_percent
        shown.start_task(task)
        text = "" if accuracy is None else f"{accuracy:.0f} % right"
        shown.update(task, completed=progress.step, accuracy=text)

    with shown:
        yield on_progress
