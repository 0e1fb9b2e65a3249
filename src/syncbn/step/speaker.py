"""A communicator on which one layer speaks: its messages and errors say whose call it is."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..comm import (
    MAY,
    WANTS,
    Begun,
    Caller,
    Communicator,
    Framed,
    Received,
    are_many,
    devices,
)
from ..comm.errors import DesyncError
from ..tensors.prefix import Prefix, prefixed
from .identity import caller_of, name_layer


def speaking(
    comm: Communicator,
    layer: nn.Module | None,
    channels: int,
    compiling: bool,
    reproducible: bool = False,
    direction: str = "forward",
) -> Communicator:
    """The communicator for a call of a layer, which tells the other ranks whose call it is.

    A graph that read the name would serve this layer only, where a block that is compiled once
    serves many: it takes the layer's token, and the name is found when it runs.
    """
    if comm.size == 1:
        return comm
    if compiling:
        caller = Caller(direction, "", channels, reproducible)
        return Speaker(comm, caller, True, getattr(layer, "_token", None))
    found = caller_of(layer, comm)
    caller = Caller(direction, found.layer, channels, reproducible, *found[4:])
    return Speaker(comm, caller, False)


def towards(direction: str, comm: Communicator, compiling: bool) -> Communicator:
    """The same for another direction, where the communicator tells any."""
    return comm.towards(direction, compiling) if isinstance(comm, Speaker) else comm


class Speaker(Communicator):
    """A communicator on which one layer speaks. Errors name it, and so do the messages of those
    communicators that are ours.
    """

    rank = size = 0  # set below

    def __init__(
        self, comm: Communicator, caller: Caller, compiling: bool, token: Tensor | None = None
    ) -> None:
        self.comm, self.caller, self.rank, self.size = comm, caller, comm.rank, comm.size
        self.compiling, self.token = compiling, token

    def towards(self, direction: str, compiling: bool) -> Speaker:
        caller = self.caller._replace(direction=direction)
        return Speaker(self.comm, caller, compiling, self.token)

    def begin(
        self, operation: str, where: Tensor, shape: tuple[int, ...], flags: int
    ) -> Begun | None:
        """What a message of float64 numbers of this shape is to begin with, if anything."""
        if not isinstance(self.comm, Framed):
            return None
        return self.comm.begin(operation, where, shape, torch.float64, self.caller, flags)

    def tell(self, tensor: Tensor, flags: int, begun: Begun | None = None) -> Received:
        """Every rank's tensor (*), and what it says beside it: see comm/frames.py.

        begun: the tensor has begun so, where :meth:`begin` gave it.
        """
        received: Received = self._run(self._told, tensor, flags, begun)
        return received

    def all_gather(self, tensor: Tensor) -> Tensor:
        if isinstance(self.comm, Framed):
            return self.tell(tensor, 0).rows.contiguous()
        gathered: Tensor = self._run(self._gathered, tensor)
        return gathered

    def add(self, tensor: Tensor, flags: int, begun: Begun | None = None) -> Received:
        """The same for the sum of all ranks' tensors."""
        received: Received = self._run(self._added, tensor, flags, begun)
        return received

    def all_reduce(self, tensor: Tensor, begun: Begun | None = None) -> Tensor:
        return self.add(tensor, MAY, begun).rows

    def tells_later(self, tensor: Tensor) -> bool:
        """Whether what all ranks say beside such a tensor is looked at by a later call."""
        return isinstance(self.comm, Framed) and not self.comm._takes_frames(tensor)

    def give_up(self, error: Exception) -> None:
        """Tell the other ranks that this one raises instead of calling."""
        if isinstance(self.comm, Framed):
            self.comm.give_up(error)

    def _told(self, tensor: Tensor, flags: int, begun: Begun | None) -> Received:
        if isinstance(self.comm, Framed):
            if begun is not None:
                return devices.gather(self.comm, tensor, begun)
            return self.comm.gather(tensor, self.caller, flags, self.token)
        received = self._gathered(prefixed(tensor, Prefix((float(flags & WANTS),), 0, 1)))
        return Received(received[:, 1:], received[:, 0])

    def _gathered(self, tensor: Tensor) -> Tensor:
        return self._checked("all_gather", self.comm.all_gather(tensor), (self.size, *tensor.shape))

    def _added(self, tensor: Tensor, flags: int, begun: Begun | None) -> Received:
        if isinstance(self.comm, Framed):
            if begun is not None:
                return devices.reduce(self.comm, tensor, begun)
            return self.comm.reduce(tensor, self.caller, flags, self.token)
        if not are_many(self.size):  # who say in rows what they say
            return Received(self._reduced(tensor), ())
        total = self._reduced(prefixed(tensor, Prefix((float(flags & WANTS),), 0, 1)))
        return Received(total[1:].view(tensor.shape), total[:1])

    def _reduced(self, tensor: Tensor) -> Tensor:
        return self._checked("all_reduce", self.comm.all_reduce(tensor), tuple(tensor.shape))

    def _checked(self, operation: str, received: Tensor, shape: tuple[int, ...]) -> Tensor:
        """What somebody's own communicator brings, which may have another size than it says."""
        if tuple(received.shape) != shape:
            raise RuntimeError(
                f"{type(self.comm).__name__}: expected {operation} among its {self.size} ranks to "
                f"return shape {shape}, got {tuple(received.shape)} on rank {self.rank}; its size "
                "and its collectives must tell of the same ranks"
            )
        return received

    def _run(self, collective: Callable[..., Any], *arguments: Any) -> Any:
        if self.compiling:  # what is raised when a graph runs has no layer
            return collective(*arguments)
        try:
            return collective(*arguments)
        except DesyncError:  # which says whose calls differ
            raise
        except RuntimeError as error:
            name_layer(error, self.caller.layer)
            raise
