"""What one rank does: the float64 comparison, then the training with its validation curve."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..launch import joined
from ..models.convert import convert
from .data import Digits, batches
from .network import network
from .options import Arm, DemoOptions

LEARNING_RATE = 0.15  # for four images per step, falling linearly to nothing
_PATIENCE = 120.0  # seconds, for a rank that neither answers nor dies
_SECONDS_BETWEEN_MESSAGES = 0.1


@dataclass(frozen=True)
class Point:
    """One point of the validation curve."""

    step: int
    epoch: float
    images: int
    accuracy_percent: float
    loss: float


@dataclass(frozen=True)
class Progress:
    """How far rank 0 is; accuracy_percent is None before the first validation."""

    step: int
    accuracy_percent: float | None


@dataclass(frozen=True)
class Outcome:
    """What an arm found.

    Attributes:
        curve: validation (eval mode, on rank 0), the end of training last.
        loss: training loss, mean over all ranks and the steps since the last point but one.
        seconds_per_step: median over all steps of rank 0, without validation.
        weights: name → parameter after the float64 steps.
    """

    curve: tuple[Point, ...]
    loss: float
    seconds_per_step: float
    weights: dict[str, Tensor]


@dataclass(frozen=True)
class Task:
    """What every rank of an arm is given."""

    arm: Arm
    options: DemoOptions
    digits: Digits

    @property
    def ranks(self) -> int:
        """How many processes this arm has."""
        return 1 if self.arm.one_process else self.options.ranks


def run_rank(rank: int, task: Task, folder: Path, send: Callable[[Progress], None]) -> Outcome:
    """Run ``task`` as one rank of it. ``folder`` is shared by the ranks; only rank 0 sends."""
    if task.arm.one_process:
        return _run(rank, task, send)
    with joined(rank, task.ranks, folder / "rendezvous", timeout=_PATIENCE):
        outcome = _run(rank, task, send)
    return outcome


def _run(rank: int, task: Task, send: Callable[[Progress], None]) -> Outcome:
    weights = _weights_after_float64_steps(rank, task)
    return _train(rank, task, send, weights)


def _model(task: Task, dtype: torch.dtype) -> nn.Module:
    torch.manual_seed(task.options.seed)
    model: nn.Module = network().to(dtype)
    if task.arm.synchronised:
        model = convert(model)
    return model if task.arm.one_process else DistributedDataParallel(model)


def _optimizer(model: nn.Module, options: DemoOptions) -> torch.optim.Optimizer:
    # The square root keeps a step's noise about constant from one batch size to another.
    lr = LEARNING_RATE * math.sqrt(options.global_batch / 4)
    return torch.optim.SGD(model.parameters(), lr=lr)


def _step(
    model: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, labels: Tensor
) -> Tensor:
    optimizer.zero_grad()
    loss = F.cross_entropy(model(images), labels)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    return loss.detach()


def _share(rank: int, task: Task) -> slice:
    """Which part of each batch this rank takes. All ranks' parts together are the batch."""
    if task.arm.one_process:
        return slice(None)
    return slice(rank * task.options.batch_per_rank, (rank + 1) * task.options.batch_per_rank)


def _weights_after_float64_steps(rank: int, task: Task) -> dict[str, Tensor]:
    model = _model(task, torch.float64)
    optimizer, share, digits = _optimizer(model, task.options), _share(rank, task), task.digits
    for batch in islice(batches(task.options), task.options.check_steps):
        mine = batch[share]
        _step(model, optimizer, digits.train_images[mine].double(), digits.train_labels[mine])
    return {name: weight.detach() for name, weight in _bare(model).named_parameters()}


def _train(
    rank: int, task: Task, send: Callable[[Progress], None], weights: dict[str, Tensor]
) -> Outcome:
    options, digits, share = task.options, task.digits, _share(rank, task)
    model = _model(task, torch.float32)
    optimizer = _optimizer(model, options)
    steps = options.epochs * options.steps_per_epoch
    decay = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    due = _evaluation_steps(options)
    curve: list[Point] = []
    losses: list[Tensor] = []
    seconds: list[float] = []
    sent = -math.inf
    for step, batch in enumerate(islice(batches(options), steps), start=1):
        start = time.perf_counter()
        mine = batch[share]
        losses.append(_step(model, optimizer, digits.train_images[mine], digits.train_labels[mine]))
        decay.step()
        seconds.append(time.perf_counter() - start)
        if rank != 0:
            continue
        if step in due:
            curve.append(_validate(_bare(model), digits, options, step))
        if step == steps or time.perf_counter() - sent > _SECONDS_BETWEEN_MESSAGES:
            sent = time.perf_counter()
            send(Progress(step, curve[-1].accuracy_percent if curve else None))
    recent = steps - max((step for step in due if step < steps), default=0)
    loss = _mean_over_ranks(torch.stack(losses[-recent:]).mean())
    return Outcome(tuple(curve), loss, statistics.median(seconds), weights)


def _evaluation_steps(options: DemoOptions) -> set[int]:
    per_epoch, count = options.steps_per_epoch, options.evaluations_per_epoch
    return {
        epoch * per_epoch + math.ceil(per_epoch * part / count)
        for epoch in range(options.epochs)
        for part in range(1, count + 1)
    }


@torch.no_grad()
def _validate(model: nn.Module, digits: Digits, options: DemoOptions, step: int) -> Point:
    model.eval()
    scores = model(digits.validation_images)
    model.train()
    right = (scores.argmax(1) == digits.validation_labels).double().mean().item()
    return Point(
        step=step,
        epoch=step / options.steps_per_epoch,
        images=step * options.global_batch,
        accuracy_percent=100 * right,
        loss=F.cross_entropy(scores, digits.validation_labels).item(),
    )


def _bare(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _mean_over_ranks(value: Tensor) -> float:
    if dist.is_initialized():
        dist.all_reduce(value)
        value = value / dist.get_world_size()
    return value.item()
