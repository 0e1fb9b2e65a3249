"""Exchanges in compiled graphs: operators that are opaque there, and frames when they run.

A graph knows a communicator by its name, and the layer that calls by a tensor that the layer keeps,
which is an input of the graph: so one graph serves all layers of a kind. Ranks, some of which run a
graph and some the same layers without, exchange the same messages.
"""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..tensors.inductor import lower
from ..tensors.operators import define
from .framed import Framed
from .frames import Received
from .headers import MAY, NOBODY, Caller

_numbers = itertools.count(1)
_known: dict[str, Callable[[], Framed | None]] = {}
_callers: list[Callable[[int, Framed], Caller]] = []


def take_name(comm: Framed) -> None:
    """Let graphs know a communicator, as long as it lives."""
    comm.name_in_graphs = f"{type(comm).__name__}#{next(_numbers)}"
    know(comm.name_in_graphs, weakref.ref(comm))
    weakref.finalize(comm, _known.pop, comm.name_in_graphs, None).atexit = False


def know(name: str, find: Callable[[], Framed | None]) -> None:
    """Let graphs find a communicator by its name."""
    _known[name] = find


def know_layers(find: Callable[[int, Framed], Caller]) -> None:
    """Let graphs find who calls, by the number in the tensor that a layer keeps."""
    _callers[:] = [find]


class InGraph(Framed):
    """A communicator while torch.compile traces."""

    rank, size = 0, 1

    def __init__(self, name: str, rank: int, size: int) -> None:
        self.name, self.rank, self.size = name, rank, size

    def gather(
        self, tensor: Tensor, caller: Caller, flags: int, layer: Tensor | None = None
    ) -> Received:
        what = caller.direction, caller.channels, caller.reproducible, flags
        rows = torch.ops.syncbn.gather.default(tensor, layer, self.name, self.size, *what)
        return Received(rows, ())

    def reduce(
        self, tensor: Tensor, caller: Caller, flags: int, layer: Tensor | None = None
    ) -> Received:
        what = caller.direction, caller.channels, caller.reproducible, flags
        return Received(torch.ops.syncbn.reduce.default(tensor, layer, self.name, *what), ())

    def all_gather(self, tensor: Tensor) -> Tensor:
        return self.gather(tensor, NOBODY, 0).rows

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return self.reduce(tensor, NOBODY, MAY).rows


def _found(name: str) -> Framed:
    comm = _known[name]() if name in _known else None
    if comm is None:
        raise RuntimeError(
            f"sync_batch_norm: expected the communicator {name} of this compiled graph, which is "
            "gone; if its group was destroyed, set layer.process_group to a group that is alive"
        )
    return comm


def _caller(
    comm: Framed, layer: Tensor | None, direction: str, channels: int, reproducible: bool
) -> Caller:
    found = Caller() if layer is None else _callers[0](int(layer), comm)
    return Caller(direction, found.layer, channels, reproducible, *found[4:])


def _gather(
    tensor: Tensor,
    layer: Tensor | None,
    name: str,
    size: int,
    direction: str,
    channels: int,
    reproducible: bool,
    flags: int,
) -> Tensor:
    comm = _found(name)
    caller = _caller(comm, layer, direction, channels, reproducible)
    return comm.gather(tensor, caller, flags).rows.contiguous()


def _reduce(
    tensor: Tensor,
    layer: Tensor | None,
    name: str,
    direction: str,
    channels: int,
    reproducible: bool,
    flags: int,
) -> Tensor:
    comm = _found(name)
    caller = _caller(comm, layer, direction, channels, reproducible)
    return comm.reduce(tensor, caller, flags).rows


def _keep_order(lowerings: Any, operator: Any) -> Callable[..., Any]:
    """Let inductor treat an operator as torch's own collectives, whose order it keeps: else it may
    call those of parallel branches in an order that follows from sizes, which differ between ranks.
    """
    from torch._inductor import ir

    def lowered(tensor: Any, *others: Any) -> Any:
        kernel: Any = ir._CollectiveKernel.create_out_of_place(operator, tensor, *others)
        return ir.TensorBox.create(kernel)

    return lowered


def _keep_order_in_inductor() -> None:
    for operator in (torch.ops.syncbn.gather.default, torch.ops.syncbn.reduce.default):
        lower(operator, partial(_keep_order, operator=operator))


def _gathered_shape(tensor: Tensor, layer: Tensor | None, comm: str, size: int, *_: Any) -> Tensor:
    _keep_order_in_inductor()
    return tensor.new_empty(size, *tensor.shape)


def _reduced_shape(tensor: Tensor, *_: Any) -> Tensor:
    _keep_order_in_inductor()
    return tensor.new_empty(tensor.shape)


_CALLER = "str direction, int channels, bool reproducible, int flags"
define(
    f"gather(Tensor tensor, Tensor? layer, str comm, int size, {_CALLER}) -> Tensor",
    _gather,
    _gathered_shape,
)
define(
    f"reduce(Tensor tensor, Tensor? layer, str comm, {_CALLER}) -> Tensor", _reduce, _reduced_shape
)
