"""Times of the steps on the device, of calls on the host, and of compiled blocks.

Medians over rounds ± half the distance between the quartiles; ratios are the median of the rounds'
own ratios, of the peer's time over ours: above one, ours is faster.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import syncbn
from syncbn.diagnose.bench.timing import summary
from timing import Steps, device_times, host_times

from .calls import (
    PASSES,
    WHOLE,
    Batch,
    Case,
    joined,
    make_batch,
    our_steps,
    our_whole,
    torchs_steps,
    torchs_whole,
)
from .machine import Machine, cache_of, copy_bandwidth
from .peer import Mirror
from .sections import Result

STAGES = ((64, 112), (256, 56), (512, 28), (1024, 14), (2048, 7))  # ResNet-50's, with 224 × 224
SHAPES = (
    *((n, channels, size, size) for n in (2, 32) for channels, size in STAGES),
    *((2, 64, 512, 512), (16, 128, 500)),
)
DTYPES = (torch.float32, torch.bfloat16)
TOYS = (Case((2, 3, 4, 5)), Case((4, 3, 5), torch.bfloat16))
PEERS = {"sync": "torch.nn.SyncBatchNorm's functions", "batchnorm": "torch.nn.BatchNorm"}
_LARGE = 4  # times as large as the cache: what a step reads comes from memory

Row = dict[str, Any]


def speed_cases(machine: Machine) -> list[Case]:
    if machine.toy:
        return list(TOYS)
    return [
        Case(shape, dtype, layout)
        for shape in SHAPES
        for layout in (("contiguous", "channels_last") if len(shape) == 4 else ("contiguous",))
        for dtype in DTYPES
    ]


def device_rows(machine: Machine, cases: Sequence[Case], rounds: int, copy: float) -> list[Row]:
    """A row for each step, and for forward and backward, of every case.

    share: of the bytes per second of a copy, for what the step has to read and write; more than one
    where the tensors stay in the device's cache. copy: those bytes per second.
    """
    return [row for case in cases for row in _rows_of(machine, case, rounds, copy)]


def _rows_of(machine: Machine, case: Case, rounds: int, copy: float) -> list[Row]:
    batch = make_batch(case, machine.device)
    steps = our_steps(batch)
    ours = steps | our_whole(batch)
    sync = torchs_steps(batch)
    if sync:
        sync |= {name: joined(sync, parts) for name, parts in WHOLE.items()}
    calls = _named(syncbn=ours, sync=sync, batchnorm=torchs_whole(batch))
    times = device_times(calls, rounds, machine.device)
    size = batch.x.numel() * batch.x.element_size()
    cached = size < _LARGE * cache_of(machine)
    rows = []
    for name in ours:
        passes = sum(PASSES[step] for step in WHOLE.get(name, (name,)))
        row = _compared(times, name) | {"cached": cached}
        row["share"] = passes * size / copy / (row["syncbn_us"][0] * 1e-6)
        rows.append(_described(case) | row)
    return rows


def _named(**kinds: Steps) -> Steps:
    return {f"{kind} {name}": run for kind, calls in kinds.items() for name, run in calls.items()}


def _described(case: Case) -> Row:
    dtype = str(case.dtype).removeprefix("torch.")
    return {"shape": case.shape, "dtype": dtype, "layout": case.layout}


def _compared(times: dict[str, list[float]], name: str) -> Row:
    """One call's times of all who have it, and how often ours goes into the others'."""
    row: Row = {"call": name}
    ours = times[f"syncbn {name}"]
    for kind in ("syncbn", *PEERS):
        found = times.get(f"{kind} {name}")
        if found is None:
            continue
        row[f"{kind}_us"] = tuple(1e3 * value for value in summary(found, found)[:2])
        if kind != "syncbn":
            row[f"{kind}/syncbn"] = summary(found, ours)[2]
    return row


def host_rows(machine: Machine, rounds: int, calls: int) -> list[Row]:
    """Host time of each step and of whole layers, alone and over ranks, on a small tensor."""
    case = Case((2, 3, 2, 2) if machine.toy else (2, 64, 8, 8))
    batch = make_batch(case, machine.device)
    ours, theirs = _layers(machine, batch)
    named = _named(syncbn=our_steps(batch) | ours, sync=torchs_steps(batch), batchnorm=theirs)
    times = host_times(named, rounds, machine.device, calls)
    names = [name.removeprefix("syncbn ") for name in named if name.startswith("syncbn ")]
    return [_described(case) | _compared(times, name) for name in names]


def _layers(machine: Machine, batch: Batch) -> tuple[Steps, Steps]:
    """Layers' calls, ours and torch's: forward, and both ways; alone, and beside a mirror."""
    channels = batch.x.shape[1]

    def layer(kind: type[nn.Module], **options: Any) -> nn.Module:
        return kind(channels, device=machine.device, **options)

    def both_ways(module: nn.Module, x: Tensor) -> Any:
        y = module(x)
        return torch.autograd.grad(y, (x, *module.parameters()), batch.dy)

    x = batch.x.clone().requires_grad_()
    plain = layer(nn.BatchNorm2d)
    alone = layer(syncbn.SyncBatchNorm2d)
    ranked = layer(syncbn.SyncBatchNorm2d, process_group=Mirror())
    ours = {
        "layer forward": lambda: alone(x),
        "layer": lambda: both_ways(alone, x),
        "layer over ranks": lambda: both_ways(ranked, x),
    }
    return ours, {"layer forward": lambda: plain(x), "layer": lambda: both_ways(plain, x)}


class Block(nn.Module):
    """relu(bn(x) + residual)"""

    def __init__(self, bn: nn.Module) -> None:
        super().__init__()
        self.bn = bn

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return torch.relu(self.bn(x) + residual)


def compiled_rows(machine: Machine, rounds: int) -> list[Row]:
    """A block forward and backward: ours beside a mirror and torch's, eager and compiled."""
    rows = []
    shapes = ((2, 3, 4, 4),) if machine.toy else ((32, 256, 56, 56), (2, 64, 512, 512))
    for shape in shapes:
        case = Case(shape, torch.float32, "channels_last")
        batch = make_batch(case, machine.device)
        x, residual = (batch.x.clone().requires_grad_() for _ in range(2))
        norms = {
            "syncbn": syncbn.SyncBatchNorm2d(shape[1], process_group=Mirror()),
            "batchnorm": nn.BatchNorm2d(shape[1]),
        }
        blocks = {name: Block(norm).to(machine.device) for name, norm in norms.items()}
        backend = "inductor" if machine.is_gpu else "eager"
        calls = {}
        for name, block in blocks.items():
            graph = torch.compile(block, backend=backend, fullgraph=True, dynamic=False)
            for how, module in (("eager", block), ("compiled", graph)):
                calls[f"{name} {how}"] = _block_step(module, x, residual, batch.dy)
        times = device_times(calls, rounds, machine.device)
        rows += [_described(case) | _compared(times, how) for how in ("eager", "compiled")]
    return rows


