"""What one rank's layers get in one step: moments of each call, and one message of all layers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.utils._mode_utils import no_dispatch

from ...kernels import composite, select_kernels
from ...layers.modules import SyncBatchNorm
from ...numerics.moments import merge, stacked, unpack, wide_dtype
from ...step.masked import check_mask, resolve_mask
from ...tensors.storages import PLAIN, has_storage

HEAD = 4  # numbers of a layer in a message, before those of its channels: see Message
PER_CHANNEL = 3


class Call(NamedTuple):
    """Moments (k, 1 + 2C) of the parts of one call's batch, and how many samples it has."""

    parts: Tensor
    samples: int


def measure_call(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """What a layer is about to normalise; None without values, or where it cannot be measured.

    The halves of the batch are measured by themselves: how much they differ tells how much the mean
    of such a batch depends on which samples it has.
    """
    x, mask = input_of(args, kwargs), None
    if x is None or x.shape[1] != layer.num_features or not x.numel() or not has_storage(x):
        return None
    if isinstance(layer, SyncBatchNorm):
        mask = args[1] if len(args) > 1 else kwargs.get("mask")
        if mask is not None:
            check_mask(mask, x)
        elif layer._mask_sources:
            mask = resolve_mask(layer._mask_sources, x)
    # A selective checkpoint's second forward must run the operations that it saw in the first.
    unseen = no_dispatch() if torch._C._len_torch_dispatch_stack() else nullcontext()
    with torch.no_grad(), unseen:
        return Call(_measure_halves(x.detach(), mask), len(x))


def input_of(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """A layer's input, where it is a plain tensor (N, C, *) of numbers."""
    x: Any = args[0] if args else kwargs.get("input")
    if type(x) not in PLAIN or x.is_nested or x.layout is not torch.strided or x.is_meta:
        return None
    plain: Tensor | None = x if x.dim() >= 2 and x.is_floating_point() else None
    return plain


def _measure_halves(x: Tensor, mask: Tensor | None) -> Tensor:
    middle = len(x) // 2
    halves = [slice(0, middle), slice(middle, None)] if middle else [slice(None)]
    if mask is None:
        steps = select_kernels(x).steps
        return torch.stack([steps.measure(x[half]) for half in halves])
    return torch.stack([composite.measure(x[half], mask[half]) for half in halves])


def message_of(
    calls: Sequence[Sequence[Call]], channels: Sequence[int], device: torch.device
) -> Tensor:
    """What this rank says of all layers, whether they were called or not: one tensor (n,).

    Of each layer: how many values per channel, samples and calls there were, and how many parts
    beyond the first of each call; then of all layers' channels the mean, M2, and the part of M2
    that is between parts of calls. n is a function of ``channels`` alone.
    """
    dtype = wide_dtype(device)
    counts, known, columns = [], [], []
    for own, size in zip(calls, channels, strict=True):
        if own:
            count, *totals = _totals(own)
        else:
            count = torch.zeros((), dtype=dtype, device=device)
            totals = [count.expand(size)] * PER_CHANNEL
        counts.append(count.reshape(1).to(device, dtype))
        columns.append(torch.stack(totals).to(device, dtype))
        samples = sum(call.samples for call in own)
        known.append((samples, len(own), sum(len(call.parts) - 1 for call in own)))
    host = torch.tensor(known, dtype=dtype, device="cpu").t().flatten()
    return torch.cat((*counts, host.to(device, non_blocking=True), torch.cat(columns, 1).flatten()))


def _totals(calls: Sequence[Call]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Count (), mean, M2 and M2 between parts (C,) of a layer's calls."""
    sets = [unpack(call.parts) for call in calls]
    merged = [merge(each) for each in sets]
    between = [whole.m2 - each.m2.sum(0) for whole, each in zip(merged, sets, strict=True)]
    if len(calls) == 1:
        return (*merged[0], between[0])
    whole = merge(unpack(stacked([each.pack() for each in merged])))
    return (*whole, stacked(between).sum(0))
