"""How times are taken: what is compared runs in turn, round after round."""

from __future__ import annotations

import ctypes
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist

Run = Callable[[], Any]

WARM_UP = 2  # rounds that don't count
CPU = torch.device("cpu")


def seconds(run: Run, device: torch.device = CPU) -> float:
    """How long one call takes.

    On a GPU, which is idle before: from the first of its kernels' launches to the last one's end.
    """
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    event: Any = torch.cuda.Event
    begin, end = event(enable_timing=True), event(enable_timing=True)
    torch.cuda.synchronize(device)
    begin.record()
    run()
    end.record()
    end.synchronize()
    milliseconds: float = begin.elapsed_time(end)
    return milliseconds * 1e-3


def in_turns(
    steps: Mapping[str, Sequence[Run]],
    rounds: int,
    device: torch.device = CPU,
    on_round: Callable[[], Any] = lambda: None,
) -> dict[str, list[tuple[float, ...]]]:
    """Seconds of the parts of every step, round by round; the first rounds warm up.

    Ranks start each part together. Every other round goes backwards through the steps, so that
    neither of two always has the other before it.

    Example:
        >>> in_turns({"a": (list, dict), "b": (set,)}, rounds=3).keys()
        dict_keys(['a', 'b'])
    """
    times: dict[str, list[tuple[float, ...]]] = {name: [] for name in steps}
    for number in range(rounds + WARM_UP):
        for name in reversed(list(steps)) if number % 2 else steps:
            parts = []
            for run in steps[name]:
                if dist.is_initialized():
                    dist.barrier()
                parts.append(seconds(run, device))
            times[name].append(tuple(parts))
        on_round()
    return {name: values[WARM_UP:] for name, values in times.items()}


def interleaved(steps: Mapping[str, Run], rounds: int) -> dict[str, list[float]]:
    """:func:`in_turns` of steps of one part, on the CPU."""
    times = in_turns({name: (run,) for name, run in steps.items()}, rounds)
    return {name: [value for (value,) in values] for name, values in times.items()}


def summary(times: Sequence[float], peer: Sequence[float]) -> tuple[float, float, float]:
    """Median and half the interquartile distance in ms, and the median ratio to the peer.

    The ratio is the median of the rounds' own ratios, which holds when the machine's speed drifts.

    Example:
        >>> summary([0.002, 0.002, 0.002], [0.001, 0.001, 0.004])
        (2.0, 0.0, 2.0)
    """
    low, middle, high = statistics.quantiles(times, n=4)
    ratio = statistics.median(a / b for a, b in zip(times, peer, strict=True))
    return middle * 1e3, (high - low) / 2 * 1e3, ratio


def keep_freed_memory() -> None:
    """Have glibc reuse freed memory. Else page faults hit one side or the other, by their order."""
    if mallopt := getattr(ctypes.CDLL(None), "mallopt", None):
        mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD
        mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD
