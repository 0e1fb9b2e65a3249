"""Time the layer against torch's unsynchronised one and a naive synchronised one.

    python benchmarks/layer.py                    # 1 and 2 ranks, a table
    python benchmarks/layer.py --ranks 1 --ranks 4 --json

The naive layer is what a tutorial writes: mean and mean of squares by two differentiable
all_reduces. The three run in turn on the same tensors, round after round; figures are the median
over rounds on rank 0 and half the distance between the quartiles, and the ratio is the median of
the rounds' own ratios, which holds when the machine's speed drifts. Outputs are freshly allocated.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import click
import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import syncbn
from syncbn.launch import Worker, launch
from timing import interleaved, summary

SHAPES = ((2, 64, 128, 128), (2, 256, 56, 56), (4, 512, 28, 28), (8, 2048, 7, 7))
PASSES = ("forward", "fwd+bwd")
LAYOUTS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}


class AllReduce(torch.autograd.Function):
    """Sum over ranks, and of gradients over ranks."""

    @staticmethod
    def forward(ctx, tensor: Tensor) -> Tensor:  # type: ignore[override]
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:  # type: ignore[override]
        return AllReduce.apply(gradient)


class NaiveSyncBatchNorm(nn.BatchNorm2d):
    """Statistics as E[x] and E[x²] by all_reduce. Inexact by cancellation; here to be timed."""

    def forward(self, input: Tensor) -> Tensor:
        others = [d for d in range(input.dim()) if d != 1]
        mean, square = input.mean(others), input.square().mean(others)
        if dist.is_initialized():
            mean = AllReduce.apply(mean) / dist.get_world_size()
            square = AllReduce.apply(square) / dist.get_world_size()
        var = square - mean.square()
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(var, self.momentum)
        scale = self.weight * (var + self.eps).rsqrt()
        offset = self.bias - mean * scale
        shape = (1, -1, *(1,) * (input.dim() - 2))
        return input * scale.view(shape) + offset.view(shape)


LAYERS = {"syncbn": syncbn.SyncBatchNorm, "torch": nn.BatchNorm2d, "naive": NaiveSyncBatchNorm}


@dataclass(frozen=True)
class Setting:
    """What is timed: shapes (N, C, H, W) per rank, one layout and dtype."""

    shapes: tuple[tuple[int, ...], ...]
    layout: str
    dtype: str
    threads: int
    rounds: int


@dataclass(frozen=True)
class Row:
    """One layer's figures on one shape, times in milliseconds."""

    ranks: int
    shape: tuple[int, ...]
    pass_: str
    layer: str
    median_ms: float
    spread_ms: float
    over_torch: float


def measure(setting: Setting, ranks: int) -> list[Row]:
    """Rows of rank 0 for every shape, pass and layer; collective over the default group."""
    rows = []
    for shape in setting.shapes:
        dtype = getattr(torch, setting.dtype)
        x = torch.randn(shape, dtype=dtype).contiguous(memory_format=LAYOUTS[setting.layout])
        dy = torch.randn_like(x)
        layers = {name: cls(shape[1]) for name, cls in LAYERS.items()}
        for pass_ in PASSES:
            steps = {name: step(layer, x, dy, pass_) for name, layer in layers.items()}
            times = interleaved(steps, setting.rounds)
            rows += [
                Row(ranks, shape, pass_, name, *summary(times[name], times["torch"]))
                for name in times
            ]
    return rows


def step(layer: nn.Module, x: Tensor, dy: Tensor, pass_: str) -> Callable[[], None]:
    """A function that does one forward, or forward and backward."""
    leaf = x.clone().requires_grad_()

    def run() -> None:
        y = layer(leaf)
        if pass_ == PASSES[1]:
            leaf.grad = None
            y.backward(dy)

    return run


def run_rank(rank: int, task: tuple[int, Setting], folder: Path, _: object) -> list[Row]:
    ranks, setting = task
    torch.set_num_threads(setting.threads)
    torch.manual_seed(rank)
    if ranks > 1:
        join_gloo(rank, ranks, folder)
    return measure(setting, ranks)


def group_over_gloo() -> dist.ProcessGroup:
    """A group of all ranks whose layers exchange through gloo, though memory be there."""
    group = dist.new_group()
    with mock.patch.dict(os.environ, {"SYNCBN_EXCHANGE": "torch"}):
        syncbn.comm.resolve(group).all_gather(torch.zeros(1))  # when it is chosen
    return group


def join_gloo(rank: int, ranks: int, folder: Path) -> None:
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)


def run_ranks(worker: Worker, task: Any, ranks: int) -> Any:
    """What ``worker(rank, task, folder, send)`` returns on rank 0."""
    return launch(worker, task, ranks=ranks, on_message=print)


def environment(setting: Setting) -> str:
    return (
        f"{setting.dtype} {setting.layout}, {setting.threads} thread(s) per rank, "
        f"{setting.rounds} rounds, torch {torch.__version__}, syncbn {syncbn.__version__}, "
        f"Python {platform.python_version()}, {platform.machine()}"
    )


def table(rows: list[Row], setting: Setting) -> Table:
    result = Table(title="One layer in training mode, per rank", caption=environment(setting))
    for heading in ("ranks", "shape", "pass", "layer", "ms", "±", "× torch"):
        result.add_column(heading, justify="left" if heading in ("pass", "layer") else "right")
    for row in rows:
        shape = "×".join(map(str, row.shape))
        figures = (f"{row.median_ms:.3f}", f"{row.spread_ms:.3f}", f"{row.over_torch:.2f}")
        result.add_row(
            str(row.ranks), shape, row.pass_, row.layer, *figures, end_section=row.layer == "naive"
        )
    return result


def parse_shape(_context: object, _parameter: object, values: tuple[str, ...]) -> tuple:
    try:
        shapes = tuple(tuple(int(size) for size in value.split(",")) for value in values)
    except ValueError:
        raise click.BadParameter("give N,C,H,W") from None
    if any(len(shape) != 4 or min(shape) < 1 for shape in shapes):
        raise click.BadParameter("give four sizes N,C,H,W of at least 1")
    return shapes or SHAPES


@click.command(help=__doc__)
@click.option("--ranks", type=click.IntRange(1), multiple=True, default=(1, 2), show_default=True)
@click.option("--shape", "shapes", multiple=True, callback=parse_shape, help="N,C,H,W per rank")
@click.option("--layout", type=click.Choice(list(LAYOUTS)), default="contiguous")
@click.option("--dtype", type=click.Choice(["float32", "bfloat16"]), default="float32")
@click.option("--threads", type=click.IntRange(1), default=1, help="per rank", show_default=True)
@click.option("--rounds", type=click.IntRange(2), default=30, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="print JSON instead of the table")
def main(
    ranks: tuple[int, ...],
    shapes: tuple,
    layout: str,
    dtype: str,
    threads: int,
    rounds: int,
    as_json: bool,
) -> None:
    setting = Setting(shapes, layout, dtype, threads, rounds)
    rows = [row for count in ranks for row in run_ranks(run_rank, (count, setting), count)]
    if as_json:
        result = {"environment": environment(setting), "rows": [asdict(row) for row in rows]}
        json.dump(result, sys.stdout, indent=1)
    else:
        Console().print(table(rows, setting))


if __name__ == "__main__":
    main()
