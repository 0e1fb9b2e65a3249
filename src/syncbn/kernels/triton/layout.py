"""How tensors lie in memory, and how the kernels get them: contiguous or channels_last.

Other strides are copied first, and results copied to the strides of torch.empty_like(x).
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...tensors.layout import laid, strides_like
from .launch import processors
from .plan import Plan, make_plan


def is_last(x: Tensor) -> bool | None:
    """Whether x is channels_last (True), contiguous (False; perhaps both), or neither (None)."""
    if x.is_contiguous():
        return False
    dim = x.dim()
    if dim == 4:
        last = x.is_contiguous(memory_format=torch.channels_last)
    elif dim == 5:
        last = x.is_contiguous(memory_format=torch.channels_last_3d)
    else:
        last = x.movedim(1, -1).is_contiguous()
    return True if last else None


def planned(x: Tensor) -> tuple[Tensor, Plan]:
    """x, or a contiguous copy of it, and the plan for it."""
    if x.is_neg():
        x = x.resolve_neg()
    last = is_last(x)
    if last is None:
        x, last = x.contiguous(), False
    n, channels, *_ = x.shape
    values = x.numel() // channels
    inner = values // n if n else 0
    outer, inner = (values, 1) if last or inner == 1 else (n, inner)
    return x, make_plan(outer, channels, inner, x.element_size(), processors(x.get_device()))


def like(dy: Tensor, x: Tensor) -> Tensor:
    """dy, or a copy of it that lies as x, which is contiguous or channels_last."""
    if dy.is_neg():
        dy = dy.resolve_neg()
    if dy.stride() == x.stride():
        return dy
    last, wanted = is_last(dy), is_last(x)
    one_value = x.numel() == x.shape[0] * x.shape[1]  # of a channel in a sample: both are the same
    return dy if last is wanted or (one_value and last is not None) else laid(x.stride(), dy)


def room(x: Tensor, lain: Tensor) -> Tensor | None:
    """Memory for a result like x, where the kernels get a copy of it: taken before they change
    anything, as there may be none.
    """
    return None if lain is x else torch.empty_like(x)


def restored(result: Tensor, x: Tensor) -> Tensor:
    """A result for a copy of x, with the strides of torch.empty_like(x)."""
    return laid(strides_like(x), result)
