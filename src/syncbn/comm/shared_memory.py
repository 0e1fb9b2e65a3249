"""Ranks that are processes of one host: messages go through memory that they share."""

from __future__ import annotations

import hashlib
import os
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .base import Communicator, described, refused_calls
from .groups import timeout_of
from .memory import CALL, Memory, Unmappable, create, open_of, unavailable
from .process_group import ProcessGroup, default_group, from_torch

if TYPE_CHECKING:
    from collections.abc import Callable

# How long a rank looks for the others' messages before it sleeps: where each has a processor of its
# own about as long as falling asleep and waking up take; where not, it lets the others run.
_LOOKS, _TURNS = 2000, 20
_FIRST_SLEEP, _SLEEP = 5e-3, 50e-3  # seconds, before it looks whether they are alive


class SharedMemory(Communicator):
    """The ranks of a torch.distributed group that are processes of one host, without its backend.

    All ranks of ``group`` construct it together. Small messages arrive several times as fast as
    over gloo's sockets. Ranks that find no processor of their own, and those that wait for long,
    sleep.

    - **Devices.** Messages travel through CPU memory; tensors elsewhere are copied there and back.
    - **Memory.** Half a megabyte per rank, of no name: nothing is left wherever a job ends.
    - **Failure.** A rank that ends, however it does, ends the others' calls within a second; one
      that is late by the group's timeout, and ranks whose calls differ, likewise. The communicator
      has then ended, on every rank.
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
        self._rank, self._size, self._process = comm.rank, comm.size, os.getpid()
        self._timeout: Callable[[], float] = timeout_of(comm.group)
        self._memory = _shared(comm)
        self._number = 0
        self._calls: dict[tuple[str, torch.Size, torch.dtype], bytes] = {}
        self._ended: str | None = None
        alone = len(os.sched_getaffinity(0)) >= self._size
        self._patience = (_LOOKS, _TURNS) if alone else (_LOOKS // 20, _TURNS)

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._size

    def all_gather(self, tensor: Tensor) -> Tensor:
        return self._gathered("all_gather", tensor).to(tensor.device)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        total = self._gathered("all_reduce", tensor).sum(0, dtype=tensor.dtype)
        return total.to(tensor.device)

    def _gathered(self, operation: str, tensor: Tensor) -> Tensor:
        self._check()
        try:
            sent = tensor.detach().cpu().contiguous().resolve_conj().resolve_neg()
            received = sent.new_empty(self._size, *sent.shape)
            call = self._call(operation, sent)
            length, here, there = sent.nbytes, sent.data_ptr(), received.data_ptr()
            for begin in range(0, max(length, 1), self._memory.capacity):
                part = min(length - begin, self._memory.capacity)
                self._number = (self._number + 1) % 2**32
                self._memory.publish(self._number, call, here + begin, part)
                self._receive(operation, there + begin, length, part)
        except BaseException as error:  # Ctrl-C while waiting
            self._end(f"{operation}: rank {self._rank} raised {type(error).__name__}: {error}")
            raise
        return received

    def _call(self, operation: str, sent: Tensor) -> bytes:
        """What describes this call, and no other, in the CALL bytes there are for it."""
        key = operation, sent.shape, sent.dtype
        call = self._calls.get(key)
        if call is None:
            text = described(operation, sent).encode()
            if len(text) > CALL:
                digest = hashlib.blake2b(text, digest_size=16).hexdigest().encode()
                text = text[: CALL - len(digest)] + digest
            call = self._calls[key] = text.ljust(CALL, b"\0")
        return call

    def _receive(self, operation: str, there: int, stride: int, part: int) -> None:
        """Wait for all ranks' messages with the present number; their parts go to ``there``."""
        came, waited, patience, pause, lost = 0, 0.0, self._patience, _FIRST_SLEEP, ""
        while True:
            came = self._memory.receive(self._number, there, stride, part, came, *patience, pause)
            if came == self._size:
                return
            if came < 0:
                calls = [self._memory.call(rank, self._number) for rank in range(self._size)]
                raise RuntimeError(self._end(refused_calls(calls)))
            if lost:
                raise RuntimeError(self._end(f"{operation}: {lost}"))
            waited += pause
            lost = self._lost(came, waited)
            # Once more where there is a reason to give up: the message may have come before that.
            patience, pause = (0, 0), 0.0 if lost else _SLEEP

    def _lost(self, late: int, waited: float) -> str:
        """Why there is nothing to wait for; empty where there is."""
        for rank in range(self._size):
            if self._memory.has_ended(rank):
                return f"rank {rank} has ended"
        if waited > self._timeout():
            return f"rank {late} has not arrived within {self._timeout():g} s, the group's timeout"
        return ""

    def _end(self, reason: str) -> str:
        """End the communicator for all ranks; the words for it, of which the first stay."""
        self._memory.end()
        if self._ended is None:
            self._ended = (
                f"SharedMemory: rank {self._rank} of {self._size}: {reason}; every rank must make "
                "the same calls, forward and backward: see the other ranks' errors, and where "
                "loaders differ in length iterate over syncbn.until_all_done(loader, comm). This "
                "communicator has ended"
            )
        return self._ended

    def _check(self) -> None:
        if self._process != os.getpid():
            raise RuntimeError(
                f"SharedMemory: expected a call from process {self._process}, which is rank "
                f"{self._rank}, got one from its fork {os.getpid()}; construct one there"
            )
        if self._ended is not None:
            raise RuntimeError(self._ended)


def _shared(comm: ProcessGroup) -> Memory:
    """Memory of rank 0 that all ranks of the group have mapped, or an error on all of them."""
    problem, memory, place = unavailable() or "", None, ""
    if comm.rank == 0 and not problem:
        try:
            memory, place = create(comm.size)
        except (Unmappable, OSError) as error:
            problem = str(error)
    problems = _said(comm, problem)
    place = _said(comm, place)[0]
    if not any(problems):
        if comm.rank:
            try:
                memory = open_of(place, comm.rank, comm.size)
            except (Unmappable, OSError) as error:
                problem = str(error)
        problems = _said(comm, problem)  # after which all have it
    for rank, text in enumerate(problems):
        if text:
            raise RuntimeError(
                f"SharedMemory: expected ranks that share memory, but on rank {rank} of "
                f"{comm.size} {text}; leave the messages to the group's own backend, which is the "
                "default (process_group=None)"
            )
    assert memory is not None
    return memory


_WORDS = 400  # bytes of what one rank says in the handshake


def _said(comm: ProcessGroup, text: str) -> list[str]:
    """What every rank says, through the group's own backend."""
    content = text.encode()[:_WORDS].ljust(_WORDS)
    sent = torch.tensor(list(content), dtype=torch.float32, device=comm.device)
    rows = comm.all_gather(sent).to("cpu", torch.uint8).tolist()
    return [bytes(row).decode(errors="replace").rstrip() for row in rows]
