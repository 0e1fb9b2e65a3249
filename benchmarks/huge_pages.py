"""Time a layer on one process with huge pages for large results, and without, by their size.

\b
    python benchmarks/huge_pages.py
    THP_MEM_ALLOC_ENABLE=1 python benchmarks/huge_pages.py   # torch's own variable, for all tensors

Both run in turns in one process, which the second time switches huge pages off for itself (on Linux
alone, PR_SET_THP_DISABLE), and so does torch's layer. Memory is glibc's, as it is without settings.
Figures are the median over rounds ± half the distance between the quartiles; "small / huge" is the
median of the rounds' own ratios. `syncbn info` says what the system allows.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable
from typing import Any

import click
import torch
from torch import nn

import syncbn
from cpu_layers import PASSES, middle
from cpu_picture import report
from syncbn import info
from syncbn.diagnose.bench.measure import passes
from syncbn.diagnose.bench.options import LAYOUTS
from syncbn.diagnose.bench.timing import in_turns, summary

SIDE = 64, 128, 128  # of an image: 4 MiB in float32
IMAGES = (2, 4, 7, 8, 12, 16, 25)
PR_SET_THP_DISABLE = 41


def on_small_pages(run: Callable[[], Any]) -> Callable[[], None]:
    """What it writes to first gets no huge pages."""
    switch = ctypes.CDLL(None).prctl

    def run_without() -> None:
        switch(PR_SET_THP_DISABLE, 1, 0, 0, 0)
        run()
        switch(PR_SET_THP_DISABLE, 0, 0, 0, 0)

    return run_without


def measure(
    shape: tuple[int, ...], layout: str, *, threads: int, rounds: int
) -> list[dict[str, Any]]:
    """A row per pass."""
    torch.set_num_threads(threads)
    x = torch.randn(shape).contiguous(memory_format=LAYOUTS[layout])
    dy = torch.randn_like(x)
    huge, small = (passes(syncbn.SyncBatchNorm(shape[1]), x, dy) for _ in range(2))
    steps = {
        "syncbn": huge,
        "small_pages": tuple(map(on_small_pages, small)),
        "torch": passes(nn.BatchNorm2d(shape[1]), x, dy),
    }
    times = in_turns(steps, rounds)
    rows = []
    for part, pass_ in enumerate(PASSES):
        taken = {name: [each[part] for each in times[name]] for name in times}
        row = {"shape": shape, "MiB": x.nbytes / 2**20, "layout": layout, "threads": threads}
        row |= {"pass": pass_} | {f"{name}_ms": middle(taken[name]) for name in taken}
        rows.append(row | {"small_over_huge": summary(taken["small_pages"], taken["syncbn"])[2]})
    return rows


@click.command(help=__doc__)
@click.option("--threads", type=click.IntRange(1), multiple=True, default=(1,))
@click.option("--layout", type=click.Choice(list(LAYOUTS)[:2]), default="contiguous")
@click.option("--rounds", type=click.IntRange(2), default=20, show_default=True)
@click.option("--quick", is_flag=True, help="toy sizes, to see that it runs")
@click.option("--json", "as_json", is_flag=True, help="print JSON instead of the table")
def main(threads: tuple[int, ...], layout: str, rounds: int, quick: bool, as_json: bool) -> None:
    if not hasattr(ctypes.CDLL(None), "prctl"):
        raise click.ClickException("expected Linux, where a process can switch huge pages off")
    shapes = [(2, 3, 4, 5)] if quick else [(n, *SIDE) for n in IMAGES]
    cases = [(n, shape) for n in threads for shape in shapes]
    rows = [row for n, s in cases for row in measure(s, layout, threads=n, rounds=rounds)]
    variable = f"{info.VARIABLE}={os.environ.get(info.VARIABLE, '')}"
    said = info.huge_pages()["huge pages"]
    what = f"huge pages {said}, {variable}, float32, {rounds} rounds"
    report("A layer in training mode on huge pages and on small ones", what, rows, as_json)


if __name__ == "__main__":
    main()
