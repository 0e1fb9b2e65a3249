"""Ranks that are processes of one host: messages go through memory that they share."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .channel import find_channel
from .framed import Framed
from .frames import Swapped
from .given import default_group, from_torch
from .graphs import take_name
from .groups import store_of, timeout_of
from .waiting import Notes, StoreNotes


class SharedMemory(Framed):
    """The ranks of a torch.distributed group that are processes of one host, without its backend.

    All ranks of ``group`` construct it together. Small messages arrive several times as fast as
    over gloo's sockets. Ranks that find no processor of their own, and those that wait for long,
    sleep.

    - **Devices.** Messages travel through CPU memory; tensors elsewhere are copied there and back.
    - **Memory.** Half a megabyte per rank, of no name: nothing is left wherever a job ends.
    - **Failure.** A rank that ends, however it does, ends the others' calls within a second; one
      that is late by the group's timeout likewise. The communicator has then ended, on every rank.
      Ranks whose calls differ raise DesyncError, and go on.
    - **Processes.** Each rank uses it in the process that constructed it, not in a fork of that.

    Args:
        group: None (the default group), a torch.distributed group or a one-dimensional DeviceMesh.

    Raises:
        RuntimeError: on every rank alike, ranks that share no memory: of other hosts, containers,
            users or versions of this library; a system without it; a library that was not compiled.
            In collectives, see *Failure*.
        TypeError, ValueError: as for ``process_group`` of :class:`syncbn.SyncBatchNorm`; no group.

    Example::

        torch.distributed.init_process_group("gloo")
        model = syncbn.convert(model, syncbn.comm.SharedMemory())
    """

    def __init__(self, group: Any = None) -> None:
        comm = default_group() if group is None else from_torch(group)
        if comm is None:
            raise ValueError(
                "SharedMemory: expected a torch.distributed group, but the default group is not "
                "initialised; call torch.distributed.init_process_group first"
            )
        self._rank, self._size = comm.rank, comm.size
        found = find_channel(comm.say, self._rank, self._size, timeout_of(comm.group))
        if isinstance(found, str):
            raise RuntimeError(
                f"SharedMemory: expected ranks that share memory, but {found}; leave the messages "
                "to the group's own backend, which is the default (process_group=None)"
            )
        self._channel = found
        self._store = store_of(comm.group, found.memory.token)
        self._processes = comm._members()[1]
        take_name(self)

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size

    def _send(self, tensor: Tensor, operation: str) -> Tensor:
        return self._channel.send(self, tensor, operation)

    def _swap(self, head: bytes, content: Tensor, words: int, operation: str) -> Swapped:
        return self._channel.swap(self, head, content, words, operation)

    def _notes(self) -> Notes:
        return StoreNotes(self._store)

    def _members(self) -> tuple[str, list[int]]:
        return self._channel.memory.token, self._processes
