"""Time the loops that one compiler makes against another's, which should be within 15 %.

\b
    python benchmarks/cpu_compilers.py                     # the oldest g++ here, the newest clang++
    python benchmarks/cpu_compilers.py g++-12 clang++-16   # the old one, the new one
    python benchmarks/cpu_compilers.py before.so after.so  # two libraries that are built already

Each compiler builds the library into build/compilers. Two processes, one per library, then run the
operators on cpu.py's smaller tensors in turns of some milliseconds, and count their own processor
time, so that whatever else the machine does meets both alike. Every repetition starts new
processes, whose memory lies elsewhere, and takes the 10th percentile of an operator's calls.
Figures are the medians over repetitions; of the ratio new / old also half the distance between the
quartiles.
"""

from __future__ import annotations

import multiprocessing
import shutil
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import lru_cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import click
import torch

from cpu_layers import CASES, PASSES, TOYS, Case, middle
from cpu_picture import report
from syncbn import library
from syncbn.diagnose.bench.options import LAYOUTS
from syncbn.diagnose.bench.timing import keep_freed_memory
from syncbn.kernels import native
from syncbn.kernels.interface import Affine, Running

sys.path.append(str(Path(__file__).parents[1] / "tests/native"))
import compilers

APART = 1.15
TURN = 0.01  # seconds, or so many calls if these take longer
CALLS = 3
Times = dict[str, list[float]]


def library_of(name: str) -> Path:
    """The library that a compiler builds, or one that is there."""
    if name.endswith(".so"):
        return Path(name).resolve()
    try:
        compilers.build(name)
    except AssertionError as error:
        raise click.ClickException(str(error)) from None
    return compilers.WORK / name / "lib/syncbn/libsyncbn.so"


@lru_cache(1)
def operators(case: Case) -> dict[str, Callable[[], Any]]:
    """What a process does alone in a training step of one layer."""
    x = torch.randn(case.shape, dtype=getattr(torch, case.dtype))
    x = x.contiguous(memory_format=LAYOUTS[case.layout])
    dy, channels = torch.randn_like(x), case.shape[1]
    affine = Affine(torch.ones(channels), torch.zeros(channels))
    running = Running(torch.zeros(channels), torch.ones(channels), torch.tensor(0), 0.1)
    _, saved = native.batch_norm(x, affine=affine, running=running, eps=1e-5)
    return {
        "forward": lambda: native.batch_norm(x, affine=affine, running=running, eps=1e-5),
        "backward": lambda: native.batch_norm_backward(dy, x, affine=affine, saved=saved),
    }


def serve(path: Path, far_end: Connection, line: Connection) -> None:
    """Take turns on request, in a process of its own: one registers operators only once."""
    far_end.close()  # or this process would outlive one that was killed
    library.LIBRARY = path
    if why_not := native.unavailable():
        raise RuntimeError(why_not)
    keep_freed_memory()
    torch.set_num_threads(1)
    line.send(native.instruction_set())
    for case in iter(line.recv, None):
        line.send(take_turn(operators(case)))


def take_turn(steps: dict[str, Callable[[], Any]]) -> Times:
    times: Times = {pass_: [] for pass_ in PASSES}
    end = time.thread_time() + TURN
    while len(times["forward"]) < CALLS or time.thread_time() < end:
        for pass_ in PASSES:
            start = time.thread_time()
            result = steps[pass_]()
            times[pass_].append(time.thread_time() - start)
            del result  # the next is allocated where it was
    return times


@contextmanager
def process(path: Path) -> Iterator[Connection]:
    """The line to a process that has loaded a library, which says its instruction set first."""
    fork = multiprocessing.get_context("fork")  # no operator has run here, and torch is imported
    near, far = fork.Pipe()
    worker = fork.Process(target=serve, args=(path, near, far), daemon=True)
    worker.start()
    far.close()
    try:
        yield near
        near.send(None)
        worker.join()
    except EOFError:
        raise click.ClickException("a process that ran a library has ended, see above") from None
    finally:
        worker.kill()


