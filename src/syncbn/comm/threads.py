"""Ranks that are threads of this process: tests, simulations, debuggers, no processes to launch."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from .base import Communicator, check_timeout, described, refused_calls


def threads(world_size: int, *, timeout: float = 300.0) -> list[Threads]:
    """One communicator per rank, for ranks that are threads of this process.

    Every thread takes one, gives it to layers of its own (``process_group=comm``) and runs its own
    forward *and* backward: CPU backward runs in the thread that calls it. Under ``with comm:`` a
    thread that raises or leaves the block ends the others at once; without, they end after
    ``timeout``. Sums are taken in the order of ranks, so results don't depend on who comes first.

    Args:
        world_size: number of ranks, at least 1. Each needs a thread of its own at the same time.
        timeout: seconds > 0 that a collective waits for the other ranks.

    Returns:
        A list of ``world_size`` communicators, in the order of ranks. They take CPU tensors.

    Raises:
        TypeError, ValueError: another ``world_size`` or ``timeout``. Collectives raise
            RuntimeError, the same on every rank: for a rank that is missing after ``timeout``,
            raised, left or called :meth:`Threads.abort`, for ranks whose calls differ, and for
            tensors that aren't on the CPU.

    Example:
        >>> from concurrent.futures import ThreadPoolExecutor
        >>> x = torch.randn(4, 3, 8, 8)
        >>> def train(comm):
        ...     layer = syncbn.SyncBatchNorm2d(3, process_group=comm)
        ...     with comm:
        ...         layer(x[2 * comm.rank : 2 * comm.rank + 2]).sum().backward()
        ...     return layer.running_var
        >>> with ThreadPoolExecutor(2) as pool:
        ...     first, second = pool.map(train, syncbn.comm.threads(2))
        >>> torch.equal(first, second)
        True
    """
    if isinstance(world_size, bool) or not isinstance(world_size, int):
        raise TypeError(f"threads: expected an int as world_size, got {type(world_size).__name__}")
    if world_size < 1:
        raise ValueError(f"threads: expected a world_size of at least 1, got {world_size}")
    check_timeout("threads", timeout)
    group = _Group(world_size, timeout)
    return [Threads(group, rank) for rank in range(world_size)]


class Threads(Communicator):
    """One rank of :func:`threads`.

    As a context manager, ``with comm:`` around all that a rank's thread runs, it ends the group
    when the block raises, and when it leaves while others still call. Whoever enters again waits
    until all ranks have left.
    """

    def __init__(self, group: _Group, rank: int) -> None:
        self._group, self._rank = group, rank

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._group.size

    def __repr__(self) -> str:
        return f"Threads(rank={self.rank}, size={self.size})"

    def all_gather(self, tensor: Tensor) -> Tensor:
        return self._group.meet(self.rank, "all_gather", tensor)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return self._group.meet(self.rank, "all_reduce", tensor)

    def abort(self, reason: str) -> None:
        """End the group: every rank's collective, waiting or to come, raises with ``reason``."""
        self._group.end(f"rank {self.rank} aborted: {reason}")

    def __enter__(self) -> Threads:
        self._group.enter(self.rank)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is None:
            self._group.leave(self.rank)
        else:
            self._group.end(f"rank {self.rank} raised {kind.__name__}: {error}")


@dataclass(eq=False)
class _Round:
    """One collective of the group: what each rank calls, and what all receive."""

    calls: dict[int, tuple[str, Tensor]] = field(default_factory=dict)
    result: Tensor | None = None


class _Group:
    """What the ranks share: the round that gathers calls, and why there will be no more."""

    def __init__(self, size: int, timeout: float) -> None:
        self.size, self.timeout = size, timeout
        self.changed = threading.Condition()  # guards all that follows
        self.round = _Round()
        self.left: set[int] = set()  # ranks that left their block while others are in theirs
        self.ended: str | None = None

    def meet(self, rank: int, operation: str, tensor: Tensor) -> Tensor:
        """This rank's part in a collective; the result, which is this rank's own."""
        with self.changed:
            self._check()
            this = self.round
            if (obstacle := self._obstacle(rank, operation, tensor)) is not None:
                self.end(obstacle)
                self._check()
            this.calls[rank] = operation, tensor.detach()
            try:
                if len(this.calls) == self.size:
                    self.round = _Round()
                    self._conclude(this)
                else:
                    self._wait(this, operation)
            except BaseException as error:  # Ctrl-C while waiting, no memory left
                self.end(f"{operation}: rank {rank} raised {type(error).__name__}: {error}")
                raise
            if this.result is None:
                self._check()
        assert this.result is not None
        return this.result.clone()

    def enter(self, rank: int) -> None:
        with self.changed:
            if not self._wait_for(lambda: rank not in self.left):
                self.end(
                    f"with: rank {rank} is back, but {self._missing(self.left)} not left within "
                    f"{self.timeout:g} s; use one block for all that a rank's thread runs"
                )
            self._check()

    def leave(self, rank: int) -> None:
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
                self.round = _Round()
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

    def _conclude(self, this: _Round) -> None:
        """The last rank to arrive works for all. The result is set when all calls agree."""
        calls = [this.calls[rank] for rank in range(self.size)]
        texts = [described(*call) for call in calls]
        if len(set(texts)) > 1:
            self.end(refused_calls(texts))
            return
        with torch.no_grad():
            gathered = torch.stack([tensor for _, tensor in calls])
            this.result = gathered if calls[0][0] == "all_gather" else gathered.sum(0)
        this.calls.clear()  # the arguments are their callers'
        self.changed.notify_all()

    def _wait(self, this: _Round, operation: str) -> None:
        if not self._wait_for(lambda: this.result is not None):
            self.end(
                f"{operation}: {self._missing(this.calls)} not arrived within "
                f"{self.timeout:g} s ({self._calls(this)}); run every rank in a thread of its own, "
                "forward and backward, under 'with comm:' so that one that raises or leaves ends "
                "the others at once, or pass a longer timeout"
            )

    def _wait_for(self, arrived: Callable[[], bool]) -> bool:
        """Whether, within the timeout, it has arrived or the group ended."""
        return self.changed.wait_for(lambda: arrived() or self.ended is not None, self.timeout)

    def _gone(self, operation: str) -> str:
        return (
            f"{operation}: {_names(self.left)} left the 'with comm:' block before the others; "
            "every rank must make as many forward and backward calls (an empty batch counts)"
        )

    def _missing(self, present: Iterable[int]) -> str:
        missing = set(range(self.size)).difference(present)
        return f"{_names(missing)} {'has' if len(missing) == 1 else 'have'}"

    def _calls(self, this: _Round) -> str:
        calls = [
            described(*this.calls[rank]) if rank in this.calls else "no call"
            for rank in range(self.size)
        ]
        return "; ".join(f"rank {rank}: {call}" for rank, call in enumerate(calls))


def _names(ranks: Iterable[int]) -> str:
    numbers = sorted(ranks)
    return f"rank{'s' if len(numbers) > 1 else ''} {', '.join(map(str, numbers))}"
