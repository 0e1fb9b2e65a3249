"""One process alone, with kernels that do all steps in one: there is nothing to exchange, so that
measure and normalise go together over what the cache holds, and the two backward steps likewise.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..comm import LOCAL
from ..kernels import Affine, Fused, Running, Statistics, select_kernels
from ..tensors.storages import check_held
from .derivatives import differentiable_gradients
from .function import parameter_gradients
from .mode import is_differentiable


def find_fused(x: Tensor, affine: Affine, running: Running) -> Fused | None:
    """The kernels for :func:`normalise_fused`, with these statistics, counter and parameters.

    One running statistic without the other and a single value per channel are left to those who
    have an error for them.
    """
    if (running.mean is None) != (running.var is None):
        return None
    fused = select_kernels(x).fused
    if fused is None or x.dim() < 2 or x.numel() <= x.shape[1]:
        return None
    try:
        return fused if fused.supports_others(affine, running) else None
    except AttributeError:  # one of them is no tensor
        return None


def normalise_fused(
    x: Tensor, affine: Affine, running: Running, eps: float, fused: Fused
) -> Tensor:
    """y of x's own statistics. x: two values per channel or more."""
    weight, bias = affine
    if torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    ):
        result: Tensor = _apply(x, weight, bias, (affine, running, eps, fused))  # type: ignore[no-untyped-call]
        return result
    return fused.batch_norm(x, affine=affine, running=running, eps=eps)[0]


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        rest: tuple[Affine, Running, float, Fused],
    ) -> Tensor:
        affine, running, ctx.eps, ctx.fused = rest
        y, saved = ctx.fused.batch_norm(x, affine=affine, running=running, eps=ctx.eps)
        ctx.save_for_backward(x, weight)
        ctx.bias = bias  # for its dtype
        ctx.saved = saved  # made here, of nobody else's: need not be guarded by autograd
        result: Tensor = y
        return result

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        wants_x, wants_weight, wants_bias, _ = ctx.needs_input_grad
        dx = None
        if is_differentiable(dy):
            check_held({"the output's gradient": dy, "input": x, "weight": weight})
            ((dx, sums),) = differentiable_gradients((dy,), (x,), (weight,), ctx.eps, LOCAL)
        elif wants_x:
            affine = Affine(weight, ctx.bias)
            dx, dweight, dbias = ctx.fused.batch_norm_backward(
                dy, x, affine=affine, saved=ctx.saved
            )
            return dx, dweight if wants_weight else None, dbias if wants_bias else None, None
        else:
            mean, invstd = ctx.saved
            statistics = Statistics(mean, invstd, count=mean)  # which the sums don't take
            sums = select_kernels(x).steps.gradient_sums(dy, x, statistics)
        wanted = Affine(weight if wants_weight else None, ctx.bias if wants_bias else None)
        return dx, *parameter_gradients(sums, wanted), None


# Function.apply looks first for torch.func, which does not come here: half a microsecond.
_apply = super(torch.autograd.Function, _BatchNorm).apply
