"""One process alone by torch's own operator, which graphs fuse and exports know."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..tensors.layout import torchs_batch_norm
from .records import Call


def needs_own_kernels(call: Call) -> bool:
    """Whether torch's operator would refuse a batch in training, or do it wrongly."""
    mean, var, batches, momentum = call.running
    if call.mask is not None or _mixes_dtypes(call.input, _per_channel(call)):
        return True
    if not call.mode.compiling:
        # A view that reads with the opposite sign: torch's operator would move a copy.
        return any(t is not None and t.is_neg() for t in (mean, var))
    # torch's operator wants numbers that a graph does not have: a momentum, how many values.
    counting = momentum is None and batches is not None
    return not call.mode.silent and (counting or call.lengths is not None)


def _per_channel(call: Call) -> tuple[Tensor | None, ...]:
    """All (C,) tensors. No property of the record: torch 2.10 and 2.11 would break graphs at it."""
    return call.running.mean, call.running.var, *call.affine


def _mixes_dtypes(input: Tensor, tensors: Sequence[Tensor | None]) -> bool:
    """Whether torch's operator refuses this mixture of dtypes, which our kernels take."""
    common, own = None, input.dtype
    for tensor in tensors:
        if tensor is not None:
            if common is not None and tensor.dtype != common:
                return True
            common = tensor.dtype
    if common is None or common == own:
        return False
    return common != torch.float32 or own == torch.float64


def normalise_as_torch(call: Call) -> Tensor:
    input, _, running, options, *_ = call
    tensors = _per_channel(call)
    if _mixes_dtypes(input, tensors):
        wide = torch.float64 if input.dtype == torch.float64 else torch.float32
        tensors = tuple(None if t is None else t.to(wide) for t in tensors)
    momentum, batches = running.momentum, running.batches
    if momentum is None:
        momentum = 0.0 if batches is None else 1 / float(batches + 1)
    visible = not (call.mode.tracing or call.mode.compiling)
    y = torchs_batch_norm(input, *tensors, options.training, momentum, options.eps, visible=visible)
    if batches is not None:
        batches.add_(1)
    if call.accumulator is not None:
        call.accumulator.measure(input)
    return y
