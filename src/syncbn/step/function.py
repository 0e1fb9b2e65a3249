"""The autograd.Function that serves every case: measure → exchange → merge → normalise, mirrored.

It takes k local parts of a batch (k > 1: the replicas of a DataParallel) on each of W ranks.
Whatever a rank's parts are, forward makes one all_gather of 2C + 1 numbers (two sums of many ranks:
exchange.py) and backward one all_reduce of 2C numbers, of one dtype (float64 where the device has
it). So ranks stay in step with empty batches, other dtypes, or no gradient wanted on some of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..comm import MAY, NONE, SINGLE, WANTS
from ..kernels import Affine, Implementation, Running, Statistics
from ..tensors.storages import check_held, held_in_graph
from .checks import refuse_single_value
from .derivatives import differentiable_gradients, with_bits
from .exchange import Exchange, Gathered
from .mode import BackwardMode, find_backward_mode
from .records import Normalised, Part
from .speaker import Speaker, towards


def normalise_parts(
    parts: Sequence[Part], running: Running, eps: float, exchange: Exchange, compiling: bool
) -> tuple[Tensor, ...]:
    """y of each part, with the statistics of all parts of all ranks; the running ones move once."""
    kernels = [part.kernels for part in parts]
    tensors = [tensor for part in parts for tensor in (part.x, *part.affine, part.mask)]
    grad_enabled = torch.is_grad_enabled()
    wants_gradient = grad_enabled and any(t is not None and t.requires_grad for t in tensors)
    may = wants_gradient or (grad_enabled and not compiling)
    flags = (WANTS if wants_gradient else 0) | (MAY if may else 0)
    if not (
        compiling or _is_masked(parts)
    ):  # a graph would be made for that number of values alone
        own = sum(part.x.numel() // part.x.shape[1] for part in parts)
        flags |= NONE if own == 0 else SINGLE if own == 1 else 0
    # A rank none of whose tensors want a gradient still owes its peers a backward if one of them
    # does. An empty tensor that wants one gives it a graph; forward takes the graph away again
    # when the ranks turn out to agree that nobody needs it. A compiled graph is fixed before.
    grad_anchor = None
    alone = wants_gradient or exchange.comm.size == 1
    if grad_enabled and not alone and not compiling:
        grad_anchor = torch.empty(0, device=parts[0].x.device, requires_grad=True)
    result: tuple[Tensor, ...] = _SyncBatchNorm.apply(  # type: ignore[no-untyped-call]
        *(exchange, kernels, eps, flags, compiling, grad_anchor, *running, *tensors)
    )
    return result


_FIRST = 10  # of the parts' tensors among the Function's arguments
_EACH = 4  # of a part: x, weight, bias, mask


class _SyncBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        exchange: Exchange,
        kernels: Sequence[Implementation],
        eps: float,
        flags: int,
        compiling: bool,
        grad_anchor: Tensor | None,
        *rest: Any,
    ) -> tuple[Tensor, ...]:
        running = Running(*rest[:4])
        each = zip(kernels, _groups(rest[4:], _EACH), strict=True)
        parts = [Part(k, x, Affine(*affine), mask) for k, (x, *affine, mask) in each]
        gathered = exchange.gather(parts, flags, running, compiling)
        wants_gradient = bool(flags & WANTS)
        _check_count(parts, gathered, exchange, flags, compiling)
        ys, statistics = [], []
        for k, x, affine, _ in parts:
            sets = gathered.sets if len(parts) == 1 else gathered.sets.to(x.device)
            y, found = k.steps.normalise(x, sets, affine=affine, running=running, eps=eps)
            ys.append(y)
            statistics.append(found)
            running = Running()  # moved by the first
        if wants_gradient or (grad_anchor is not None and gathered.is_gradient_wanted()):
            saved = zip(parts, statistics, strict=True)
            ctx.save_for_backward(*(t for p, s in saved for t in (p.x, p.affine.weight, *s)))
            ctx.masks = [part.mask for part in parts]  # copies
            ctx.biases = [part.affine.bias for part in parts]  # for their dtypes
            ctx.eps, ctx.exchange, ctx.kernels = eps, exchange, kernels
        else:
            ctx.mark_non_differentiable(*ys)
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        try:
            return _backward(ctx, dys)
        except Exception as error:
            comm = ctx.exchange.comm
            if isinstance(comm, Speaker):
                comm.give_up(error)
            raise


def _backward(ctx: Any, dys: Sequence[Tensor]) -> tuple[Tensor | None, ...]:
    exchange, saved = ctx.exchange, ctx.saved_tensors
    each = zip(ctx.kernels, _groups(saved, 5), strict=True)
    parts = [Normalised(k, x, weight, Statistics(*found)) for k, (x, weight, *found) in each]
    mode = find_backward_mode(dys)
    if mode.compiling:
        parts = [_held_in_graph(parts[0], dys[0])]
    else:  # before any message
        for part, dy in zip(parts, dys, strict=True):
            check_held({"the output's gradient": dy, "input": part.x, "weight": part.weight})
            check_held(part.statistics._asdict())
    wanted = _groups(ctx.needs_input_grad[_FIRST:], _EACH)
    if mode.differentiable:
        xs, weights = [part.x for part in parts], [part.weight for part in parts]
        comm = towards("differentiable backward", exchange.comm, mode.compiling)
        found = differentiable_gradients(dys, xs, weights, ctx.masks, ctx.eps, comm)
        if exchange.reproducible and not mode.transforming:
            with torch.no_grad():
                bits = _gradients(parts, dys, exchange, wanted, mode)
            pairs = zip(found, bits, strict=True)
            found = [(with_bits(dx, value), sums) for (dx, sums), (value, _) in pairs]
    else:
        found = _gradients(parts, dys, exchange, wanted, mode)
    gradients: list[Tensor | None] = []
    for part, bias, wants, (dx, sums) in zip(parts, ctx.biases, wanted, found, strict=True):
        _, wants_weight, wants_bias, _ = wants
        affine = Affine(part.weight if wants_weight else None, bias if wants_bias else None)
        gradients += dx, *parameter_gradients(sums, affine), None
    return *(None,) * _FIRST, *gradients


def _held_in_graph(part: Normalised, dy: Tensor) -> Normalised:
    """The part, of whose tensors nothing is read in a graph before all are seen to be held."""
    k, x, weight, (mean, invstd, count) = part
    read = {"the output's gradient": dy, "input": x, "weight": weight, "count": count}
    mean, invstd = held_in_graph({"mean": mean, "invstd": invstd}, read)
    return Normalised(k, x, weight, Statistics(mean, invstd, count))


def _groups(items: Sequence[Any], size: int) -> list[Sequence[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def _gradients(
    parts: Sequence[Normalised],
    dys: Sequence[Tensor],
    exchange: Exchange,
    wanted: Sequence[Sequence[bool]],
    mode: BackwardMode,
) -> list[tuple[Tensor | None, Tensor]]:
    """dx like x, if wanted, and the part's own (Σdy, Σdy·x̂) per channel (2, C), of each part."""
    sums = exchange.reduce(parts, dys, mode.compiling)
    found = []
    each = zip(parts, dys, sums.parts, wanted, strict=True)
    for (k, x, weight, statistics), dy, own, (wants_x, *_) in each:
        dx = None
        if wants_x:
            total = sums.total if len(parts) == 1 else sums.total.to(x.device)
            dx = k.steps.input_gradient(dy, x, weight=weight, statistics=statistics, sums=total)
        found.append((dx, own))
    return found


