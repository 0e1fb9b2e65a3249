"""The one autograd.Function: measure → share → merge → normalise, and its mirror.

Whatever this rank's input is, forward makes one all_gather of 2C + 2 numbers and backward one
all_reduce of 2C numbers, of one dtype (float64 where the device has it). So ranks stay in step with
empty batches, other dtypes, or no gradient wanted on some of them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..comm import Communicator
from ..tensors.storages import check_held
from ..tensors.transforms import batched_or_transforming
from .checks import refuse_single_value
from .differentiable import differentiable_gradients, with_value
from .share import Share, parameter_gradients


def synchronised(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | None,
    eps: float,
    share: Share,
) -> Tensor:
    """Batch normalisation of ``input`` (N, C, *) with the statistics of all ranks."""
    tensors = (input, weight, bias)
    grad_enabled = torch.is_grad_enabled()
    wants_gradient = grad_enabled and any(t is not None and t.requires_grad for t in tensors)
    # A rank none of whose tensors want a gradient still owes its peers a backward if one of them
    # does. An empty tensor that wants one gives it a graph; forward takes the graph away again
    # when the ranks turn out to agree that nobody needs it. A compiled graph is fixed before.
    anchor = None
    if grad_enabled and not wants_gradient and not torch.compiler.is_compiling():
        anchor = torch.empty(0, device=input.device, requires_grad=True)
    result: Tensor = _SyncBatchNorm.apply(  # type: ignore[no-untyped-call]
        *(input, weight, bias, anchor, wants_gradient),
        *(running_mean, running_var, num_batches_tracked, momentum, eps, share),
    )
    return result


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        anchor: Tensor | None,
        wants_gradient: bool,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        momentum: float | None,
        eps: float,
        share: Share,
    ) -> Tensor:
        # A header of one number before the moments: does this rank want a gradient?
        sent = pad(share.moments(x), (1, 0), value=float(wants_gradient))
        received = share.comm.all_gather(sent)
        sets = share.merge_moments(received[:, 1:])
        if torch.compiler.is_compiling():
            alone = torch.is_grad_enabled() and not wants_gradient
            _check_in_graph(x, sets, received[:, 0] if alone else None)
        else:
            _check_count(x, sets, share.comm)
        y, mean, invstd, count = share.kernels.normalise(
            *(x, sets, weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps)
        )
        if wants_gradient or (anchor is not None and bool(received[:, 0].any())):
            ctx.save_for_backward(x, weight, mean, invstd, count)
            ctx.bias = bias  # for its dtype
            ctx.eps, ctx.share = eps, share
        else:
            ctx.mark_non_differentiable(y)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *statistics = ctx.saved_tensors
        share: Share = ctx.share
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        compiling = torch.compiler.is_compiling()
        if not compiling:  # before any message
            mean, invstd, count = statistics
            check_held({"the output's gradient": dy, "input": x, "weight": weight})
            check_held({"mean": mean, "invstd": invstd, "count": count})
        dx: Tensor | None
        transforming = not compiling and batched_or_transforming(dy)
        if transforming or (torch.is_grad_enabled() and not compiling):  # create_graph
            dx, local = differentiable_gradients(dy, x, weight, ctx.eps, share.comm)
            if share.reproducible and not transforming:
                with torch.no_grad():
                    value, _ = _gradients(share, wants_x, dy, x, weight, *statistics)
                dx = None if value is None else with_value(dx, value)
        else:
            dx, local = _gradients(share, wants_x, dy, x, weight, *statistics)
        wanted = (weight if wants_weight else None, ctx.bias if wants_bias else None)
        return dx, *parameter_gradients(local, *wanted), *(None,) * 8


def _gradients(
    share: Share,
    wants_x: bool,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    mean: Tensor,
    invstd: Tensor,
    count: Tensor,
) -> tuple[Tensor | None, Tensor]:
    """dx like x, if wanted, and this rank's (Σdy, Σdy·x̂) per channel (2, C)."""
    local, total = share.gradient_sums(dy, x, mean, invstd)
    if not wants_x:
        return None, local
    return share.kernels.input_gradient(dy, x, weight, mean, invstd, total, count), local


def _check_count(x: Tensor, sets: Tensor, comm: Communicator) -> None:
    """Refuse a globally single value per channel, on every rank alike.

    Only a rank with at most one value of its own needs to look at the sum, which on an
    accelerator waits for the device; if the sum is one, every rank is such a rank.
    """
    if x.numel() // x.shape[1] <= 1 and sets[:, 0].sum().item() == 1:
        refuse_single_value(x.shape, comm.rank, comm.size)


def _check_in_graph(x: Tensor, sets: Tensor, wanting: Tensor | None) -> None:
    """The same in a compiled graph, which cannot branch on what it receives.

    wanting: which ranks want a gradient, given where this one has nothing that does.
    """
    from torch.fx.experimental.symbolic_shapes import guard_or_true  # imports sympy

    if guard_or_true(x.numel() // x.shape[1] <= 1):
        torch._assert_async(
            sets[:, 0].sum() != 1,
            "Expected more than 1 value per channel when training, got 1 on all ranks together; "
            "use a larger batch or call eval() on the layer",
        )
    if wanting is not None:
        torch._assert_async(
            ~wanting.any(),
            "sync_batch_norm: expected a compiled layer to want a gradient on all ranks or none, "
            "got none on this rank and one on another; let its input or parameters require grad "
            "on every rank alike, or don't compile it",
        )
