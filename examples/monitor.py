"""Which layers gain by synchronised statistics: asked of a network that trains without them.

python examples/monitor.py --out monitor.png

Four processes train a small network on real handwritten digits, one image each, with torch's
BatchNorm, and a Monitor watches. Then its advice converts the layers that gain, and training goes
on. Needs the extra [cli].
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

import syncbn
from syncbn.demo.data import Digits, batches, load
from syncbn.demo.network import network
from syncbn.demo.options import DemoOptions
from syncbn.launch import launch


def run_rank(rank: int, task: Any, folder: Path, say: Callable[[Any], None]) -> None:
    options, digits, steps, out = task
    store = (folder / "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=options.ranks)
    torch.manual_seed(options.seed)  # the same initial weights everywhere
    model = DistributedDataParallel(network())
    with syncbn.Monitor(model.module, every=10) as monitor:
        train(rank, model, options, digits, steps)
    if rank == 0:
        say(f"{monitor.table()}\n")
        for name, advice in monitor.advice().items():
            say(f"layer {name}: {advice}")
        monitor.plot(out)
    syncbn.convert(model.module, where=monitor.where)
    train(rank, model, options, digits, steps)
    dist.destroy_process_group()


def train(
    rank: int, model: torch.nn.Module, options: DemoOptions, digits: Digits, steps: int
) -> None:
    """``steps`` steps, in which each rank takes its share of each batch."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.15)
    share = slice(rank * options.batch_per_rank, (rank + 1) * options.batch_per_rank)
    for batch in islice(batches(options), steps):
        mine = batch[share]
        optimizer.zero_grad()
        scores = model(digits.train_images[mine])
        torch.nn.functional.cross_entropy(scores, digits.train_labels[mine]).backward()
        optimizer.step()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("monitor.png"), help="the picture")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--batch-per-rank", type=int, default=1)
    parser.add_argument("--steps", type=int, default=600)
    given = parser.parse_args()
    options = DemoOptions(ranks=given.ranks, batch_per_rank=given.batch_per_rank)
    task = options, load(options), given.steps, given.out.absolute()
    launch(run_rank, task, ranks=options.ranks, on_message=print)


if __name__ == "__main__":
    main()
