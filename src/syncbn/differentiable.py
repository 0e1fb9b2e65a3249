"""Gradients as functions that autograd can differentiate again, over ranks.

For ``create_graph=True``. The statistics are computed once more, in operations with derivatives:
the composite kernels, and collectives whose backward are collectives. A rank whose loss depends on
another rank's input thereby sends that rank its derivative, to any order.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .comm import Communicator
from .kernels import composite
from .moments import merge, unpack


def differentiable_gradients(
    dy: Tensor, x: Tensor, weight: Tensor | None, eps: float, comm: Communicator
) -> tuple[Tensor, Tensor]:
    """dx like x, and this rank's (Σdy, Σdy·x̂) per channel (2, C), of batch normalisation.

    dy, x: (N, C, *); weight: (C,) or None.
    """
    packed = composite.measure(x)
    # A rank without values, or whose x wants no gradient, would leave collectives out of its graph.
    tie = packed.new_zeros(())
    for tensor in (x, dy, weight):
        if tensor is not None:
            tie = tie + tensor.flatten()[:0].sum()
    count, mean, m2 = merge(unpack(_gather(packed + tie, comm)))
    invstd = (m2 / count.clamp_min(1) + eps).rsqrt()
    sums = composite.gradient_sums(dy, x, mean, invstd) + tie
    total = _reduce(sums, comm)
    dx = composite.input_gradient(dy, x, weight, mean, invstd, total, count)
    return dx, sums + total.flatten()[:0].sum()


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


class _AllGather(torch.autograd.Function):
    """Each rank's tensor reaches every rank: its derivative is the sum of what they all return."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, comm: Communicator) -> Tensor:
        ctx.comm = comm
        return comm.all_gather(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _reduce(gradient, ctx.comm)[ctx.comm.rank], None


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, comm: Communicator) -> Tensor:
        ctx.comm = comm
        return comm.all_reduce(tensor)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _reduce(gradient, ctx.comm), None


def _gather(tensor: Tensor, comm: Communicator) -> Tensor:
    gathered: Tensor = _AllGather.apply(tensor, comm)  # type: ignore[no-untyped-call]
    return gathered


def _reduce(tensor: Tensor, comm: Communicator) -> Tensor:
    total: Tensor = _AllReduce.apply(tensor, comm)  # type: ignore[no-untyped-call]
    return total
