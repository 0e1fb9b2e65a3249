"""The usual step in as few calls as it takes: one tensor of two values per channel or more.

One process alone has nothing to exchange, so that measure and normalise go together over what the
cache holds, and the two backward steps likewise. Over ranks function.py's steps, without what they
need for several parts, for graphs, and for parts without values: the messages are the same.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..comm import LOCAL, MAY, WANTS, Replica, are_many, refuse_join
from ..kernels import Affine, Fused, Implementation, Running, Statistics, select_kernels
from ..tensors.prefix import NO_PREFIX
from ..tensors.storages import check_held
from .derivatives import differentiable_gradients
from .exchange import Gathered, tell_moments
from .function import parameter_gradients
from .mode import is_differentiable
from .records import Call
from .speaker import Speaker, speaking


def find_fused(call: Call) -> Implementation | None:
    """The kernels for :func:`normalise_fused`, if there are any and a call in training is usual.

    One running statistic without the other and a single value per channel are left to those who
    have an error for them.
    """
    x, affine, running, options, mode, comm, _, mask, _ = call
    if options.reproducible or mode.compiling or mask is not None:
        return None
    if call.accumulator is not None and comm.size > 1:  # which hears from exchange.py
        return None
    if (running.mean is None) != (running.var is None):
        return None
    kernels = select_kernels(x)
    fused = kernels.fused
    if fused is None or x.dim() < 2 or x.numel() <= x.shape[1]:
        return None
    if comm is not LOCAL and isinstance(comm, Replica):
        return None
    try:
        return kernels if fused.supports_others(affine, running) else None
    except AttributeError:  # one of them is no tensor
        return None


def normalise_fused(call: Call, kernels: Implementation) -> Tensor:
    """y of the call's input. RuntimeError, too: a tensor that the operators refuse."""
    x, (weight, bias), running, options, _, comm, *_ = call
    wants_gradient = torch.is_grad_enabled() and (
        x.requires_grad
        or (weight is not None and weight.requires_grad)
        or (bias is not None and bias.requires_grad)
    )
    fused = kernels.fused
    assert fused is not None
    if comm.size > 1:
        refuse_join()
        speaker = speaking(comm, options.layer, x.shape[1], compiling=False)
        flags, grad_anchor = WANTS | MAY if wants_gradient else 0, None
        if torch.is_grad_enabled() and not wants_gradient:  # see function.py
            flags, grad_anchor = MAY, torch.empty(0, device=x.device, requires_grad=True)
        sent = running, options.eps, kernels, speaker, flags
        return _apply_over_ranks(x, weight, bias, grad_anchor, sent)  # type: ignore[no-any-return, no-untyped-call]
    if wants_gradient:
        rest = call.affine, running, options.eps, fused
        return _apply(x, weight, bias, rest)  # type: ignore[no-any-return, no-untyped-call]
    return fused.batch_norm(x, affine=call.affine, running=running, eps=options.eps)[0]


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
            ((dx, sums),) = differentiable_gradients(
                (dy,), (x,), (weight,), (None,), ctx.eps, LOCAL
            )
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


class _OverRanks(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        grad_anchor: Tensor | None,
        rest: tuple[Running, float, Implementation, Speaker, int],
    ) -> Tensor:
        (running, eps, kernels, speaker, flags), affine = rest, Affine(weight, bias)
        assert kernels.fused is not None
        begun = None
        if not are_many(speaker.size):
            begun = speaker.begin("all_gather", x, (1 + 2 * x.shape[1],), flags)
        prefix = NO_PREFIX if begun is None else begun.prefix
        own = kernels.fused.measure_checked(x, affine=affine, running=running, prefix=prefix)
        sets, said = tell_moments(speaker, own, flags, begun)
        y, statistics = kernels.steps.normalise(x, sets, affine=affine, running=running, eps=eps)
        if flags & WANTS or (grad_anchor is not None and Gathered(sets, said).is_gradient_wanted()):
            ctx.save_for_backward(x, weight)
            ctx.bias, ctx.statistics = bias, statistics
            ctx.eps, ctx.kernels, ctx.speaker = eps, kernels, speaker
        else:
            ctx.mark_non_differentiable(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        try:
            return _backward_over_ranks(ctx, dy)
        except Exception as error:
            ctx.speaker.give_up(error)
            raise


def _backward_over_ranks(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
    x, weight = ctx.saved_tensors
    wants_x, wants_weight, wants_bias, *_ = ctx.needs_input_grad
    affine, statistics = Affine(weight, ctx.bias), ctx.statistics
    check_held({"weight": weight})  # before any message; gradient_sums sees to the others
    if is_differentiable(dy):
        check_held({"the output's gradient": dy, "input": x})
        comm = ctx.speaker.towards("differentiable backward", compiling=False)
        given = (dy,), (x,), (weight,), (None,)
        ((dx, sums),) = differentiable_gradients(*given, ctx.eps, comm)
    else:
        steps, fused = ctx.kernels.steps, ctx.kernels.fused
        speaker, dx = ctx.speaker.towards("backward", compiling=False), None
        begun = speaker.begin("all_reduce", x, (2, x.shape[1]), MAY)
        sums, dweight, dbias = fused.gradient_sums_checked(
            dy,
            x,
            affine=affine,
            statistics=statistics,
            prefix=NO_PREFIX if begun is None else begun.prefix,
        )
        total = speaker.all_reduce(sums, begun)
        if wants_x:
            dx = steps.input_gradient(dy, x, weight=weight, statistics=statistics, sums=total)
        return dx, dweight if wants_weight else None, dbias if wants_bias else None, None, None
    wanted = Affine(weight if wants_weight else None, ctx.bias if wants_bias else None)
    return dx, *parameter_gradients(sums, wanted), None, None


# Function.apply looks first for torch.func, which does not come here: half a microsecond.
_apply = super(torch.autograd.Function, _BatchNorm).apply
_apply_over_ranks = super(torch.autograd.Function, _OverRanks).apply