def measure(case: Case, lines: tuple[Connection, Connection], turns: int) -> dict[str, list[float]]:
    """Per pass, the 10th percentile of calls with the old and with the new library."""
    times: dict[tuple[str, Connection], list[float]] = defaultdict(list)
    for _ in range(turns):
        for line in lines:
            line.send(case)
            for pass_, taken in line.recv().items():
                times[pass_, line] += taken
    return {
        pass_: [statistics.quantiles(times[pass_, line], n=10)[0] for line in lines]
        for pass_ in PASSES
    }


def name_of(case: Case) -> str:
    return f"{'x'.join(map(str, case.shape))} {case.dtype} {case.layout}"


def rows_of(measured: dict[Case, list[dict[str, list[float]]]]) -> list[dict[str, Any]]:
    rows = []
    for case, repetitions in measured.items():
        for pass_ in PASSES:
            old, new = zip(*(repetition[pass_] for repetition in repetitions), strict=True)
            ratio, spread = middle([b / a for a, b in zip(old, new, strict=True)], 1e-3)
            us = {"old_us": statistics.median(old) * 1e6, "new_us": statistics.median(new) * 1e6}
            verdict = "within 15 %" if 1 / APART <= ratio <= APART else "outside 15 %"
            tensor = {"shape": case.shape, "dtype": case.dtype, "layout": case.layout}
            row = {"pass": pass_} | us | {"new/old": (ratio, spread), "verdict": verdict}
            rows.append(tensor | row)
    return rows


def pair(_context: object, _parameter: object, names: tuple[str, ...]) -> tuple[str, ...]:
    if len(names) not in (0, 2):
        raise click.BadParameter("give two, the old one and the new one")
    for name in names:
        if not (Path(name).is_file() if name.endswith(".so") else shutil.which(name)):
            raise click.BadParameter(f"{name} is not here")
    return names


def oldest_and_newest() -> tuple[str, str]:
    found = [name for name in compilers.KNOWN if shutil.which(name) and name != compilers.CROSS]
    if len(found) < 2:
        raise click.ClickException(f"expected two compilers, found {', '.join(found) or 'none'}")
    return found[0], found[-1]


@click.command(help=__doc__)
@click.argument("names", nargs=-1, callback=pair, metavar="[OLD NEW]")
@click.option("--turns", type=click.IntRange(1), default=20, show_default=True)
@click.option("--repetitions", type=click.IntRange(2), default=5, show_default=True)
@click.option("--only", default="", help="tensors like '2x64x128x128 float32'")
@click.option("--quick", is_flag=True, help="toy sizes, the installed library against itself")
@click.option("--json", "as_json", is_flag=True, help="print JSON instead of the table")
def main(
    names: tuple[str, ...],
    turns: int,
    repetitions: int,
    only: str,
    quick: bool,
    as_json: bool,
) -> None:
    if quick and not (names or library.LIBRARY.exists()):
        click.echo(f"skipped: {native.unavailable()}")
        return
    names = names or ((str(library.LIBRARY),) * 2 if quick else oldest_and_newest())
    libraries = [library_of(name) for name in names]
    cases = [case for case in (TOYS if quick else CASES) if only in name_of(case)]
    measured: dict[Case, list[dict[str, list[float]]]] = defaultdict(list)
    for _ in range(repetitions):
        with process(libraries[0]) as old, process(libraries[1]) as new:
            by = {line.recv() for line in (old, new)}
            for case in cases:
                measured[case].append(measure(case, (old, new), turns))
    rows = rows_of(measured)
    what = f"{' and '.join(by)}, 1 thread, {repetitions} repetitions of {turns} turns"
    title = "Operators of one process by {1} (new) and {0} (old)".format(*names)
    report(title, what, rows, as_json)


if __name__ == "__main__":
    main()
