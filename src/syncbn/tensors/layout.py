"""Strides: results and gradients keep the order of their input's dimensions in memory.

torch's own operator, indexing and copies lose it, but for contiguous and channels_last.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import batch_norm


def torchs_batch_norm(x: Tensor, *options: Any, visible: bool) -> Tensor:
    """torch.nn.functional.batch_norm, whose result and gradient have the strides of x.

    visible: False within a trace or a graph, where nobody sees which ones.
    """
    if not visible or _is_usual(x):
        return batch_norm(x, *options)
    strides = strides_like(x)
    usual = with_gradient_like(x)
    if 1 not in x.shape:
        return laid(strides, batch_norm(usual, *options))
    y = batch_norm(laid(contiguous_strides(x.shape), usual), *options)
    if y.requires_grad:  # torch's backward is as wrong for such a dy
        y.register_hook(partial(_gradient_laid, y.stride()))  # type: ignore[no-untyped-call]
    return laid(strides, y)


def _is_usual(x: Tensor) -> bool:
    """Whether torch's operator keeps the layout of x, or nobody sees which one it has.

    Where a dimension has one element, whose stride means nothing, torch's backward takes one layout
    for another and is wrong.
    """
    if x.is_meta or torch._C._are_functorch_transforms_active():
        return True
    return (1 not in x.shape or not torch.is_grad_enabled()) and (
        x.is_contiguous() or (x.dim() in (4, 5) and x.movedim(1, -1).is_contiguous())
    )


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    strides, size = [], 1
    for length in reversed(shape):
        strides.append(size)
        size *= max(length, 1)
    return tuple(reversed(strides))


def strides_like(x: Tensor) -> tuple[int, ...]:
    """Those of torch.empty_like(x)."""
    return torch.empty_like(x, device="meta").stride()


def laid(strides: tuple[int, ...], values: Tensor) -> Tensor:
    """values with these strides: a copy, unless it has them."""
    if values.stride() == strides:
        return values
    return values.new_empty_strided(values.shape, strides).copy_(values)


def with_gradient_like(x: Tensor) -> Tensor:
    """x, as a view whose gradient gets the strides of torch.empty_like(x)."""
    active = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    if active or not (torch.is_grad_enabled() and x.requires_grad):
        return x
    # view_as() would give other strides to dimensions of one element
    view: Tensor = torch.ops.aten.alias.default(x)
    view.register_hook(partial(_gradient_laid, strides_like(x)))  # type: ignore[no-untyped-call]
    return view


def _gradient_laid(strides: tuple[int, ...], gradient: Tensor | None) -> Tensor | None:
    return None if gradient is None else laid(strides, gradient)  # None: zero, in a higher one


def is_samplewise_contiguous(x: Tensor) -> bool:
    """Whether the samples of x (N, C, *) lie one after the other, without gaps."""
    return x.is_contiguous() or (
        not torch.compiler.is_compiling() and x.permute(0, *_order_within(x)).is_contiguous()
    )


def samplewise_contiguous(x: Tensor) -> Tensor:
    """x (N, C, *), or a copy of it whose samples :func:`is_samplewise_contiguous`.

    The order of the dimensions within a sample stays, except in a compiled graph, whose strides may
    be symbols, which have no order. So what a kernel makes of a sample does not depend on how many
    others a rank has, as it would where strides depend on their number. It does depend on the order
    of the dimensions, which ranks must share.
    """
    if is_samplewise_contiguous(x):
        return x
    if torch.compiler.is_compiling():
        return x.contiguous()
    order = (0, *_order_within(x))
    back = sorted(range(x.dim()), key=order.__getitem__)
    return x.permute(order).contiguous().permute(back)


def _order_within(x: Tensor) -> list[int]:
    """The dimensions of a sample, from the outermost; those of size one last."""
    strides = x.stride()
    return sorted(range(1, x.dim()), key=lambda d: (x.shape[d] == 1, -strides[d]))


def check_samples(operator: str, *tensors: Tensor) -> None:
    """Refuse what the reproducible operators cannot promise anything for."""
    for x in tensors:
        if not is_samplewise_contiguous(x):
            raise ValueError(
                f"{operator}: expected samples that lie one after the other without gaps, got "
                f"strides {tuple(x.stride())} for shape {tuple(x.shape)}; lay them out with "
                "samplewise_contiguous(), so that no bit depends on how many there are"
            )
