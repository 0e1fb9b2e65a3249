"""The messages of ranks that are threads: all that they share, under one lock."""

from __future__ import annotations

import itertools
import math
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .framed import Framed
from .waiting import SLICE, limit_of
from .words import ranks, told

_numbers = itertools.count(1)


@dataclass(eq=False)
class Round:
    """One message of the group: what each rank calls and sends, and what all receive."""

    calls: dict[int, tuple[str, Tensor]] = field(default_factory=dict)
    result: Tensor | None = None


class Rounds:
    """What the ranks share: the round that gathers calls, and why there will be no more."""

    def __init__(self, size: int, timeout: float) -> None:
        self.size, self.timeout, self.number = size, timeout, next(_numbers)
        self.changed = threading.Condition()  # guards all that follows
        self.round = Round()
        self.left: set[int] = set()  # ranks that left their block while others are in theirs
        self.notes: dict[int, str] = {}
        self.ended: str | None = None

    def check(self, rank: int, operation: str, tensor: Tensor) -> None:
        """Refuse a call that cannot take part in the round, on every rank."""
        with self.changed:
            self._check()
            if (obstacle := self._obstacle(rank, operation, tensor)) is not None:
                self.end(obstacle)
                self._check()

    def meet(
        self,
        comm: Framed,
        operation: str,
        tensor: Tensor,
        together: Callable[[list[Tensor]], Tensor] = torch.stack,
    ) -> Tensor:
        """This rank's part in a message; what came of it, which is this rank's own.

        together: of what all ranks bring, in their order.
        """
        rank = comm.rank
        with self.changed:
            self.check(rank, operation, tensor)
            this = self.round
            this.calls[rank] = comm._frames.text, tensor
            try:
                if len(this.calls) == self.size:
                    self.round = Round()
                    self._conclude(this, together)
                else:
                    self._wait(this, operation, comm)
            except BaseException as error:  # Ctrl-C while waiting, no memory left
                self.end(f"{operation}: rank {rank} raised {type(error).__name__}: {error}")
                raise
            if this.result is None:
                self._check()
        assert this.result is not None
        return this.result.clone()

    def enter(self, rank: int) -> None:
        with self.changed:
            if not self._wait_for(lambda: rank not in self.left, self.timeout):
                self.end(
                    f"with: rank {rank} is back, but {self._missing(self.left)} not left within "
                    f"{self.timeout:g} s; use one block for all that a rank's thread runs"
                )
            self._check()

    def leave(self, rank: int, note: str) -> None:
        with self.changed:
            self.notes[rank] = note

    def read(self, ranks: Iterable[int]) -> dict[int, str]:
        with self.changed:
            return {rank: self.notes[rank] for rank in ranks if rank in self.notes}

    def leave_block(self, rank: int) -> None:
        with self.changed:
            self.left.add(rank)
            if self.round.calls:
                self.end(self._gone(next(iter(self.round.calls.values()))[0]))
            if len(self.left) == self.size:
                self.left.clear()
            self.changed.notify_all()

    def end(self, reason: str) -> None:
        """End every collective, waiting or to come. The first reason stays."""
        with self.changed:
            if self.ended is None:
                self.ended = (
                    f"syncbn.comm.threads: {reason}. The group of {self.size} threads has ended; "
                    "make another with syncbn.comm.threads"
                )
                self.round = Round()
                self.changed.notify_all()

    def _check(self) -> None:
        if self.ended is not None:
            raise RuntimeError(self.ended)

    def _obstacle(self, rank: int, operation: str, tensor: Tensor) -> str | None:
        """Why this call can't take part in the round."""
        if tensor.device.type != "cpu":
            return (
                f"{operation}: expected a tensor on the CPU, got one on {tensor.device} on rank "
                f"{rank}; torch runs the backward of all threads in one thread per device, where "
                "a rank that waits for another keeps it from arriving. Move the model to the CPU, "
                "or run a process per device under torch.distributed"
            )
        if self.left:
            return self._gone(operation)
        if rank in self.round.calls:
            return (
                f"{operation}: rank {rank} is in {self.round.calls[rank][0]} already, in another "
                "thread; give every thread a communicator of its own"
            )
        return None

    def _conclude(self, this: Round, together: Callable[[list[Tensor]], Tensor]) -> None:
        """The last rank to arrive works for all."""
        this.result = together([this.calls[rank][1] for rank in range(self.size)])
        this.calls.clear()  # the arguments are their callers'
        self.changed.notify_all()

    def _wait(self, this: Round, operation: str, comm: Framed) -> None:
        began, limit, frames = time.monotonic(), limit_of(self.timeout), comm._frames
        while not self._wait_for(lambda: this.result is not None, min(limit, SLICE)):
            waited = time.monotonic() - began
            if waited < limit:
                frames.look(operation, waited, math.inf)
                continue
            self.end(
                f"{operation}: {self._missing(this.calls)} not arrived within "
                f"{limit:g} s ({self._calls(this)}); run every rank in a thread of its own, "
                "forward and backward, under 'with comm:' so that one that raises or leaves ends "
                "the others at once, or pass a longer timeout"
            )

    def _wait_for(self, arrived: Callable[[], bool], seconds: float) -> bool:
        """Whether, within so many, it has arrived or the group ended."""
        return self.changed.wait_for(lambda: arrived() or self.ended is not None, seconds)

    def _gone(self, operation: str) -> str:
        return (
            f"{operation}: {ranks(self.left)} left the 'with comm:' block before the others; "
            "every rank must make as many forward and backward calls (an empty batch counts)"
        )

    def _missing(self, present: Iterable[int]) -> str:
        missing = set(range(self.size)).difference(present)
        return f"{ranks(missing)} {'has' if len(missing) == 1 else 'have'}"

    def _calls(self, this: Round) -> str:
        called = {rank: text for rank, (text, _) in this.calls.items()}
        return told({rank: called.get(rank, "no call") for rank in range(self.size)})
