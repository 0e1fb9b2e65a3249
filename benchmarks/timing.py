"""How benchmarks of one process take a device's times, and the host's."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from syncbn.diagnose.bench.timing import WARM_UP, interleaved

Steps = dict[str, Callable[[], Any]]

_MOST_CYCLES = 2**28  # about a tenth of a second


def device_times(steps: Steps, rounds: int, device: torch.device) -> dict[str, list[float]]:
    """Seconds on the device, without the host's; on the CPU those of :func:`interleaved`.

    While a round is queued the device spins, so that the calls run one right after another. The
    order turns from round to round: each step follows every other one equally often.
    """
    if device.type != "cuda":
        return interleaved(steps, rounds)
    for run in steps.values():
        run()  # which may compile
    times: dict[str, list[float]] = {name: [] for name in steps}
    cycles, done = 2**20, 0
    while done < rounds + WARM_UP:
        turn = done % len(steps)
        names = [*list(steps)[turn:], *list(steps)[:turn]]
        events, late = _round((steps[name] for name in names), cycles)
        if late and cycles < _MOST_CYCLES:
            cycles *= 2
            continue
        for name, (start, end) in zip(names, events, strict=True):
            times[name].append(start.elapsed_time(end) * 1e-3)
        done += 1
    return {name: values[WARM_UP:] for name, values in times.items()}


def _round(runs: Iterable[Callable[[], Any]], cycles: int) -> tuple[list[tuple[Any, Any]], bool]:
    """The events before and after every run, and whether the device spun too short."""
    events: list[tuple[Any, Any]] = []
    spun = torch.cuda.Event()
    torch.cuda.synchronize()
    torch.cuda._sleep(cycles)
    spun.record()
    for run in runs:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        events.append((start, end))
    late = spun.query()
    torch.cuda.synchronize()
    return events, late


def host_times(
    steps: Steps, rounds: int, device: torch.device, calls: int
) -> dict[str, list[float]]:
    """Seconds of host time per call, of calls one after another that nobody waits for.

    On the CPU, where the host does the work, that is all of it.
    """
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, run in steps.items():
            finish(device)
            start = time.perf_counter()
            for _ in range(calls):
                run()
            times[name].append((time.perf_counter() - start) / calls)
    finish(device)
    return {name: values[1:] for name, values in times.items()}


def finish(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
