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
from ...models.inputs import input_of, mask_of
from ...numerics.moments import merge, stacked, unpack, wide_dtype
from ...tensors.storages import PLAIN, has_storage

PARTS = 2  # of a batch: its halves
HEAD = 2  # numbers of a layer in a message that are no moments: see message_of


class Call(NamedTuple):
    """Packed moments (1 + 2C,) of each half of one call's batch; how many samples it has.

    A batch of one sample has a first half only.
    """

    halves: list[Tensor]
    samples: int


def measure_call(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call | None:
    """What a layer is about to normalise; None without values, or where it cannot be measured.

    The halves of the batch are measured by themselves: how much they differ tells how much the mean
    of such a batch depends on which samples it has.
    """
    x = plain_input(layer, args, kwargs)
    if x is None or x.shape[1] != layer.num_features or not x.numel() or not has_storage(x):
        return None
    mask = mask_of(layer, args, kwargs, x)
    # A selective checkpoint's second forward must run the operations that it saw in the first.
    unseen = no_dispatch() if torch._C._len_torch_dispatch_stack() else nullcontext()
    with torch.no_grad(), unseen:
        return Call(_measure_halves(x.detach(), mask), len(x))


def plain_input(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
    """A layer's input, where its values are a plain tensor (N, C, *) of numbers."""
    x: Any = input_of(layer, args, kwargs)
    if type(x) not in PLAIN or x.is_nested or x.layout is not torch.strided or x.is_meta:
        return None
    plain: Tensor | None = x if x.dim() >= 2 and x.is_floating_point() else None
    return plain


def _measure_halves(x: Tensor, mask: Tensor | None) -> list[Tensor]:
    middle = len(x) // 2
    halves = [slice(0, middle), slice(middle, None)] if middle else [slice(None)]
    if mask is None:
        steps = select_kernels(x).steps
        return [steps.measure(x[half]) for half in halves]
    return [composite.measure(x[half], mask[half]) for half in halves]


def message_of(
    calls: Sequence[Sequence[Call]], channels: Sequence[int], device: torch.device
) -> Tensor:
    """What this rank says of all layers, whether they were called or not: one tensor (n,).

    How many samples and calls each layer had; then packed moments of the first half of each
    layer's batches, and of the second. n is a function of ``channels`` alone.
    """
    dtype = wide_dtype(device)
    known = [[sum(call.samples for call in own) for own in calls], [len(own) for own in calls]]
    head = torch.tensor(known, dtype=dtype, device="cpu").flatten()
    halves = [
        _union([call.halves[part] for call in own if part < len(call.halves)], size, device)
        for part in range(PARTS)
        for own, size in zip(calls, channels, strict=True)
    ]
    return torch.cat((head.to(device, non_blocking=True), *halves))


def _union(sets: Sequence[Tensor], size: int, device: torch.device) -> Tensor:
    """Packed moments (1 + 2C,) of these sets together, there."""
    dtype = wide_dtype(device)
    if not sets:
        return torch.zeros(1 + 2 * size, dtype=dtype, device=device)
    union = sets[0] if len(sets) == 1 else merge(unpack(stacked(sets))).pack()
    return union.to(device, dtype)
