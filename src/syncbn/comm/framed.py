"""Communicators whose messages are frames: those of torch.distributed, memory, threads, MPI."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..tensors.prefix import prefixed
from . import devices, tracing
from .base import Communicator, described
from .errors import DesyncError
from .frames import Frames, Received, Swapped
from .headers import MAY, NOBODY, Caller
from .packing import frame_of
from .sums import calls_on
from .waiting import Notes


class Framed(Communicator):
    """A communicator whose messages are frames (frames.py).

    Its calls are compared by what they are for, if a caller says so, and by operation, shape and
    dtype. Ranks that have raised DesyncError may go on from there, together.
    """

    name_in_graphs = ""  # see graphs.py
    direct_exchange_max_size = sys.maxsize  # ranks that reduce by gathering: one round

    @property
    def _frames(self) -> Frames:
        """This communicator's calls so far."""
        found: Frames | None = vars(self).get("_calls_so_far")
        if found is None:
            found = vars(self)["_calls_so_far"] = calls_on(self)
        return found

    def _notes(self) -> Notes | None:
        """Where ranks that wait or give up say so; None where the engine has its own means."""
        return None

    def _name(self) -> str:
        """What errors begin with."""
        return type(self).__name__

    def _members(self) -> tuple[str, Sequence[int] | None]:
        """A name that no other communicator of these processes has, the same on all ranks, and
        which process of the job each rank is; None where all are this one."""
        return "", None

    def _check(self, operation: str, tensor: Tensor) -> None:
        """Refuse a call that cannot be made, before its message."""

    def give_up(self, error: BaseException) -> None:
        """Tell the other ranks that the call they wait for will not come: this rank raises."""
        if isinstance(error, DesyncError) or type(error).__name__ == "_StopRecomputationError":
            return  # the others know, or will; a checkpoint that has recomputed enough goes on
        frames = self._frames
        number, words = frames.number + 1, f"{type(error).__name__}: {error}"
        frames.waiting.give_up(number, words)
        tracing.give_up(frames.place, number, words)

    def _takes_frames(self, tensor: Tensor) -> bool:
        """Whether a tensor's message is a frame: the comparison of headers takes the CPU."""
        return True

    def _send(self, tensor: Tensor, operation: str) -> Tensor:
        """Every rank's tensor (n,), of one size and dtype on all: (W, n).

        operation: what errors call it. Raises Unsent where nothing has left this rank.
        """
        raise NotImplementedError

    def _swap(self, head: bytes, content: Tensor, words: int, operation: str) -> Swapped:
        """Every rank's frame: a header and so many words, of which the content fills the first."""
        return Swapped(self._send(frame_of(head, content, words), operation))

    def _reduce(self, tensor: Tensor, operation: str) -> Tensor:
        """The sum of all ranks' tensors, where they are more than exchange directly or on a device.
        The tensor may be overwritten by it.
        """
        return self._send(tensor, operation).sum(0)

    def all_gather(self, tensor: Tensor) -> Tensor:
        return self.gather(tensor, NOBODY, 0).rows.contiguous()

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return self.reduce(tensor, NOBODY, MAY).rows

    def begin(
        self,
        operation: str,
        where: Tensor,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        caller: Caller,
        flags: int,
    ) -> devices.Begun | None:
        """What a message of such content on a tensor's device begins with, for those who write it
        themselves and then call :func:`devices.gather` or :func:`devices.reduce`; None where
        messages are frames.
        """
        if self._takes_frames(where):
            return None
        return devices.begin(self, operation, where, (shape, dtype), caller, flags)

    def gather(
        self, tensor: Tensor, caller: Caller, flags: int, layer: Tensor | None = None
    ) -> Received:
        """:meth:`all_gather`, and what each rank says beside it. layer: for graphs.py."""
        if begun := self.begin("all_gather", tensor, tensor.shape, tensor.dtype, caller, flags):
            return devices.gather(self, prefixed(tensor.detach(), begun.prefix), begun)
        rows, said = self._frames.exchange(self, "all_gather", tensor, caller, flags)
        return Received(rows if tensor.is_cpu else rows.to(tensor.device), said)

    def reduce(
        self, tensor: Tensor, caller: Caller, flags: int, layer: Tensor | None = None
    ) -> Received:
        """:meth:`all_reduce`, and what each rank says beside it. layer: for graphs.py."""
        if begun := self.begin("all_reduce", tensor, tensor.shape, tensor.dtype, caller, flags):
            tensor = tensor.detach()
            message = prefixed(tensor, begun.prefix) if begun.prefix.room else tensor.clone()
            return devices.reduce(self, message, begun)
        total, said = self._frames.exchange(self, "all_reduce", tensor, caller, flags)
        return Received(total.to(tensor.device), said)

    def _beside(
        self,
        message: Callable[[Tensor, str], Tensor],
        tensor: Tensor,
        operation: str,
        caller: Caller,
    ) -> Tensor:
        """A message that is no frame; traces show it."""
        if torch.compiler.is_compiling() or not tracing.active:
            return message(tensor, operation)
        words = f"{described(operation, tensor.shape, tensor.dtype)}{caller}"
        return tracing.recorded(
            self._frames.place.beside(), words, lambda: message(tensor, operation)
        )
