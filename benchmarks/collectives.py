"""Time one layer's exchange: torch's collectives over gloo, this library's, and shared memory's.

    python benchmarks/collectives.py --ranks 2 --ranks 4 --numel 513

The ways run in turn, round after round; figures are the median of rank 0 in microseconds, half the
distance between the quartiles, and the median of the rounds' ratios to torch's all_reduce.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

import click
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from layer import group_over_gloo, interleaved, join_gloo, summary
from rich.console import Console
from rich.table import Table

from syncbn.comm import SharedMemory, resolve
from syncbn.comm.memory import unavailable


def run_rank(rank: int, ranks: int, numel: int, rounds: int, folder: str) -> None:
    torch.set_num_threads(1)
    join_gloo(rank, ranks, folder)
    tensor = torch.ones(numel, dtype=torch.float64)

    comm = resolve(group_over_gloo())

    def torch_all_gather() -> None:
        dist.all_gather(list(tensor.new_empty(ranks, numel).unbind(0)), tensor)

    def torch_all_reduce() -> None:
        dist.all_reduce(tensor.clone())

    steps = {
        "torch all_gather": torch_all_gather,
        "syncbn all_gather": lambda: comm.all_gather(tensor),
        "torch all_reduce": torch_all_reduce,
        "syncbn all_reduce": lambda: comm.all_reduce(tensor),
    }
    if not unavailable():
        shared = SharedMemory()
        steps["shared memory all_gather"] = lambda: shared.all_gather(tensor)
        steps["shared memory all_reduce"] = lambda: shared.all_reduce(tensor)
    times = interleaved(steps, rounds)
    if rank == 0:
        rows = {name: summary(values, times["torch all_reduce"]) for name, values in times.items()}
        Path(folder, "rows.json").write_text(json.dumps(rows))
    dist.destroy_process_group()


@click.command(help=__doc__)
@click.option("--ranks", type=click.IntRange(2), multiple=True, default=(2, 4), show_default=True)
@click.option("--numel", type=click.IntRange(1), default=513, show_default=True, help="of float64")
@click.option("--rounds", type=click.IntRange(2), default=300, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="print JSON instead of the table")
def main(ranks: tuple[int, ...], numel: int, rounds: int, as_json: bool) -> None:
    results = {}
    for count in ranks:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(run_rank, (count, numel, rounds, folder), count)
            results[count] = json.loads(Path(folder, "rows.json").read_text())
    if as_json:
        json.dump(results, sys.stdout, indent=1)
        return
    table = Table(title=f"{numel} float64 numbers, torch {torch.__version__}")
    for heading in ("ranks", "way", "µs", "±", "× all_reduce"):
        table.add_column(heading, justify="right")
    for count, rows in results.items():
        for name, (median, spread, ratio) in rows.items():
            figures = (f"{median * 1e3:.0f}", f"{spread * 1e3:.0f}", f"{ratio:.2f}")
            table.add_row(str(count), name, *figures)
    Console().print(table)


if __name__ == "__main__":
    main()
