"""Starts the ranks of a measurement, and makes the report of what they find."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable

from ... import launch
from ...versions import versions
from ..check.options import Unusable
from . import finding, measure
from .figures import balance_of, row_of, total_of
from .finding import Found, Refused
from .measure import Measured, Task
from .options import Options, cores
from .report import Report

OnProgress = Callable[[str, int, int], None]


def run(options: Options, on_progress: OnProgress) -> Report:
    """Find the cases, measure them.

    Raises:
        Unusable: the model cannot be measured.
        RankFailed: a rank died; no process is left.
        KeyboardInterrupt, SystemExit: told to stop by a signal; no process is left.
    """
    start = time.perf_counter()
    found = Found(options.cases) if options.model is None else _found(options, on_progress)
    on_progress("measuring", 0, 1)

    def hear(progress: measure.Progress) -> None:
        on_progress("measuring", progress.done, progress.total)

    task = Task(options, found.cases)
    measured: Measured = launch.launch(measure.run_rank, task, ranks=options.ranks, on_message=hear)
    total = total_of(found.cases, measured.times)
    return Report(
        options=options,
        rows=tuple(map(row_of, found.cases, measured.times)),
        total=total,
        balance=balance_of(total),
        notes=(*found.notes, *_crowded(options)),
        environment=_environment(options, measured),
        seconds=time.perf_counter() - start,
    )


def _found(options: Options, on_progress: OnProgress) -> Found:
    on_progress("finding the layers", 0, 1)
    answer = launch.launch(finding.run_rank, options, ranks=1, on_message=lambda _: None)
    if isinstance(answer, Refused):
        raise Unusable(answer.text, answer.trace)
    assert isinstance(answer, Found)
    return answer


def _crowded(options: Options) -> list[str]:
    wanted, there = options.ranks * options.threads, cores()
    if options.device != "cpu" or wanted <= there:
        return []
    threads = f"{options.threads} thread{'s' * (options.threads > 1)}"
    return [
        f"{options.ranks} ranks of {threads} share {there} core{'s' * (there > 1)}: they wait for "
        "each other's turn, so that these times say little of ranks with cores of their own"
    ]


def _environment(options: Options, measured: Measured) -> dict[str, object]:
    return {
        "versions": versions(),
        "machine": platform.machine(),
        "device": measured.device,
        "cores": cores(),
        "ranks": options.ranks,
        "threads": options.threads,
        "kernels": measured.kernels,
        "communicator": measured.communicator,
    }
