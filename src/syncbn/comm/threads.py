"""Ranks that are threads of this process: tests, simulations, debuggers, no processes to launch."""

from __future__ import annotations

import torch
from torch import Tensor

from .base import check_timeout
from .framed import Framed
from .graphs import take_name
from .rounds import Rounds
from .waiting import Notes


def threads(world_size: int, *, timeout: float = 300.0) -> list[Threads]:
    """One communicator per rank, for ranks that are threads of this process.

    Every thread takes one, gives it to layers of its own (``process_group=comm``) and runs its own
    forward *and* backward: CPU backward runs in the thread that calls it. Under ``with comm:`` a
    thread that raises or leaves the block ends the others at once; without, they end after
    ``timeout``, or a second after one has raised in a layer. Sums are taken in the order of ranks,
    so results don't depend on who comes first.

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
    group = Rounds(world_size, timeout)
    return [Threads(group, rank) for rank in range(world_size)]


class Threads(Framed):
    """One rank of :func:`threads`.

    As a context manager, ``with comm:`` around all that a rank's thread runs, it ends the group
    when the block raises, and when it leaves while others still call. Whoever enters again waits
    until all ranks have left.
    """

    def __init__(self, group: Rounds, rank: int) -> None:
        self._group, self._rank = group, rank
        take_name(self)

    @property
    def rank(self) -> int:
        return self._rank

    @property
    def size(self) -> int:
        return self._group.size

    def __repr__(self) -> str:
        return f"Threads(rank={self.rank}, size={self.size})"

    def _send(self, tensor: Tensor, operation: str) -> Tensor:
        return self._group.meet(self, operation, tensor)

    def _reduce(self, tensor: Tensor, operation: str) -> Tensor:
        return self._group.meet(self, operation, tensor, lambda all_: torch.stack(all_).sum(0))

    def _check(self, operation: str, tensor: Tensor) -> None:
        self._group.check(self.rank, operation, tensor)

    def _name(self) -> str:
        return "syncbn.comm.threads"

    def _notes(self) -> Notes:
        return self._group

    def _members(self) -> tuple[str, None]:
        return str(self._group.number), None

    def abort(self, reason: str) -> None:
        """End the group: every rank's collective, waiting or to come, raises with ``reason``."""
        self._group.end(f"rank {self.rank} aborted: {reason}")

    def __enter__(self) -> Threads:
        self._group.enter(self.rank)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> None:
        if kind is None:
            self._group.leave_block(self.rank)
        else:
            self._group.end(f"rank {self.rank} raised {kind.__name__}: {error}")
