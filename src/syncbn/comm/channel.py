"""Messages through memory that processes of one host share, and how ranks find out that they do."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch
from torch import Tensor

from .framed import Framed
from .frames import Swapped
from .memory import Memory, Parts, Patience, Unmappable, create, open_of, unavailable
from .packing import frame_of
from .waiting import SLICE, limit_of

# How long a rank looks for the others' messages before it sleeps: where each has a processor of its
# own about as long as falling asleep and waking up take; where not, it lets the others run.
_LOOKS, _TURNS = 2000, 20
_FIRST_SLEEP = 5e-3  # seconds, before it looks whether they are alive
_LATER = Patience(0, 0, 50e-3)


class Channel:
    """One rank's end. timeout: asks for the seconds that a message may take."""

    def __init__(self, memory: Memory, size: int, timeout: Callable[[], float]) -> None:
        self.memory, self._timeout, self._process = memory, timeout, os.getpid()
        self.number = 0
        alone = len(os.sched_getaffinity(0)) >= size
        self._patience = Patience(_LOOKS if alone else _LOOKS // 20, _TURNS, _FIRST_SLEEP)

    def send(self, comm: Framed, tensor: Tensor, operation: str) -> Tensor:
        """Every rank's tensor (n,), as of :meth:`Framed._send` of the communicator."""
        self._check(comm)
        received = tensor.new_empty(comm.size, *tensor.shape)
        length, here, there = tensor.nbytes, tensor.data_ptr(), received.data_ptr()
        try:
            for begin in range(0, length, self.memory.capacity):
                part = min(length - begin, self.memory.capacity)
                self.number = (self.number + 1) % 2**32
                self.memory.publish(self.number, here + begin, part)
                parts = Parts(there + begin, length, part)
                self._receive(comm, operation, parts, 0, self._patience)
        except BaseException:  # Ctrl-C while waiting, too
            self.memory.end()
            raise
        return received

    def swap(
        self, comm: Framed, head: bytes, content: Tensor, words: int, operation: str
    ) -> Swapped:
        """As of :meth:`Framed._swap` of the communicator."""
        size, length = comm.size, len(head) + 8 * words
        if length > self.memory.capacity:
            return Swapped(self.send(comm, frame_of(head, content, words), operation))
        self._check(comm)
        rows = content.new_empty(size, *content.shape)
        self.number = (self.number + 1) % 2**32
        body = Parts(content.data_ptr(), 0, content.nbytes)
        message = self.number, head, body, length, rows.data_ptr(), self._patience
        try:
            came = self.memory.swap(*message)
            if came > size:
                return Swapped(None, rows)
            frames = torch.empty(size, length // 8, dtype=torch.float64, device="cpu")
            parts = Parts(frames.data_ptr(), length, length)
            self._receive(comm, operation, parts, came, _LATER)
        except BaseException:  # Ctrl-C while waiting, too
            self.memory.end()
            raise
        return Swapped(frames)

    def _receive(
        self, comm: Framed, operation: str, parts: Parts, came: int, patience: Patience
    ) -> None:
        """Wait for all ranks' messages with the present number: those before rank ``came`` have."""
        began, lost = time.monotonic(), ""
        frames, look = comm._frames, SLICE
        while True:
            came = self.memory.receive(self.number, parts, came, patience)
            if came == comm.size:
                return
            if lost:
                raise RuntimeError(
                    f"{comm._name()}: rank {comm.rank} of {comm.size}: {operation}: {lost}"
                    f"{frames.waiting.remedy}"
                )
            waited, longest = time.monotonic() - began, self._timeout()
            lost = self._lost(comm)
            if not lost and waited > min(look, limit_of(longest)):
                frames.look(operation, waited, longest)
                look = waited + SLICE
            # Once more where there is a reason to give up: the message may have come before that.
            patience = Patience(0, 0, 0.0) if lost else _LATER

    def _lost(self, comm: Framed) -> str:
        """Why there is nothing to wait for; empty where there is."""
        for rank in range(comm.size):
            if self.memory.has_ended(rank):
                return f"rank {rank} has ended{comm._frames.waiting.last_words(rank)}"
        return ""

    def _check(self, comm: Framed) -> None:
        if self._process != os.getpid():
            raise RuntimeError(
                f"{comm._name()}: expected a call from process {self._process}, which is rank "
                f"{comm.rank}, got one from its fork {os.getpid()}; initialise "
                "torch.distributed in each rank's own process, and construct communicators there"
            )


def find_channel(
    say: Callable[[str], list[str]],
    rank: int,
    size: int,
    timeout: Callable[[], float],
    unwilling: str = "",
) -> Channel | str:
    """A channel between all ranks, or why there is none, on every rank alike.

    say: what every rank says. unwilling: why this one wants none.
    """
    problem, memory, place = unwilling or unavailable() or "", None, ""
    if rank == 0 and not problem:
        try:
            memory, place = create(size)
        except (Unmappable, OSError) as error:
            problem = str(error)
    problems = say(problem)
    if not any(problems):
        place = say(place)[0]
        if rank:
            try:
                memory = open_of(place, rank, size)
            except (Unmappable, OSError) as error:
                problem = str(error)
        problems = say(problem)  # after which all have it
    for other, text in enumerate(problems):
        if text:
            return f"on rank {other} of {size} {text}"
    assert memory is not None
    return Channel(memory, size, timeout)
