"""Collectives as functions that can be differentiated, in both modes, and mapped over a batch.

The derivative of a collective is a collective. Elements of a batch travel together: one message.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..comm import Communicator, are_many
from ..numerics.moments import Moments, merge, merge_by_sums, unpack

_is_batched = torch._C._functorch.is_legacy_batchedtensor
_LEVELS = 64  # of vmap inside each other, at most


def gather(tensor: Tensor, comm: Communicator) -> Tensor:
    """``comm.all_gather(tensor)``."""
    return _of_all_elements(_AllGather, tensor, comm)


def reduce(tensor: Tensor, comm: Communicator) -> Tensor:
    """``comm.all_reduce(tensor)``."""
    return _of_all_elements(_AllReduce, tensor, comm)


def merged(own: Tensor, comm: Communicator) -> Moments:
    """Moments of all ranks, each of which has its own, packed (1 + 2C,)."""
    if are_many(comm.size):
        return merge_by_sums(unpack(own), partial(reduce, comm=comm))
    return merge(unpack(gather(own, comm)))


def _of_all_elements(collective: Any, tensor: Tensor, comm: Communicator) -> Tensor:
    """What the collective makes of ``tensor`` and of the batch that hides in it.

    The batch of ``is_grads_batched`` does, and an autograd.Function would lose what is to be
    differentiated there. It has no name but its level, of which a tensor that has none gets as many
    elements as it is told, here none.
    """
    if not _is_batched(tensor):
        result: Tensor = collective.apply(tensor, comm)
        return result
    levels: list[int] = []
    for level in range(_LEVELS, 0, -1):
        whole = torch._remove_batch_dim(tensor, level, 0, 0)
        if len(whole):
            tensor, levels = whole, [level, *levels]
    result = collective.apply(tensor, _Batches(comm))
    if collective is _AllGather:  # the batch must be outermost, in memory too
        result = result.movedim(0, len(levels)).contiguous()
    for level in levels:  # from the lowest, as they must lie
        result = torch._add_batch_dim(result, 0, level)
    return result


class _AllGather(torch.autograd.Function):
    """Each rank's tensor reaches every rank: its derivative is the sum of what they all return."""

    @staticmethod
    def forward(tensor: Tensor, comm: Communicator) -> Tensor:
        return comm.all_gather(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.comm = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return reduce(gradient, ctx.comm)[ctx.comm.rank], None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return gather(tangent, ctx.comm)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], tensor: Tensor, comm: Communicator
    ) -> tuple[Tensor, int]:
        return gather(tensor.movedim(in_dims[0], 0), _Batches(comm)), 1


class _AllReduce(torch.autograd.Function):
    @staticmethod
    def forward(tensor: Tensor, comm: Communicator) -> Tensor:
        return comm.all_reduce(tensor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.comm = inputs[1]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return reduce(gradient, ctx.comm), None

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor, _: None) -> Tensor:
        return reduce(tangent, ctx.comm)

    @staticmethod
    def vmap(
        info: Any, in_dims: tuple[Any, ...], tensor: Tensor, comm: Communicator
    ) -> tuple[Tensor, int]:
        return reduce(tensor.movedim(in_dims[0], 0), _Batches(comm)), 0


class _Batches(Communicator):
    """A communicator for batches, whose sizes are compared first: messages must have one size."""

    def __init__(self, comm: Communicator) -> None:
        self._comm: Communicator = comm._comm if isinstance(comm, _Batches) else comm

    @property
    def rank(self) -> int:
        return self._comm.rank

    @property
    def size(self) -> int:
        return self._comm.size

    def all_gather(self, tensor: Tensor) -> Tensor:
        self._compare(tensor)
        return self._comm.all_gather(tensor)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        self._compare(tensor)
        return self._comm.all_reduce(tensor)

    def _compare(self, tensor: Tensor) -> None:
        if self.size == 1:
            return
        sizes = self._comm.all_gather(tensor.new_full((1,), len(tensor))).flatten().tolist()
        if len(set(sizes)) > 1:
            listed = ", ".join(f"{size:.0f} on rank {rank}" for rank, size in enumerate(sizes))
            raise RuntimeError(
                "sync_batch_norm: expected vmap and batched gradients over as many elements on "
                f"every rank, got {listed}; element i of one rank belongs together with element i "
                "of the others (so do the rows of jacrev, jacfwd and hessian, of which outputs of "
                "unequal shapes have unequally many): give every rank as many, or differentiate "
                "with autograd"
            )
