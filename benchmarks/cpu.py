"""Time syncbn on the CPU against torch's BatchNorm, and hold its output to mean 0 and deviation 1.

\b
    python benchmarks/cpu.py layers --picture speed.png   # one process: forward, backward
    python benchmarks/cpu.py ranks                        # over gloo, through shared memory
    python benchmarks/cpu.py model                        # ResNets under DDP (transformers)
    python benchmarks/cpu.py accuracy

What is compared runs in turn in the same processes, round after round. Figures are the median over
rounds (of rank 0) ± half the distance between the quartiles, and ratios are the median of the
rounds' own ratios, which holds when the machine's speed drifts. Outputs are freshly allocated. One
"copy" is the median time of y.copy_(x) on a tensor like the input, y reused, in the same rounds.
"Parts" are a layer of one process alone, an all_gather and an all_reduce as large as the layer's;
"local" is that layer, "torch" torch's own, which synchronises nothing, "shared" shared memory.
"Over floor" is syncbn's time over that of plain two-pass loops in C++, of one thread, which are
compiled for this processor; their outputs are as fresh, and ask for huge pages, as syncbn's.
"""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from ctypes import CDLL
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist
from torch import Tensor, nn

import cpu_floor
import syncbn
from cpu_layers import BY_KIND, TOYS, measure, middle
from cpu_picture import draw, environment, report
from ranks import group_over_gloo, join_gloo, run_ranks
from syncbn.comm.memory import unavailable
from syncbn.diagnose.bench.measure import passes
from syncbn.diagnose.bench.naive import NaiveSyncBatchNorm
from syncbn.diagnose.bench.options import SHAPES
from syncbn.diagnose.bench.timing import interleaved, keep_freed_memory, summary
from tabular import shown

FEATURES = (4096, 256)
TITLES = {
    "layers": "One layer in training mode, one process",
    "ranks": "A synchronised layer over gloo and through shared memory, forward + backward",
    "model": "A DDP training step, syncbn against torch.nn.BatchNorm2d",
    "accuracy": "Output of BatchNorm2d(affine=False) over mean/std of its input",
}


def floor_of(threads: tuple[int, ...]) -> CDLL | None:
    """The loops that one thread is compared with, or a word about why there are none."""
    if 1 not in threads:
        return None
    try:
        return cpu_floor.load()
    except cpu_floor.NoFloorError as reason:
        click.echo(str(reason), err=True)
        return None


def step(layer: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], None]:
    """A function that does one forward and one backward."""
    forward, backward = passes(layer, x, dy)

    def run() -> None:
        forward()
        backward()

    return run


def rank_rows(rank: int, rounds: int, quick: bool) -> list[dict[str, Any]]:
    """A synchronised layer against its parts, the naive one, and none; forward and backward."""
    rows, shared = [], None if unavailable() else syncbn.comm.SharedMemory()
    over_gloo = group_over_gloo()
    for shape in [(2, 3, 4, 5), (4, 3)] if quick else [*SHAPES, FEATURES]:
        x, dy, channels = torch.randn(shape), torch.randn(shape), shape[1]
        moments, sums = (torch.zeros(2 * channels + n, dtype=torch.float64) for n in (2, 0))
        layers = {
            "syncbn": syncbn.SyncBatchNorm(channels, process_group=over_gloo),
            "reproducible": syncbn.SyncBatchNorm(
                channels, process_group=over_gloo, reproducible=True
            ),
            "naive": NaiveSyncBatchNorm(channels),
            "local": syncbn.SyncBatchNorm(channels, process_group=syncbn.comm.LOCAL),
            "torch": (nn.BatchNorm2d if len(shape) == 4 else nn.BatchNorm1d)(channels),
        }
        if shared:
            layers["shared"] = syncbn.SyncBatchNorm(channels, process_group=shared)
        steps = {name: step(layer, x, dy) for name, layer in layers.items()}

        def parts(local=steps["local"], moments=moments, sums=sums) -> None:
            local()
            received = moments.new_empty(dist.get_world_size(), len(moments))
            dist.all_gather(list(received.unbind(0)), moments)
            dist.all_reduce(sums)

        times = interleaved(steps | {"parts": parts}, rounds)
        compared = [name for name in ("syncbn", "shared", "torch") if name in times]
        row = {"shape": shape} | {f"{name}_ms": middle(times[name]) for name in compared}
        row["over_parts"] = summary(times["syncbn"], times["parts"])[2]
        for name in ("naive", "reproducible"):
            row[f"{name}_over_syncbn"] = summary(times[name], times["syncbn"])[2]
        for name in ("local", "torch") if shared else ():
            row[f"shared_over_{name}"] = summary(times["shared"], times[name])[2]
        rows.append(row)
    return rows


