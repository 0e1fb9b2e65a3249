"""What a forward in training moves: the running statistics and the counters of batches."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils._mode_utils import no_dispatch

from ..kernels import Running
from ..numerics.moments import Merged, unpack, wide_dtype
from ..tensors.recomputation import moves, moves_in_graph
from ..tensors.storages import is_dtensor
from .accumulation import Accumulator
from .mode import Mode

_NAMES = ("running_mean", "running_var", "num_batches_tracked", "num_batches_skipped")


class _Batch(NamedTuple):
    """What a batch would move: its mean and unbiased variance, and how often: once, or not yet."""

    mean: Tensor
    var: Tensor
    counted: Tensor


def begin_update(
    running: Running,
    mode: Mode,
    skipped: Tensor | None = None,
    accumulator: Accumulator | None = None,
) -> tuple[Running, Callable[[], None] | None]:
    """What the kernels are to move, and by how much; then call what is returned, if anything.

    skipped: counts batches whose statistics are not finite, which then move nothing else; None for
    a layer that lets them. accumulator: for which statistics wait. Then nothing moves.

    A second forward of a checkpoint runs the same operations, as checkpointing demands, but moves
    by nothing. A compiled graph that was traced in the first forward runs in the second, too. So it
    moves copies, and asks whenever it runs whether to keep them.
    """
    mean, var, batches, _ = running
    key = batches if mean is None else mean
    if mode.tracing or mean is None:
        skipped = None
    first: bool | Tensor
    if not mode.compiling:
        first = moves(key)
        if first and accumulator is not None and mean is not None:
            with no_dispatch():
                copied = mean.clone(), None if var is None else var.clone()
            return Running(*copied, None, 0.0), accumulator.keep  # as in a second forward
        if first and skipped is None:
            return running, None
    elif key is None or mode.exporting:
        return running, None
    else:
        first, copies = _in_graph(running, skipped)
    if skipped is not None and mean is not None:
        batch = _nothing_yet(mean, mean if var is None else var)
        return Running(*batch, 1.0), partial(_follow_if_finite, running, batch, first, skipped)
    if isinstance(first, Tensor):
        return copies, partial(_keep_if_first, running, copies, first)
    return Running(mean, var, None, 0.0), None


def _in_graph(running: Running, skipped: Any) -> tuple[Tensor, Running]:
    """Whether a graph's forward moves the statistics, and copies of them to move."""
    named = dict(zip(_NAMES, (*running[:3], skipped), strict=True))
    given = {name: tensor for name, tensor in named.items() if tensor is not None}
    copies: list[Tensor]
    if not any(map(is_dtensor, given.values())):
        first, *copies = moves_in_graph(given, torch.is_grad_enabled())
    else:
        from torch.distributed.tensor import DTensor, Replicate

        mesh = next(tensor.device_mesh for tensor in given.values() if is_dtensor(tensor))
        here = {name: t.to_local() if is_dtensor(t) else t for name, t in given.items()}
        first, *_ = moves_in_graph(here, torch.is_grad_enabled())
        first = DTensor.from_local(first, mesh, [Replicate()] * mesh.ndim, run_check=False)
        copies = [tensor.detach().clone() for tensor in given.values()]
    found = dict(zip(given, copies, strict=True))
    mean, var, batches = (found.get(name) for name in _NAMES[:3])
    return first, Running(mean, var, batches, running.momentum)


def skips_nonfinite(layer: nn.Module) -> bool:
    return "num_batches_skipped" in layer._buffers


def skip_nonfinite(layer: nn.Module, skip: bool) -> None:
    """Let ``layer`` have a counter of the batches that it skips, or none."""
    if not skip:
        layer._buffers.pop("num_batches_skipped", None)
        layer._non_persistent_buffers_set.discard("num_batches_skipped")
    elif not skips_nonfinite(layer):
        tracked = layer._buffers.get("num_batches_tracked")
        like = torch.zeros(()) if tracked is None else tracked
        skipped = torch.zeros_like(like, dtype=torch.int64)
        layer.register_buffer("num_batches_skipped", skipped, persistent=False)


def _keep_if_first(running: Running, copies: Running, first: Tensor) -> None:
    for old, new in zip(running[:3], copies[:3], strict=True):
        if old is not None and new is not None:
            old.copy_(torch.where(first, new, old))


def _nothing_yet(mean: Tensor, var: Tensor) -> _Batch:
    """What becomes, moved with momentum 1, a batch's mean, unbiased variance and how often: once.

    Without a single value in the batch the variance stays negative, which no variance is.
    """
    wide = [torch.promote_types(tensor.dtype, torch.float32) for tensor in (mean, var)]
    zeros, negative = torch.zeros_like(mean, dtype=wide[0]), torch.full_like(var, -1, dtype=wide[1])
    return _Batch(zeros, negative, mean.new_zeros((), dtype=torch.int64))


def _follow_if_finite(
    running: Running, batch: _Batch, first: bool | Tensor, skipped: Tensor
) -> None:
    """Move ``running`` towards the batch's unless those are not finite or a second forward's.

    In tensors only: a device is not waited for.
    """
    mean, var, counted = batch
    finite = counted >= 0
    for old, new in zip(running[:2], (mean, var), strict=True):
        held = new if old is None else new.to(old.dtype)  # half overflows sooner
        finite = finite & held.isfinite().all()
    counted = counted * first
    skipped.add_(counted * ~finite)
    _follow(running, _Batch(mean, var, counted * finite))


def _follow(running: Running, batch: _Batch) -> None:
    """Move ``running`` towards the batch's, and count it, unless it is not to count."""
    mean, var, counted = batch
    _, _, batches, momentum = running
    if batches is not None:
        batches.add_(counted)
    wide = wide_dtype(mean.device)
    rate: float | Tensor = momentum or 0.0
    if momentum is None and batches is not None:
        rate = 1 / batches.to(wide).clamp_min(1)
    move = (counted > 0) & ~(var < 0).any()
    for old, new in zip(running[:2], (mean, var), strict=True):
        if old is not None and momentum != 0:  # 0·∞ would be no number
            now = old.to(wide)
            old.copy_(torch.where(move, (1 - rate) * now + rate * new, now))


@torch.no_grad()
def follow_merged(running: Running, merged: Merged, counted: Tensor | None = None) -> None:
    """Move ``running`` once by all that was merged.

    counted: how many batches that were, where it may be none; then nothing moves.
    """
    if merged.packed is None:
        return
    count, mean, m2 = unpack(merged.packed)
    var = torch.where(count > 0, m2 / (count - 1).clamp_min(1), -1.0)
    once = count.new_ones((), dtype=torch.int64) if counted is None else counted.clamp_max(1)
    _follow(running, _Batch(mean, var, once))
