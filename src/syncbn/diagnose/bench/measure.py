"""What one rank does: every layer forward and backward on the same tensors, in turns."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...comm import LOCAL, resolve
from ...comm.ways import way_of
from ...kernels import describe
from ...launch import joined
from ...layers.modules import SyncBatchNorm
from ...numerics.moments import wide_dtype
from .naive import NaiveSyncBatchNorm
from .options import LAYOUTS, Case, Options
from .timing import CPU, WARM_UP, Run, in_turns, keep_freed_memory

# What is compared, by its name in figures. ALONE is our layer without its group: the arithmetic.
SYNCBN, ALONE, EXCHANGE = "syncbn", "alone", "exchange"
LOCAL_PEER, SYNC_PEER, NAIVE = "batchnorm", "syncbatchnorm", "naive"
_BATCH_NORMS = {2: nn.BatchNorm1d, 3: nn.BatchNorm1d, 4: nn.BatchNorm2d, 5: nn.BatchNorm3d}
_PATIENCE = 600.0  # seconds, for a rank that neither answers nor dies
_SECONDS_BETWEEN_MESSAGES = 0.1

Times = dict[str, list[tuple[float, ...]]]  # kind → (forward, backward) of every round, in seconds


@dataclass(frozen=True)
class Task:
    """What every rank is given."""

    options: Options
    cases: tuple[Case, ...]


@dataclass(frozen=True)
class Progress:
    """How many rounds rank 0 has done, those that warm up among them."""

    done: int
    total: int


@dataclass(frozen=True)
class Measured:
    """Rank 0's times of every case, and what served."""

    times: tuple[Times, ...]
    device: str
    kernels: str
    communicator: str


def run_rank(rank: int, task: Task, folder: Path, send: Callable[[Progress], None]) -> Measured:
    """Measure as one of the ranks. ``folder`` is theirs; only rank 0 sends."""
    options = task.options
    torch.set_num_threads(options.threads)
    torch.manual_seed(rank)
    keep_freed_memory()
    gpu = torch.device("cuda", rank) if options.device == "cuda" else None
    if gpu:
        torch.cuda.set_device(gpu)
    if options.ranks == 1:
        return _measured(task, gpu or CPU, send)
    with joined(rank, options.ranks, folder / "rendezvous", timeout=_PATIENCE, gpu=gpu):
        measured = _measured(task, gpu or CPU, send)
    return measured


def _measured(task: Task, device: torch.device, send: Callable[[Progress], None]) -> Measured:
    progress = _Rounds(len(task.cases) * (task.options.rounds + WARM_UP), send)
    times = tuple(
        in_turns(
            steps_of(case, device, task.options.ranks), task.options.rounds, device, progress.count
        )
        for case in task.cases
    )
    alone = task.options.ranks == 1
    cpu = torch.backends.cpu.get_cpu_capability()
    return Measured(
        times=times,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else cpu,
        kernels=describe()[device.type],
        communicator="none, one rank" if alone else way_of(resolve(None), device),
    )


@dataclass
class _Rounds:
    """Counts them and now and then says so."""

    total: int
    send: Callable[[Progress], None]
    done: int = 0
    sent: float = field(default_factory=time.monotonic)

    def count(self) -> None:
        self.done += 1
        if time.monotonic() - self.sent > _SECONDS_BETWEEN_MESSAGES or self.done == self.total:
            self.sent = time.monotonic()
            self.send(Progress(self.done, self.total))


def layers_of(case: Case, device: torch.device, ranks: int) -> dict[str, nn.Module]:
    """The layers that are compared. Parameters are float32, as under AMP, or float64 as the data.

    torch.nn.SyncBatchNorm runs on GPUs alone.
    """
    channels = case.shape[1]
    layers: dict[str, nn.Module] = {SYNCBN: SyncBatchNorm(channels)}
    if ranks > 1:
        layers[ALONE] = SyncBatchNorm(channels, process_group=LOCAL)
    layers[LOCAL_PEER] = _BATCH_NORMS[len(case.shape)](channels)
    if device.type == "cuda":
        layers[SYNC_PEER] = nn.SyncBatchNorm(channels)
    layers[NAIVE] = NaiveSyncBatchNorm(channels)
    dtype = torch.float64 if case.dtype == "float64" else torch.float32
    return {name: layer.to(device, dtype) for name, layer in layers.items()}


def steps_of(case: Case, device: torch.device, ranks: int) -> dict[str, tuple[Run, Run]]:
    """Forward and backward of every layer, and the two messages of ours."""
    x = torch.randn(case.shape, dtype=getattr(torch, case.dtype), device=device)
    x = x.contiguous(memory_format=LAYOUTS[case.layout])
    dy = torch.randn_like(x)
    steps = {name: passes(layer, x, dy) for name, layer in layers_of(case, device, ranks).items()}
    if ranks > 1:
        steps[EXCHANGE] = exchange_of(case.shape[1], device)
    return steps


def passes(layer: nn.Module, x: Tensor, dy: Tensor) -> tuple[Run, Run]:
    """Forward of x, and backward of dy through the last forward. Results are freshly allocated."""
    leaf = x.detach().requires_grad_()
    leaves = [leaf, *layer.parameters()]
    outputs: list[Tensor] = []

    def forward() -> None:
        outputs.append(layer(leaf))

    def backward() -> None:
        for each in leaves:
            each.grad = None
        outputs.pop().backward(dy)  # type: ignore[no-untyped-call]

    return forward, backward


def exchange_of(channels: int, device: torch.device) -> tuple[Run, Run]:
    """Messages as large as the layer's: count, mean and M2 per channel; two sums per channel."""
    comm: Any = resolve(None)
    numbers: dict[str, Any] = {"dtype": wide_dtype(device), "device": device}
    moments = torch.zeros(1 + 2 * channels, **numbers)
    sums = torch.zeros(2 * channels, **numbers)
    return (lambda: comm.all_gather(moments)), (lambda: comm.all_reduce(sums))
