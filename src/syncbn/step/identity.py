"""Which layer a call is of, in words that are the same on every rank.

A layer that convert() met is known by its name in that model. Another has a number: processes that
make the same layers in the same order give them the same ones. Ranks that are threads of a process
share its count, so there the class must do.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import count

import torch
import torch.nn as nn
from torch import Tensor

from ..comm import Communicator, Threads

_numbers = count(1)


def take_number(layer: nn.Module) -> None:
    """Give a layer a number, unless it is known by something."""
    if "_identity" not in vars(layer):
        vars(layer)["_identity"] = next(_numbers)


def take_name(layer: nn.Module, name: str) -> None:
    """Let a layer be known by its name in a model. It has none where it is the model itself.

    A name in a part of the model that it is known in already says less.
    """
    known = str(vars(layer).get("_identity", ""))
    if name and known != name and not known.endswith(f".{name}"):
        vars(layer)["_identity"] = name
    take_number(layer)


def identity_of(layer: nn.Module | None, *, counted: bool = True) -> str:
    """A layer's name, or class and number. None: a call of sync_batch_norm without a layer."""
    if layer is None:
        return "sync_batch_norm"
    take_number(layer)  # one that became ours by hand
    found = vars(layer)["_identity"]
    if isinstance(found, str):
        return found
    return f"{type(layer).__name__} {found}" if counted else type(layer).__name__


def naming(comm: Communicator, layer: nn.Module | None) -> Communicator:
    """The communicator for a call of a layer: its errors name the layer.

    A graph that read the name would serve this layer only, where a block that is compiled once
    serves many.
    """
    if comm.size == 1 or torch.compiler.is_compiling():
        return comm
    return _Naming(comm, identity_of(layer, counted=not isinstance(comm, Threads)))


class _Naming(Communicator):
    rank = size = 0  # set below

    def __init__(self, comm: Communicator, layer: str) -> None:
        self._comm, self._layer, self.rank, self.size = comm, layer, comm.rank, comm.size

    def all_gather(self, tensor: Tensor) -> Tensor:
        return self._run(self._comm.all_gather, tensor)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return self._run(self._comm.all_reduce, tensor)

    def _run(self, collective: Callable[[Tensor], Tensor], tensor: Tensor) -> Tensor:
        try:
            return collective(tensor)
        except RuntimeError as error:
            if error.args and isinstance(error.args[0], str):  # MPI's hold numbers
                error.args = (f"{error.args[0]}; in layer {self._layer!r}", *error.args[1:])
            raise
