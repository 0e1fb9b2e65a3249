"""Time what a launch takes of the host, without a GPU: with a driver that starts nothing.

    python benchmarks/gpu_calls.py

Tensors are on the CPU, kernels are kept ones whose start does nothing: what is timed is all of
syncbn's own Python and torch's allocations, and none of Triton's launcher or the driver (about 4 µs
a launch more). The least and the median over rounds.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from types import SimpleNamespace
from typing import Any
from unittest import mock

import click
import torch

from gpu.calls import EPS, Case, make_batch
from syncbn.kernels import Statistics
from syncbn.kernels import triton as gpu
from syncbn.kernels.triton import launch
from tabular import print_table

LAUNCHES = {"batch_norm": 2, "batch_norm_backward": 2}  # of others one


class _Kept:
    """A compiled kernel that does nothing."""

    function = packed_metadata = None

    def run(self, *arguments: Any) -> None:
        pass


class _Kernel:
    def __getitem__(self, grid: Any) -> Callable[..., _Kept]:
        return lambda *arguments, **options: _Kept()


def no_driver() -> ExitStack:
    """Within it kernels are kept at once and start nothing."""
    triton = SimpleNamespace(language=SimpleNamespace(float32="fp32", float64="fp64"))
    stack = ExitStack()
    for name, value in {
        "kernel": lambda name: _Kernel(),
        "dtypes": lambda dtype: triton.language.float32,
        "_keeps": lambda: True,
        "_kept": {},
        "_scratch": {},
    }.items():
        stack.enter_context(mock.patch.object(launch, name, value))
    stack.enter_context(mock.patch("syncbn.kernels.triton.steps.dtypes", launch.dtypes))
    started = mock.patch.object(torch._C, "_cuda_getCurrentRawStream", return_value=0, create=True)
    stack.enter_context(started)
    return stack


def calls() -> dict[str, Callable[[], Any]]:
    batch = make_batch(Case((2, 64, 8, 8)), torch.device("cpu"))
    x, dy, affine, running = batch.x, batch.dy, batch.affine, batch.running()
    sets, saved = (torch.zeros(2, n, dtype=torch.float64) for n in (129, 64))
    found = Statistics(saved[0], saved[1], torch.tensor(128.0, dtype=torch.float64))
    return {
        "measure": lambda: gpu.measure(x),
        "normalise": lambda: gpu.normalise(x, sets, affine=affine, running=running, eps=EPS),
        "gradient_sums": lambda: gpu.gradient_sums(dy, x, found),
        "input_gradient": lambda: gpu.input_gradient(
            dy, x, weight=affine.weight, statistics=found, sums=saved
        ),
        "batch_norm": lambda: gpu.batch_norm(x, affine=affine, running=running, eps=EPS),
        "batch_norm_backward": lambda: gpu.batch_norm_backward(dy, x, affine=affine, saved=saved),
    }


def rows_of(rounds: int, number: int) -> list[dict[str, Any]]:
    rows = []
    with no_driver():
        for name, call in calls().items():
            call()
            times = [_time(call, number) / LAUNCHES.get(name, 1) for _ in range(rounds)]
            row = {"call": name, "launches": LAUNCHES.get(name, 1)}
            least, middle = min(times), statistics.median(times)
            rows.append(row | {"least µs a launch": least, "median µs a launch": middle})
    return rows


def _time(call: Callable[[], Any], number: int) -> float:
    start = time.perf_counter()
    for _ in range(number):
        call()
    return (time.perf_counter() - start) / number * 1e6


@click.command(help=__doc__)
@click.option("--rounds", type=click.IntRange(1), default=300, show_default=True)
@click.option("--calls", "number", type=click.IntRange(1), default=20, help="per round")
def main(rounds: int, number: int) -> None:
    torch.set_num_threads(1)
    caption = f"{rounds} rounds of {number} calls, torch {torch.__version__}"
    print_table("Host time of a launch, without the driver's", caption, rows_of(rounds, number))


if __name__ == "__main__":
    main()
