"""Time training steps with a syncbn.Monitor against the same steps without.

\b
    python benchmarks/monitor.py                # 2 ranks, local batch norms, every=10
    python benchmarks/monitor.py --sync         # synchronised ones
    python benchmarks/monitor.py --every 1

A network with residual blocks (of ResNet-18's kind, half as wide) trains under
DistributedDataParallel, twice with the same batches: one that a Monitor watches and one that none
does. What is compared runs in turn, `every` steps at a time, of which one is observed: the ratio
is the median of the rounds' own ratios, its spread half the distance between their quartiles, on
rank 0. CPU time, of all threads of that rank, is what a busy machine changes least.
"""

from __future__ import annotations

import copy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from cpu_picture import report
from ranks import join_gloo, run_ranks
from syncbn.diagnose.bench.timing import WARM_UP, interleaved, summary

DEPTH = 2  # blocks of each width


class Block(nn.Module):
    """relu(bn(conv(relu(bn(conv(x))))) + shortcut(x)): He et al., 2015, arXiv:1512.03385."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.first = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.second = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.norms = nn.ModuleList(nn.BatchNorm2d(outputs) for _ in range(2))
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.norms[0](self.first(x)).relu()
        return (self.norms[1](self.second(y)) + self.shortcut(x)).relu()


def network(width: int) -> nn.Sequential:
    """Images (N, 3, H, W) to ten classes, through four widths."""
    torch.manual_seed(0)
    stem = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width), nn.ReLU()
    blocks = [
        Block(width * (2 ** max(level - (number == 0), 0)), width * 2**level, 1 + (number == 0))
        for level in range(4)
        for number in range(DEPTH)
    ]
    return nn.Sequential(
        *stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8 * width, 10)
    )


def training_steps(
    model: nn.Module, images: Tensor, labels: Tensor, steps: int
) -> Callable[[], None]:
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def run() -> None:
        for _ in range(steps):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(images), labels).backward()
            optimizer.step()

    return run


def run_rank(rank: int, task: tuple, folder: Path, _: object) -> dict[str, Any]:
    ranks, width, batch, size, every, rounds, sync = task
    join_gloo(rank, ranks, folder)
    plain = network(width)
    plain = syncbn.convert(plain) if sync else plain
    models = {"with": DistributedDataParallel(copy.deepcopy(plain))}
    models["without"] = DistributedDataParallel(plain)
    monitor = syncbn.Monitor(models["with"], every=every)
    torch.manual_seed(rank + 1)
    images, labels = torch.randn(batch, 3, size, size), torch.randint(10, (batch,))
    cpu: dict[str, list[float]] = {name: [] for name in models}
    steps = {
        name: counted(training_steps(model, images, labels, every), cpu[name])
        for name, model in models.items()
    }
    times = interleaved(steps, rounds)
    monitor.close()
    row: dict[str, Any] = {"images": images.shape, "layers": len(monitor.table()), "every": every}
    for name, values in times.items():
        each = [value / every for value in values]
        row[f"{name}_ms"] = summary(each, each)[:2]
    row["with_over_without"] = ratio(times)
    cpu = {name: values[WARM_UP:] for name, values in cpu.items()}
    return row | {"same_in_CPU_time": ratio(cpu)}


def counted(run: Callable[[], None], seconds: list[float]) -> Callable[[], None]:
    """``run``, whose CPU seconds are noted."""

    def go() -> None:
        before = time.process_time()
        run()
        seconds.append(time.process_time() - before)

    return go


def ratio(times: dict[str, list[float]]) -> tuple[float, float]:
    """Median and half the interquartile distance of the rounds' ratios."""
    ratios = [a / b for a, b in zip(times["with"], times["without"], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    return middle, (high - low) / 2


@click.command(help=__doc__)
@click.option("--ranks", type=click.IntRange(2), default=2, show_default=True)
@click.option("--every", type=click.IntRange(1), default=10, show_default=True)
@click.option("--rounds", type=click.IntRange(2), default=30, show_default=True)
@click.option("--sync", is_flag=True, help="synchronised batch norms, not local ones")
@click.option("--quick", is_flag=True, help="toy sizes, to see that it runs")
@click.option("--json", "as_json", is_flag=True, help="print JSON instead of the table")
def main(ranks: int, every: int, rounds: int, sync: bool, quick: bool, as_json: bool) -> None:
    width, batch, size = (4, 2, 32) if quick else (32, 4, 96)
    row = run_ranks(run_rank, (ranks, width, batch, size, every, rounds, sync), ranks)
    kind = "synchronised" if sync else "local"
    what = f"{ranks} ranks, {kind} batch norms, 1 thread each, {rounds} rounds of {every} steps"
    title = "A DDP training step with and without a Monitor" + ", toy sizes" * quick
    report(title, what, [row | {"images": tuple(row["images"])}], as_json)


if __name__ == "__main__":
    main()
