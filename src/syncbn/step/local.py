"""Batch normalisation by one process alone, with the compiled operators: nothing to share, so that
measure and normalise go together over what the cache holds, and the two backward steps likewise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..comm import LOCAL
from ..kernels import native, native_serves
from ..tensors.storages import check_held
from ..tensors.transforms import transforming
from .differentiable import differentiable_gradients
from .share import parameter_gradients


def serves(
    x: Tensor, running_mean: Tensor | None, running_var: Tensor | None, *others: Tensor | None
) -> bool:
    """Whether :func:`batch_norm` takes x, with statistics, their counter and parameters.

    One running statistic without the other and a single value per channel are left to those who
    have an error for them.
    """
    if (running_mean is None) != (running_var is None):
        return False
    try:
        for other in (running_mean, running_var, *others):  # a loop takes half the time of all()
            if other is not None and not other.is_cpu:
                return False
    except AttributeError:  # no tensor
        return False
    return native_serves(x) and x.dim() > 1 and x.numel() > x.shape[1]


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
) -> Tensor:
    """y of x's own statistics. x: served by the native kernels, two values per channel or more."""
    rest = (running_mean, running_var, num_batches_tracked, momentum, eps)
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        result: Tensor = _apply(x, weight, bias, rest)  # type: ignore[no-untyped-call]
        return result
    return native.batch_norm(x, weight, bias, *rest)[0]


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, rest: tuple[Any, ...]
    ) -> Tensor:
        y, statistics = native.batch_norm(x, weight, bias, *rest)
        ctx.save_for_backward(x, weight)
        ctx.bias = bias  # for its dtype
        ctx.statistics = statistics  # made here, of nobody else's: need not be guarded by autograd
        ctx.eps = rest[-1]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        dx = None
        if torch.is_grad_enabled() or transforming():  # create_graph, or vmap, or dy has a tangent
            check_held({"the output's gradient": dy, "input": x, "weight": weight})
            dx, sums = differentiable_gradients(dy, x, weight, ctx.eps, LOCAL)
        elif wants_x:
            dx, dweight, dbias = native.batch_norm_backward(dy, x, weight, ctx.bias, ctx.statistics)
            return dx, dweight if wants_weight else None, dbias if wants_bias else None, None
        else:
            sums = native.gradient_sums(dy, x, *ctx.statistics.unbind())
        wanted = (weight if wants_weight else None, ctx.bias if wants_bias else None)
        return dx, *parameter_gradients(sums, *wanted), None


# Function.apply looks first for torch.func, which does not come here: half a microsecond.
_apply = super(torch.autograd.Function, _BatchNorm).apply
