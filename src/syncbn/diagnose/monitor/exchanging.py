"""How ranks exchange what they observed, and what an exchange costs between them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ...comm import Caller, Communicator, Framed, are_many
from ...comm.errors import DesyncError
from ...comm.words import told
from ...numerics.moments import wide_dtype

_CALLER = Caller("observation", "syncbn.Monitor", named=True)
_SIZES = (64, 8192)  # numbers: about those of the smallest and the largest layers
_ROUNDS = 5  # of which the first, which waits for the latest rank, does not count


@dataclass(frozen=True)
class ExchangeTime:
    """Seconds of one exchange: ``base``, and ``each`` for every number that a rank sends.

    forward: exchanges of a layer's forward.
    """

    base: float = 0.0
    each: float = 0.0
    forward: int = 1

    def of_layer(self, channels: int) -> float:
        """Seconds that a synchronised layer's step exchanges: in forward 2C numbers, or C and 2C
        in two; in backward 2C in one.
        """
        return (self.forward + 1) * self.base + self.each * (self.forward + 3) * channels


def gather(comm: Communicator, numbers: Tensor) -> Tensor:
    """Every rank's numbers (W, n). Ranks out of step read that a Monitor called."""
    if isinstance(comm, Framed):
        return comm.gather(numbers, _CALLER, 0).rows
    return comm.all_gather(numbers)


def add(comm: Communicator, numbers: Tensor) -> Tensor:
    """The same for the sum of them (n,)."""
    if isinstance(comm, Framed):
        return comm.reduce(numbers, _CALLER, 0).rows
    return comm.all_reduce(numbers)


def measure_exchange(comm: Communicator, device: torch.device) -> ExchangeTime:
    """The median of a few exchanges of two sizes. Every rank must make this call; waits for it."""
    if comm.size == 1:
        return ExchangeTime()
    small, large = (_median(comm, device, size) for size in _SIZES)
    each = max(0.0, (large - small) / (_SIZES[1] - _SIZES[0]))
    forward = 2 if are_many(comm.size) else 1
    return ExchangeTime(max(0.0, small - each * _SIZES[0]), each, forward)


def _median(comm: Communicator, device: torch.device, size: int) -> float:
    numbers = torch.zeros(size, dtype=wide_dtype(device), device=device)
    times, send = [], add if are_many(comm.size) else gather
    for _ in range(_ROUNDS):
        start = time.perf_counter()
        send(comm, numbers)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return middle_of(times[1:])


def middle_of(times: Sequence[float]) -> float:
    """The median, or the upper of two. (The module statistics takes long to import.)"""
    return sorted(times)[len(times) // 2]


def check_step(comm: Communicator, device: torch.device, step: int, every: int) -> None:
    """Raise DesyncError, on all ranks alike, where they observe different steps.

    The message also goes ahead of a much larger one: a layer's frames have room for what followed
    them in the step before.
    """
    here = torch.tensor([step, every], dtype=wide_dtype(device), device="cpu")
    said = gather(comm, here.to(device, non_blocking=True))
    if said.is_cpu and bool((said != said[0]).any()):  # a device is not waited for
        texts = {
            rank: f"step {int(step)}, every {int(every)}"
            for rank, (step, every) in enumerate(said.tolist())
        }
        raise DesyncError(
            f"Monitor: ranks observe different steps: {told(texts)}; make it on all ranks at the "
            "same step, with the same every=, and call the model equally often on all",
            ranks=texts,
        )
