"""DistributedDataParallel and a small network over ranks equal one process in float64."""

from __future__ import annotations

import datetime
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import syncbn
from syncbn.launch import launch

from .machine import Machine
from .networks import make_data, make_network, training_step
from .sections import Result, Skipped

State = dict[str, torch.Tensor]

SECONDS = 60  # that a rank waits for the others
# Errors of parameters and statistics after the steps, relative to their largest value. float32
# has convolutions too, and gradients that nearly cancel.
ALLOWED = {torch.float64: 1e-9, torch.float32: 2e-3}


@dataclass(frozen=True)
class Task:
    """split: samples of each rank; a rank without any trains as well."""

    device: str
    backend: str
    dtypes: tuple[torch.dtype, ...]
    split: tuple[int, ...]
    channels: int
    steps: int


def over_nccl(machine: Machine) -> Result:
    """One rank: NCCL takes no two of one GPU."""
    if not machine.is_gpu:
        raise Skipped("NCCL needs a GPU")
    return _train(machine, "nccl", ((6,),))


def over_gloo(machine: Machine) -> Result:
    """Two ranks on the one device, uneven ones, and one that has no sample."""
    return _train(machine, "gloo", ((4, 2),) if machine.toy else ((4, 2), (6, 0)))


def _train(machine: Machine, backend: str, splits: tuple[tuple[int, ...], ...]) -> Result:
    worst: dict[str, float] = {}
    dtypes = (torch.float64,) if machine.toy else tuple(ALLOWED)
    for split in splits:
        sizes = (2, 1) if machine.toy else (16, 3)
        task = Task(str(machine.device), backend, dtypes, split, *sizes)
        states = launch(train, task, ranks=len(split), on_message=lambda message: None)
        expected = expected_state(task)
        for dtype, found in zip(dtypes, states, strict=True):
            errors = {name: _error(found[name], value) for name, value in expected.items()}
            name = max(errors, key=errors.__getitem__)
            key = f"{str(dtype).removeprefix('torch.')} {'+'.join(map(str, split))}"
            worst[key] = errors[name]
            if not errors[name] <= ALLOWED[dtype]:
                limit = f"more than {ALLOWED[dtype]:g}"
                raise AssertionError(f"{key} samples: {name} is {errors[name]:.3g} off, {limit}")
    figures = ", ".join(f"{key} samples {error:.1e}" for key, error in worst.items())
    return Result(f"largest relative error of the trained state: {figures}", worst)


def train(rank: int, task: Task, folder: Path, send: Callable[[Any], None]) -> list[State]:
    """What a rank does; for each dtype the state after the steps, in float64 on the CPU."""
    device = torch.device(task.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    dist.init_process_group(
        task.backend,
        init_method=f"file://{folder}/store",
        rank=rank,
        world_size=len(task.split),
        timeout=datetime.timedelta(seconds=SECONDS),
    )
    return [_state_after(rank, task, device, dtype) for dtype in task.dtypes]


def _state_after(rank: int, task: Task, device: torch.device, dtype: torch.dtype) -> State:
    model = syncbn.convert(make_network(task.channels)).to(device, dtype)
    ids = [device.index] if device.type == "cuda" else None
    parallel = nn.parallel.DistributedDataParallel(model, device_ids=ids)
    images, labels = make_data(sum(task.split))
    own = slice(sum(task.split[:rank]), sum(task.split[: rank + 1]))
    images, labels = images[own].to(device, dtype), labels[own].to(device)
    # DDP averages gradients over ranks, which then are those of the mean over all samples.
    share = len(task.split) / sum(task.split)
    step = training_step(parallel, images, labels, share=share)
    for _ in range(task.steps):
        step()
    return {name: value.double().cpu() for name, value in model.state_dict().items()}


def expected_state(task: Task) -> State:
    """The same steps of torch's layers in one process, in float64 on the CPU."""
    model = make_network(task.channels).double()
    images, labels = make_data(sum(task.split))
    step = training_step(model, images, labels, share=1 / len(images))
    for _ in range(task.steps):
        step()
    return dict(model.state_dict())


def _error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).abs().max() / expected.abs().max().clamp_min(0.1))
