"""Batch normalisation of several replicas in one process: one node of the graph that they share.

The steps of autograd.py, with all replicas' tensors at hand: nothing is sent, nothing waits.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..comm import Replica
from ..kernels import Kernels, composite, serving
from ..numerics.moments import inverse_deviation, merge, unpack
from ..tensors.storages import check_held
from ..tensors.transforms import transforming
from .share import parameter_gradients


def together(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | None,
    eps: float,
    comm: Replica,
) -> Tensor:
    """Batch normalisation of ``input`` (N, C, *) with the statistics of all replicas.

    Only the first replica's running statistics move.
    """
    tensors: tuple[Tensor | None, ...] = (input, weight, bias)
    wants_graph = torch.is_grad_enabled()
    if not wants_graph:  # of this replica; the others may
        tensors = tuple(None if t is None else t.detach() for t in tensors)
    rest = (running_mean, running_var, num_batches_tracked, momentum, eps)
    y: Tensor = comm.meet((tensors, rest), _all)
    return y if wants_graph else y.detach()


def _all(shares: list[tuple[Any, Any]]) -> Sequence[Tensor]:
    inputs = [tensors[0] for tensors, _ in shares]
    if sum(x.numel() // x.shape[1] for x in inputs) == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, got 1 on all "
            f"{len(inputs)} replicas together, of input sizes {[tuple(x.shape) for x in inputs]}; "
            "use a larger batch or call eval() on the layer"
        )
    rest = shares[0][1]
    with torch.enable_grad():  # each replica has said whether it wants a graph
        ys: Sequence[Tensor] = _Joint.apply(rest, *(t for tensors, _ in shares for t in tensors))  # type: ignore[no-untyped-call]
    return ys


class _Joint(torch.autograd.Function):
    """(x, weight, bias) of each replica, one after the other → y of each."""

    @staticmethod
    def forward(ctx: Any, rest: tuple[Any, ...], *tensors: Any) -> tuple[Tensor, ...]:
        xs, weights, biases = tensors[0::3], tensors[1::3], tensors[2::3]
        kernels = [serving(x) for x in xs]
        sets = [k.measure(x) for k, x in zip(kernels, xs, strict=True)]
        options = rest[-2:]
        statistics: list[Tensor] = []
        ys = []
        for k, x, weight, bias in zip(kernels, xs, weights, biases, strict=True):
            y, *found = k.normalise(x, _stacked(sets, x), weight, bias, *rest)
            rest = (None, None, None, *options)
            ys.append(y)
            statistics += found
        ctx.save_for_backward(*xs, *weights, *statistics)
        ctx.eps = options[1]
        ctx.biases = biases  # for their dtypes
        return tuple(ys)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor) -> tuple[Tensor | None, ...]:
        size = len(dys)
        saved = ctx.saved_tensors
        xs, weights, statistics = saved[:size], saved[size : 2 * size], saved[2 * size :]
        for dy, x, weight in zip(dys, xs, weights, strict=True):
            check_held({"the output's gradient": dy, "input": x, "weight": weight})
        for statistic in statistics:
            check_held({"statistics": statistic})
        kernels = [serving(x) for x in xs]
        triples = [statistics[3 * i : 3 * i + 3] for i in range(size)]
        if torch.is_grad_enabled() or transforming():  # create_graph, or vmap, or dys have tangents
            kernels = [composite] * size
            triples = _differentiable_statistics(xs, ctx.eps)
        gradients: list[Tensor | None] = []
        every = list(zip(kernels, dys, xs, weights, triples, strict=True))
        sums = [k.gradient_sums(dy, x, mean, invstd) for k, dy, x, _, (mean, invstd, _) in every]
        for i, share in enumerate(every):
            wants_x, wants_weight, wants_bias = ctx.needs_input_grad[1 + 3 * i : 4 + 3 * i]
            wanted = (weights[i] if wants_weight else None, ctx.biases[i] if wants_bias else None)
            gradients += (
                _input_gradient(*share, _stacked(sums, xs[i]).sum(0)) if wants_x else None,
                *parameter_gradients(sums[i], *wanted),
            )
        return None, *gradients


def _input_gradient(
    kernels: Kernels,
    dy: Tensor,
    x: Tensor,
    weight: Tensor | None,
    statistics: tuple[Tensor, Tensor, Tensor],
    total: Tensor,
) -> Tensor:
    mean, invstd, count = statistics
    return kernels.input_gradient(dy, x, weight, mean, invstd, total, count)


def _differentiable_statistics(
    xs: Sequence[Tensor], eps: float
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(mean, invstd, count) of all replicas together, on the device of each."""
    sets = [composite.measure(x) for x in xs]
    found = []
    for x in xs:
        merged = merge(unpack(_stacked(sets, x)))
        found.append((merged.mean, inverse_deviation(merged, eps), merged.count))
    return found


def _stacked(tensors: Sequence[Tensor], like: Tensor) -> Tensor:
    return torch.stack([tensor.to(like.device) for tensor in tensors])
