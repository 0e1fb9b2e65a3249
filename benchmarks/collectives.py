"""Time one layer's exchange over gloo, through shared memory, among threads and over MPI.

    python benchmarks/collectives.py --ranks 2 --ranks 4 --numel 513

Each way is called several times in a row, so that a rank waits for the others' calls alone, and
ranks of one kind run their ways in turn, round after round. Figures are rank 0's median in
microseconds per call and half the distance between the quartiles; ratios are the median of the
rounds' own ratios to torch's all_reduce, of the ways in the same processes. MPI needs mpi4py and
mpiexec.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor

from ranks import group_over_gloo, join_gloo, run_ranks
from syncbn.comm import MPI, Communicator, SharedMemory, resolve, threads
from syncbn.comm.memory import unavailable
from syncbn.diagnose.bench.timing import interleaved, summary

IN_A_ROW = 20
Rows = dict[str, tuple[float, ...]]


def ways_of(name: str, comm: Communicator, tensor: Tensor) -> dict[str, Callable[[], object]]:
    return {
        f"{name} all_gather": lambda: comm.all_gather(tensor),
        f"{name} all_reduce": lambda: comm.all_reduce(tensor),
    }


def timed(ways: dict[str, Callable[[], object]], rounds: int) -> Rows:
    """Of each way: median and spread of a call in µs, and the ratio to torch's all_reduce."""

    def in_a_row(way: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(IN_A_ROW):
                way()

        return run

    times = interleaved({name: in_a_row(way) for name, way in ways.items()}, rounds)
    peer = times.get("torch all_reduce")
    rows = {}
    for name, values in times.items():
        median, spread, ratio = summary(values, peer or values)
        figures = median * 1e3 / IN_A_ROW, spread * 1e3 / IN_A_ROW
        rows[name] = (*figures, ratio) if peer else figures
    return rows


def run_processes(rank: int, task: tuple[int, int, int], folder: Path, _: object) -> Rows:
    ranks, numel, rounds = task
    join_gloo(rank, ranks, folder)
    tensor = torch.ones(numel, dtype=torch.float64)

    def torch_all_gather() -> None:
        dist.all_gather(list(tensor.new_empty(ranks, numel).unbind(0)), tensor)

    def torch_all_reduce() -> None:
        dist.all_reduce(tensor.clone())

    ways = {"torch all_gather": torch_all_gather, "torch all_reduce": torch_all_reduce}
    ways |= ways_of("syncbn", resolve(group_over_gloo()), tensor)
    if not unavailable():
        ways |= ways_of("shared memory", SharedMemory(), tensor)
    return timed(ways, rounds)


def run_threads(ranks: int, numel: int, rounds: int) -> Rows:
    tensor = torch.ones(numel, dtype=torch.float64)
    with ThreadPoolExecutor(ranks) as pool:
        found = pool.map(
            lambda comm: timed(ways_of("threads", comm, tensor), rounds), threads(ranks)
        )
        rows, *_ = found
        return rows


def run_mpi(ranks: int, numel: int, rounds: int) -> Rows:
    """In a job of its own, whose rank 0 writes what it measured; nothing where there is no MPI."""
    beside = shutil.which("mpiexec", path=str(Path(sys.executable).parent))
    mpiexec = beside or shutil.which("mpiexec")
    if mpiexec is None or importlib.util.find_spec("mpi4py") is None:
        return {}
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder, "rows.json")
        job = [mpiexec, "-n", str(ranks), sys.executable, __file__, "--as-mpi-rank", str(result)]
        options = ["--numel", str(numel), "--rounds", str(rounds)]
        own = {"HYDRA_LAUNCHER": "fork", "OMP_NUM_THREADS": "1"}
        subprocess.run([*job, *options], env=os.environ | own, check=True, timeout=600)
        return json.loads(result.read_text())


def run_mpi_rank(result: Path, numel: int, rounds: int) -> None:
    comm = MPI()
    rows = timed(ways_of("MPI", comm, torch.ones(numel, dtype=torch.float64)), rounds)
    if comm.rank == 0:
        result.write_text(json.dumps(rows))


@click.command(help=__doc__)
@click.option("--ranks", type=click.IntRange(2), multiple=True, default=(2, 4), show_default=True)
@click.option("--numel", type=click.IntRange(1), default=513, show_default=True, help="of float64")
@click.option("--rounds", type=click.IntRange(2), default=50, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="print JSON instead of the table")
@click.option("--as-mpi-rank", type=click.Path(path_type=Path), hidden=True)
def main(
    ranks: tuple[int, ...], numel: int, rounds: int, as_json: bool, as_mpi_rank: Path | None
) -> None:
    torch.set_num_threads(1)
    if as_mpi_rank is not None:
        run_mpi_rank(as_mpi_rank, numel, rounds)
        return
    results = {}
    for count in ranks:
        results[count] = run_ranks(run_processes, (count, numel, rounds), count)
        results[count] |= run_threads(count, numel, rounds) | run_mpi(count, numel, rounds)
    if as_json:
        json.dump(results, sys.stdout, indent=1)
        return
    table = Table(title=f"{numel} float64 numbers, torch {torch.__version__}")
    for heading in ("ranks", "way", "µs", "±", "× all_reduce"):
        table.add_column(heading, justify="right")
    for count, rows in results.items():
        for name, (median, spread, *ratio) in rows.items():
            figures = f"{median:.0f}", f"{spread:.0f}", *(f"{r:.2f}" for r in ratio)
            table.add_row(str(count), name, *figures)
    Console().print(table)


if __name__ == "__main__":
    main()
