"""Gradients as functions that autograd can differentiate again, over ranks.

For ``create_graph=True``, and where a transform is around backward. The statistics are computed
once more, in operations with derivatives: the composite kernels, and collectives whose derivatives
are collectives. A rank whose loss depends on another rank's input thereby sends that rank its
derivative, to any order.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..comm import Communicator
from ..kernels import Statistics, composite
from ..numerics.moments import inverse_deviation, merge, stacked, unpack
from .collectives import merged, reduce


def differentiable_gradients(
    dys: Sequence[Tensor],
    xs: Sequence[Tensor],
    weights: Sequence[Tensor | None],
    masks: Sequence[Tensor | None],
    eps: float,
    comm: Communicator,
) -> list[tuple[Tensor | None, Tensor]]:
    """dx like x, and the part's own (Σdy, Σdy·x̂) per channel (2, C), of each part.

    dys, xs: (N, C, *); weights: (C,) or None; masks: (N, *) or None, see records.py.
    """
    zero = graph_dependency(*xs, *dys, *weights)
    packed = [composite.measure(x, mask) for x, mask in zip(xs, masks, strict=True)]
    own = packed[0] if len(packed) == 1 else merge(unpack(stacked(packed))).pack()
    found = merged(own + zero, comm)
    invstd = inverse_deviation(found, eps)
    statistics = [
        Statistics(*(t.to(x.device) for t in (found.mean, invstd, found.count))) for x in xs
    ]
    sums = [
        composite.gradient_sums(dy, x, found)
        for dy, x, found in zip(dys, xs, statistics, strict=True)
    ]
    total = reduce(stacked(sums).sum(0) + zero, comm)
    dxs = [
        composite.input_gradient(dy, x, weight=weight, statistics=found, sums=total.to(x.device))
        for dy, x, weight, found in zip(dys, xs, weights, statistics, strict=True)
    ]
    return [(dx, own + graph_dependency(own, total)) for dx, own in zip(dxs, sums, strict=True)]


def graph_dependency(*tensors: Tensor | None) -> Tensor | float:
    """Zero, as a function of tensors, on the device of the first.

    A rank without values, or whose x wants no gradient, would leave collectives out of its graph.
    """
    zeros = [tensor[:0].sum() for tensor in tensors if tensor is not None]
    return sum(zero.to(zeros[0].device) for zero in zeros)


def with_bits(tensor: Tensor | None, value: Tensor | None) -> Tensor | None:
    """``value``, if any, with the derivatives of ``tensor``, which equals it but for rounding."""
    result: Tensor | None = None
    if value is not None:
        result = _Value.apply(tensor, value)  # type: ignore[no-untyped-call]
    return result


class _Value(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, value: Tensor) -> Tensor:
        return value.clone()  # a view could not be changed in place

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
