"""Ranks that are replicas of one module in one process and share one autograd graph.

Each replica's forward runs in a thread of its own. At a layer it hands in what it has and waits;
when all have, the caller's thread does the layer's work for all of them, as one operation of the
graph, and hands out the results. So backward, which is one thread's, never waits for anything.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from queue import SimpleQueue
from types import FrameType
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch._utils import ExceptionWrapper

from ..tensors.recomputation import recompute_here, recomputing
from .base import Communicator, Local

T = TypeVar("T")


class _Thread(threading.local):
    group: ReplicaGroup | None = None
    replica: Replica | None = None


_thread = _Thread()


class ReplicaGroup:
    """Runs one function per replica and brings them together where they :meth:`Replica.rendezvous`.

    Args:
        names: what errors call the replicas.
        in_turns: only one replica runs at a time, in order: what they draw from a random generator
            or write to an object that they share does not depend on the threads' pace.
    """

    def __init__(self, names: Sequence[str], in_turns: bool) -> None:
        self.names = names
        self._in_turns = in_turns
        self._backward_may = torch.is_grad_enabled()  # come: a checkpoint turns it off in replicas
        self._recomputing = recomputing()
        self._running = 0
        self._events: SimpleQueue[tuple[int, Any]] = SimpleQueue()
        self._answers: list[SimpleQueue[Any]] = [SimpleQueue() for _ in names]
        self._waiting: dict[int, _Arrival] = {}
        self._failed: dict[int, ExceptionWrapper] = {}
        self._results: dict[int, Any] = {}

    def run(self, functions: Sequence[Callable[[], T]]) -> list[T]:
        """Every replica's result.

        Raises the first failing replica's exception, of the same type, with its traceback as text
        and its name; the others end at their next meeting. Raises RuntimeError where replicas
        wait for each other at different layers, or for one that has finished.
        """
        threads = [
            threading.Thread(target=self._serve, args=(rank, function), name=name, daemon=True)
            for rank, (function, name) in enumerate(zip(functions, self.names, strict=True))
        ]
        try:
            self._advance(thread.start for thread in threads)
            while self._waiting and not self._failed:
                answers = self._bring_together()
                for rank in answers:
                    del self._waiting[rank]
                self._advance(partial(self._answers[r].put, value) for r, value in answers.items())
        finally:  # an interrupt of this thread must not leave replicas waiting either
            for queue in self._answers:
                queue.put(_Ended())
        for thread in threads:
            if thread.ident is not None:
                thread.join()
        if self._failed:
            self._failed[min(self._failed)].reraise()  # type: ignore[no-untyped-call]
        return [self._results[rank] for rank in range(len(threads))]

    def rendezvous(self, rank: int, arrival: _Arrival) -> Any:
        """What :meth:`Replica.rendezvous` returns: the replica's share of the meeting's results."""
        if _thread.group is not self or (self._backward_may and _checkpointed()):
            raise RuntimeError(
                f"{arrival.layer} of {self.names[rank]}: expected to run in the forward of its "
                "replica, once, got a call from elsewhere or from a checkpoint; a replica's "
                "synchronised layers cannot be called by threads of its own, or again in backward "
                "by activation checkpointing: put the checkpoint around the whole DataParallel, "
                "with use_reentrant=True (the other form saves no memory there)"
            )
        self._events.put((rank, arrival))
        answer = self._answers[rank].get()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _serve(self, rank: int, function: Callable[[], Any]) -> None:
        _thread.group, _thread.replica = self, Replica(self, rank)
        recompute_here(self._recomputing)
        try:
            self._results[rank] = function()
        except _Ended:
            pass
        except BaseException:
            self._failed[rank] = ExceptionWrapper(where=f"in {self.names[rank]}")  # type: ignore[no-untyped-call]
        self._events.put((rank, None))

    def _advance(self, steps: Iterable[Callable[[], None]]) -> None:
        """Take the steps that let replicas run; return when all have arrived or ended."""
        for step in steps:
            if self._failed:
                break
            step()
            self._running += 1
            if self._in_turns:
                self._take()
        while self._running:
            self._take()

    def _take(self) -> None:
        rank, arrival = self._events.get()
        self._running -= 1
        if arrival is not None:
            self._waiting[rank] = arrival

    def _bring_together(self) -> dict[int, Any]:
        """Results by rank; or the exception that ends the first of those who wait."""
        arrivals = [self._waiting[rank] for rank in sorted(self._waiting)]
        first = min(self._waiting)
        if len(arrivals) < len(self.names) or len({arrival.layer for arrival in arrivals}) > 1:
            return {first: RuntimeError(self._describe())}
        try:
            results = arrivals[0].together([arrival.value for arrival in arrivals])
        except Exception as error:
            return {first: error}
        return dict(enumerate(results))

    def _describe(self) -> str:
        places = [
            f"{name} at {self._waiting[rank].layer}" if rank in self._waiting else f"{name} done"
            for rank, name in enumerate(self.names)
        ]
        return (
            f"DataParallel: expected all {len(places)} replicas to meet at the same synchronised "
            f"layer, got {', '.join(places)}; every replica must run the same layers in the same "
            "order, whatever its share of the batch holds"
        )


class Replica(Communicator):
    """One replica's place in its group, at one layer.

    outer: ranks of which each has replicas of its own, at the same layer.
    """

    def __init__(
        self,
        group: ReplicaGroup,
        rank: int,
        layer: str = "sync_batch_norm",
        outer: Communicator | None = None,
    ) -> None:
        self._group, self._rank, self._layer = group, rank, layer
        self.outer = outer or Local()

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return len(self._group.names)

    def over(self, outer: Communicator) -> Replica:
        """The same place, among the replicas of all ranks of ``outer``."""
        return Replica(self._group, self._rank, self._layer, outer)

    def rendezvous(self, value: Any, together: Callable[[list[Any]], Sequence[Any]]) -> Any:
        """This replica's share of ``together(values of all replicas, in order)``.

        ``together`` runs once, in the thread and under the autograd modes of the group's caller;
        what it computes is differentiable with respect to every replica's tensors.
        """
        return self._group.rendezvous(self._rank, _Arrival(self._layer, value, together))

    def all_gather(self, tensor: Tensor) -> Tensor:
        gathered: Tensor = self.rendezvous(tensor, _stacks)
        return gathered

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return self.all_gather(tensor).sum(0)


class Unplaced(Communicator):
    """What a layer has that torch.nn.parallel.replicate copied: peers that it cannot reach."""

    rank, size = 0, 2

    def all_gather(self, tensor: Tensor) -> Tensor:
        raise RuntimeError(
            "SyncBatchNorm: torch.nn.DataParallel does not synchronise its replicas; use "
            "syncbn.DataParallel(module), or syncbn.convert() on the torch.nn.DataParallel"
        )

    all_reduce = all_gather


def current_replica() -> Replica | None:
    """The replica whose forward this thread runs."""
    return _thread.replica


class _Arrival(NamedTuple):
    layer: str
    value: Any
    together: Callable[[list[Any]], Sequence[Any]]


class _Ended(BaseException):
    """Unwinds a replica whose peers will not come; no Exception, which a model might catch."""


def _checkpointed() -> bool:
    """Whether this thread is in torch's activation checkpointing.

    Called again in backward, outside of any replica, sync_batch_norm could not tell whose batch it
    has. So it is refused in forward already.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None and frame.f_globals.get("__name__") != "torch.utils.checkpoint":
        frame = frame.f_back
    return frame is not None


def _stacks(tensors: list[Tensor]) -> list[Tensor]:
    return [torch.stack([other.to(own.device) for other in tensors]) for own in tensors]