def _block_step(module: Any, x: Tensor, residual: Tensor, dy: Tensor) -> Any:
    parameters = tuple(module.parameters())

    def run() -> Any:
        y = module(x, residual)
        return torch.autograd.grad(y, (x, residual, *parameters), dy)

    return run


def measure_device(machine: Machine) -> Result:
    copy = copy_bandwidth(machine)
    rounds = 2 if machine.toy else 20
    rows = device_rows(machine, speed_cases(machine), rounds, copy)
    return Result(said_of_device(rows) if machine.is_gpu else _said_of_none(rows), rows)


def measure_host(machine: Machine) -> Result:
    rows = host_rows(machine, 2 if machine.toy else 7, 1 if machine.toy else 100)
    said = ", ".join(f"{row['call']} {row['syncbn_us'][0]:.1f} µs" for row in rows)
    return Result(said if machine.is_gpu else _said_of_none(rows), rows)


def measure_compiled(machine: Machine) -> Result:
    rows = compiled_rows(machine, 2 if machine.toy else 20)
    compared = [f"{row['call']} {row['batchnorm/syncbn']:.2f}" for row in rows]
    said = f"torch.nn.BatchNorm2d's time over ours: {', '.join(compared)}"
    return Result(said if machine.is_gpu else _said_of_none(rows), rows)


def _said_of_none(rows: Sequence[Row]) -> str:
    return f"{len(rows)} rows, of which none says anything of a GPU"


def said_of_device(rows: Sequence[Row]) -> str:
    """What the rows say, in one line."""
    words = []
    for peer, name in PEERS.items():
        ratios = [row[f"{peer}/syncbn"] for row in rows if f"{peer}/syncbn" in row]
        if ratios:
            slower = sum(ratio < 1 for ratio in ratios)
            low, middle, high = min(ratios), statistics.median(ratios), max(ratios)
            words.append(
                f"{name} take {middle:.2f} ({low:.2f} to {high:.2f}) times as long, less in "
                f"{slower} of {len(ratios)}"
            )
    shares = [row["share"] for row in rows if row["call"] in WHOLE and not row["cached"]]
    if shares:
        words.append(f"share of copy bandwidth {min(shares):.2f} to {max(shares):.2f} where large")
    return "; ".join(words)
