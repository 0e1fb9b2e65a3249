"""Gradients as functions that autograd can differentiate again, over ranks.

For ``create_graph=True``, and where a transform is around backward. The statistics are computed
once more, in operations with derivatives: the composite kernels, and collectives whose derivatives
are collectives. A rank whose loss depends on another rank's input thereby sends that rank its
derivative, to any order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..comm import Communicator
from ..kernels import composite
from ..numerics.moments import inverse_deviation, merge, unpack
from .collectives import gather, reduce


def differentiable_gradients(
    dy: Tensor, x: Tensor, weight: Tensor | None, eps: float, comm: Communicator
) -> tuple[Tensor, Tensor]:
    """dx like x, and this rank's (Σdy, Σdy·x̂) per channel (2, C), of batch normalisation.

    dy, x: (N, C, *); weight: (C,) or None.
    """
    zero = tie(x, dy, weight)
    merged = merge(unpack(gather(composite.measure(x) + zero, comm)))
    count, mean, _ = merged
    invstd = inverse_deviation(merged, eps)
    sums = composite.gradient_sums(dy, x, mean, invstd) + zero
    total = reduce(sums, comm)
    dx = composite.input_gradient(dy, x, weight, mean, invstd, total, count)
    return dx, sums + tie(total)


def tie(*tensors: Tensor | None) -> Tensor | float:
    """Zero, as a function of tensors.

    A rank without values, or whose x wants no gradient, would leave collectives out of its graph.
    """
    return sum(tensor[:0].sum() for tensor in tensors if tensor is not None)


def with_value(tensor: Tensor, value: Tensor) -> Tensor:
    """``value``, with the derivatives of ``tensor``, which equals it but for rounding."""
    result: Tensor = _Value.apply(tensor, value)  # type: ignore[no-untyped-call]
    return result


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, value: Tensor) -> Tensor:
        return value.clone()  # a view could not be changed in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