def model_rows(rank: int, rounds: int, quick: bool) -> list[dict[str, Any]]:
    """A training step of ResNets under DDP, converted and with torch's layers as they are."""
    toy = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    if quick:
        return [model_row("toy", toy, (2, 3, 32, 32), rank, rounds)]
    return [
        model_row(
            "ResNet, depths 2-2-2-2", {"depths": [2, 2, 2, 2]}, (2, 3, 160, 160), rank, rounds
        ),
        model_row("ResNet-50", {}, (2, 3, 224, 224), rank, rounds),
    ]


def model_row(
    name: str, config: dict[str, Any], shape: tuple[int, ...], rank: int, rounds: int
) -> dict[str, Any]:
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(0)
    plain = ResNetForImageClassification(ResNetConfig(**config)).train()
    models = {"syncbn": syncbn.convert(copy.deepcopy(plain), group_over_gloo()), "torch": plain}
    if not unavailable():
        models["shared"] = syncbn.convert(copy.deepcopy(plain), syncbn.comm.SharedMemory())
    torch.manual_seed(rank + 1)
    images, labels = torch.randn(shape), torch.randint(2, (2,))
    steps = {name: training_step(model, images, labels) for name, model in models.items()}
    times = interleaved(steps, rounds)
    row = {"model": name, "images": shape}
    row |= {f"{name}_ms": middle(values) for name, values in times.items()}
    for name in [name for name in models if name != "torch"]:
        row[f"{name}_over_torch"] = summary(times[name], times["torch"])[2]
    return row


def training_step(model: nn.Module, images: Tensor, labels: Tensor) -> Callable[[], None]:
    model = nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def run() -> None:
        optimizer.zero_grad()
        model(pixel_values=images, labels=labels).loss.backward()
        optimizer.step()

    return run


def run_rank(rank: int, task: tuple, folder: Path, _: object) -> list[dict[str, Any]]:
    ranks, mode, rounds, quick = task
    torch.manual_seed(rank)
    join_gloo(rank, ranks, folder)
    return {"ranks": rank_rows, "model": model_rows}[mode](rank, rounds, quick)


def accuracy_rows(shape: tuple[int, ...]) -> list[dict[str, Any]]:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    noise = torch.randn(shape).contiguous(memory_format=torch.channels_last)
    rows: list[dict[str, Any]] = []
    for mean in (0, 10, 100, 1000):
        rows.append({"mean/std": mean})
        for name, cls in (("torch", nn.BatchNorm2d), ("syncbn", syncbn.SyncBatchNorm)):
            y = cls(shape[1], affine=False)(noise + mean).double()
            rows[-1] |= {f"{name}_mean": y.mean().item(), f"{name}_std": y.std(correction=0).item()}
    return rows


@click.command(help=__doc__)
@click.argument("mode", type=click.Choice(list(TITLES)), default="layers")
@click.option("--threads", type=click.IntRange(1), multiple=True, default=(1, 2), help="for layers")
@click.option(
    "--picture", type=click.Path(dir_okay=False, path_type=Path), help="for layers: PNG …"
)
@click.option("--ranks", type=click.IntRange(2), default=2, help="for ranks, model")
@click.option("--rounds", type=click.IntRange(2), default=50, show_default=True)
@click.option("--quick", is_flag=True, help="toy sizes, to see that it runs")
@click.option("--json", "as_json", is_flag=True, help="print JSON instead of the table")
def main(
    mode: str,
    threads: tuple[int, ...],
    picture: Path | None,
    ranks: int,
    rounds: int,
    quick: bool,
    as_json: bool,
) -> None:
    if picture and mode != "layers":
        raise click.UsageError("--picture is for layers")
    if mode == "model" and importlib.util.find_spec("transformers") is None:
        raise click.ClickException("transformers is missing: pip install transformers")
    if mode == "layers":
        keep_freed_memory()
        floor = floor_of(threads)
        cases = [(case, n) for n in threads for case in (TOYS if quick else BY_KIND)]
        rows = [
            row for case, n in cases for row in measure(case, threads=n, rounds=rounds, floor=floor)
        ]
        what = f"{', '.join(map(str, threads))} thread(s), {rounds} rounds"
    elif mode == "accuracy":
        rows = accuracy_rows(shape := (2, 4, 8, 8) if quick else (8, 4, 512, 512))
        what = f"{shown(shape)} float32 channels_last, 1 thread"
    else:
        rows = run_ranks(run_rank, (ranks, mode, rounds, quick), ranks)
        what = f"float32 contiguous per rank, {ranks} ranks, 1 thread each, {rounds} rounds"
    if picture:
        draw(rows, environment(what), picture)
    report(TITLES[mode] + ", toy sizes" * quick, what, rows, as_json)


if __name__ == "__main__":
    main()
