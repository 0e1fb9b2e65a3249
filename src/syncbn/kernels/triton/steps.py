"""One launch each, for tensors that lie as the kernels want them and are seen to be fit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch
from torch import Tensor

from ...tensors.prefix import NO_PREFIX, WORDS, Prefix
from ..interface import Affine, Running
from .launch import Arguments, dtypes, launch, meeting_place
from .plan import Plan, ceil, power_of_two

MOST_SETS = 64  # that normalise merges; of more one launch makes one
_MERGED = 1024  # numbers of sets that normalise looks at together
_MERGE_SETS = (16, 32)  # channels and sets at a time, where a program does nothing else


def measure(x: Tensor, plan: Plan, prefix: Prefix = NO_PREFIX) -> Tensor:
    """(count, mean, M2) of x, packed (1 + 2C,), after a prefix."""
    channels = x.shape[1]
    message = x.new_empty(prefix.room + 1 + 2 * channels, dtype=torch.float64)
    place = meeting_place(x, plan.groups, plan.splits * 3 * channels)
    _launch("measure", plan, (x, *place, message), (*plan[:7], *_numbers(prefix)))
    return message


def normalise(
    x: Tensor,
    sets: Tensor,
    plan: Plan,
    *,
    affine: Affine,
    running: Running,
    eps: float,
    saved: Tensor,
    count: Tensor | None = None,
) -> Tensor:
    """y; writes mean and invstd into saved (2, C), and the count of all sets; moves the running
    statistics.
    """
    y = torch.empty_like(x)
    number = sets.shape[0]
    if number > MOST_SETS:
        sets, number = merge_sets(sets), 1
    weight, bias = affine
    mean, var, batches, momentum = running
    cumulative = momentum is None and batches is not None
    if not (momentum or cumulative):  # zero times an infinite mean would be no number
        momentum, mean, var = 0.0, None, None
    few = power_of_two(number)
    block = min(few, max(1, _MERGED // plan.width)) if plan.last else few
    tensors = x, y, sets, weight, bias, mean, var, batches, saved, count
    numbers = *plan[:6], sets.stride(0), number, momentum or 0.0, eps
    constants = block, number <= block, cumulative
    with _counted(batches) if batches is not None and cumulative else nullcontext():
        _launch("normalise", plan, tensors, numbers, constants)
    return y


@contextmanager
def _counted(batches: Tensor) -> Iterator[None]:
    """With one batch more, in a launch of its own, for all programs to read; unless this fails."""
    batches.add_(1)
    try:
        yield
    except Exception:
        batches.sub_(1)
        raise


def merge_sets(sets: Tensor) -> Tensor:
    """Packed moments (1, 1 + 2C) of all sets (k, 1 + 2C) together."""
    channels = sets.shape[1] // 2
    packed = sets.new_empty((1, sets.shape[1]))
    most, block = _MERGE_SETS
    width = min(power_of_two(channels), most)
    numbers = (sets.stride(0), sets.shape[0], channels)
    arguments = Arguments((sets, packed), numbers, (width, block, False))
    grid = (ceil(channels, width), 1)
    launch("merge_sets", arguments, grid=grid, warps=4, large=False)
    return packed


def gradient_sums(
    dy: Tensor,
    x: Tensor,
    plan: Plan,
    *,
    mean: Tensor,
    invstd: Tensor,
    into: tuple[Tensor | None, Tensor | None] = (None, None),
    prefix: Prefix = NO_PREFIX,
) -> Tensor:
    """(Σdy, Σdy·x̂) per channel (2C,), after a prefix; writes the parameters' gradients, which they
    are, into two tensors (C,), too.
    """
    channels = x.shape[1]
    message = x.new_empty(prefix.room + 2 * channels, dtype=torch.float64)
    place = meeting_place(x, plan.groups, plan.splits * 2 * channels)
    tensors = dy, x, mean, invstd, *place, message, *into
    _launch("gradient_sums", plan, tensors, (*plan[:7], *_numbers(prefix)))
    return message


def input_gradient(
    dy: Tensor,
    x: Tensor,
    plan: Plan,
    *,
    weight: Tensor | None,
    statistics: tuple[Tensor, Tensor, Tensor | None],
    sums: Tensor,
) -> Tensor:
    """dx. statistics: mean, invstd and the count, None for that of x; sums: of 2C numbers."""
    dx = torch.empty_like(x)
    _launch("input_gradient", plan, (dy, x, dx, *statistics, weight, sums), plan[:6])
    return dx


def _numbers(prefix: Prefix) -> tuple[float, ...]:
    """As the kernels take a prefix (tiles.py)."""
    words, at, room = prefix
    return room, at, *words, *(0.0,) * (WORDS - len(words))


def _launch(
    name: str,
    plan: Plan,
    tensors: tuple[Tensor | None, ...],
    numbers: tuple[float, ...],
    constants: tuple[object, ...] = (),
) -> None:
    x = tensors[0]
    assert x is not None
    shape = (plan.unit, plan.rows, plan.width, plan.last, dtypes(x.dtype))
    arguments = Arguments(tensors, numbers, (*shape, *constants))
    launch(name, arguments, grid=plan.grid, warps=plan.warps, large=plan.large)
