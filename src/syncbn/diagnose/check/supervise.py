"""Starts the ranks of a check, hears how far they are, and judges what they leave."""

from __future__ import annotations

import json
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ... import launch
from ..._version import __version__
from . import train
from .causes import cause, notes
from .compare import DIFFERENT, EQUAL, ROUNDING
from .judge import departure, gathered
from .options import Task, Unusable, spoken
from .report import Report
from .rows import rows
from .train import ALONE, RANKS, Progress, Raised

OnProgress = Callable[[str, int, int], None]
_PHASES = {
    "factory": "calling the factory",
    train.REFERENCE: "one process",
    train.PERTURBED: "one process, perturbed",
    train.RESEEDED: "one process, another seed",
    RANKS: "the ranks",
}


def supervised(task: Task, on_progress: OnProgress | None) -> Report:
    """Run the check. Raises as :func:`syncbn.check` does."""
    start = time.perf_counter()
    total = task.steps * (len(ALONE) + 1)
    latest = "starting"

    def hear(progress: Progress) -> None:
        nonlocal latest
        latest = _PHASES[progress.phase]
        if on_progress is not None:
            on_progress(latest, progress.steps, total)

    with _ending_on_sigterm(), tempfile.TemporaryDirectory(prefix="syncbn-") as name:
        folder = Path(name)
        raised = None
        try:
            launch.launch(
                train.run_rank,
                task,
                ranks=task.ranks,
                on_message=hear,
                folder=folder,
                timeout=task.timeout,
            )
        except launch.RanksTimedOut:
            raise Unusable(
                f"check: no result within {task.timeout:g} s, the timeout; last: {latest}"
            ) from None
        except launch.RankFailed as error:
            raised = _raised(folder)
            if raised is None:
                first, _, rest = str(error).partition("\n")
                raise Unusable(f"check: {first}", rest) from None
            if raised.usage or raised.phase != RANKS:
                raise Unusable(_said(task, raised), raised.trace) from None
        return _report(task, folder, raised, time.perf_counter() - start)


@contextmanager
def _ending_on_sigterm() -> Iterator[None]:
    """As an exception, so that the folder goes, also while no rank runs."""

    def end(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _raised(folder: Path) -> Raised | None:
    """The first rank's error: the others' are its consequence."""
    found = []
    for path in folder.glob("raised-*.json"):
        content = json.loads(path.read_text(encoding="utf-8"))
        found.append(Raised(**content))
    return min(found, key=lambda each: each.time, default=None)


def _said(task: Task, raised: Raised) -> str:
    """An error that is not the ranks' training's, in one line."""
    if raised.usage:
        return f"check: {raised.text}"
    if raised.phase == "factory":
        return f"check: factory {spoken(task.factory)} raised {raised.kind}: {raised.text}"
    where = f" in {raised.modules[-1] or 'the model'}" if raised.modules else ""
    what = f"input {task.input}" if task.data is None else f"data {spoken(task.data)}"
    return (
        f"check: one process raised {raised.kind}{where} for {what} of {task.batch} samples: "
        f"{raised.text}"
    )


def _report(task: Task, folder: Path, raised: Raised | None, seconds: float) -> Report:
    evidence = gathered(task, folder, raised)
    found = departure(evidence)
    why = None if found is None else cause(evidence, found)
    verdict = DIFFERENT if why else EQUAL
    if why and why.kind in ("half", "rounding"):
        verdict = ROUNDING
    return Report(
        ok=found is None,
        first=None if found is None else found.layer,
        verdict=verdict,
        rows=rows(evidence, found),
        causes=() if why is None else (why,),
        notes=tuple(notes(evidence, found)),
        task=task,
        seconds=seconds,
        versions={"syncbn": __version__, "torch": str(torch.__version__)},
    )
