"""Which layers gain by synchronised statistics: asked of a network that trains without them.

python examples/monitor.py --out monitor.png

Four processes train a small network on real handwritten digits, one image each, with torch's
BatchNorm, and a Monitor watches. Then a new one trains with the layers synchronised that it
advises. Needs the extra [demo].
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
from syncbn.demo.train import LEARNING_RATE
from syncbn.launch import launch


def run_rank(rank: int, task: Any, folder: Path, say: Callable[[Any], None]) -> None:
    options, digits, steps, out = task
    store = (folder / "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=options.ranks)
    torch.manual_seed(options.seed)  # the same initial weights everywhere
    model = network()
    with syncbn.Monitor(model, every=10) as monitor:
        train(rank, model, options, digits, steps)
    torch.manual_seed(options.seed)
    advised = syncbn.convert(network(), where=monitor.where)
    train(rank, advised, options, digits, steps)
    if rank == 0:
        say(f"{monitor.table()}\n")
        for name, advice in monitor.advice().items():
            say(f"layer {name}: {advice}")
        figures = [right(each, digits) for each in (model, advised)]
        say("\nright on {:.0f} % without synchronisation, on {:.0f} % as advised".format(*figures))
        monitor.plot(out)
    dist.destroy_process_group()


def train(
    rank: int, model: torch.nn.Module, options: DemoOptions, digits: Digits, steps: int
) -> None:
    """``steps`` steps, in which each rank takes its share of each batch."""
    parallel = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(parallel.parameters(), lr=LEARNING_RATE)
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    share = slice(rank * options.batch_per_rank, (rank + 1) * options.batch_per_rank)
    for batch in islice(batches(options), steps):
        mine = batch[share]
        optimizer.zero_grad()
        scores = parallel(digits.train_images[mine])
        torch.nn.functional.cross_entropy(scores, digits.train_labels[mine]).backward()
        optimizer.step()
        decay.step()


@torch.no_grad()
def right(model: torch.nn.Module, digits: Digits) -> float:
    """The share of the validation images whose digit the model tells, in percent."""
    found = model.eval()(digits.validation_images).argmax(1)
    return 100 * (found == digits.validation_labels).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("monitor.png"), help="the picture")
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--batch-per-rank", type=int, default=1)
    parser.add_argument("--steps", type=int, default=700)
    given = parser.parse_args()
    options = DemoOptions(ranks=given.ranks, batch_per_rank=given.batch_per_rank)
    task = options, load(options), given.steps, given.out.absolute()
    launch(run_rank, task, ranks=options.ranks, on_message=print)


if __name__ == "__main__":
    main()