def parameter_gradients(sums: Tensor, affine: Affine) -> tuple[Tensor | None, Tensor | None]:
    """(dweight, dbias), each of its parameter's dtype and in memory of its own; None for None.

    sums: (Σdy, Σdy·x̂) per channel (2, C) of a part's own samples.
    """
    dbias, dweight = (
        None if parameter is None else row.to(parameter.dtype, copy=True)
        for row, parameter in zip(sums, reversed(affine), strict=True)
    )
    return dweight, dbias


def _check_count(
    parts: Sequence[Part], gathered: Gathered, exchange: Exchange, flags: int, compiling: bool
) -> None:
    """Refuse a globally single value per channel, on every rank alike.

    Only a rank with at most one value of its own needs to look at the sum: if it is one, every rank
    is such a rank. On a device nobody looks, who would wait for it: a later call does (see
    comm/devices.py).
    """
    comm = exchange.comm
    own = sum(part.x.numel() // part.x.shape[1] for part in parts)
    if compiling:
        own = 0 if _is_masked(parts) else own
        wanting = None if flags & WANTS else gathered.flags
        _check_in_graph(own, gathered.sets, wanting if isinstance(wanting, Tensor) else None)
        return
    if _is_masked(parts):
        _assert_several(gathered.sets)
        return
    if own > 1 or (isinstance(comm, Speaker) and comm.tells_later(gathered.sets)):
        return
    if (own if comm.size == 1 else gathered.sets[:, 0].sum().item()) == 1:
        refuse_single_value([part.x.shape for part in parts], comm.rank, comm.size)


def _is_masked(parts: Sequence[Part]) -> bool:
    """Whether the device alone knows how many values count."""
    return any(part.mask is not None for part in parts)


def _assert_several(sets: Tensor) -> None:
    torch._assert_async(
        sets[:, 0].sum() != 1,
        "Expected more than 1 value per channel when training, got 1 on all ranks together; "
        "use a larger batch or call eval() on the layer",
    )


def _check_in_graph(own: int, sets: Tensor, wanting: Tensor | None) -> None:
    """The same in a compiled graph, which cannot branch on what it receives.

    wanting: which ranks want a gradient, given where this one has nothing that does.
    """
    from torch.fx.experimental.symbolic_shapes import guard_or_true  # imports sympy

    if guard_or_true(own <= 1):
        _assert_several(sets)
    if wanting is not None:
        torch._assert_async(
            ~wanting.any(),
            "sync_batch_norm: expected a compiled layer to want a gradient on all ranks or none, "
            "got none on this rank and one on another; let its input or parameters require grad "
            "on every rank alike, or don't compile it",
        )
