"""Communicator: who takes part, and two collectives. Nothing else.

What an implementer owes, and a caller may rely on:

- **Blocking.** A collective returns when its result may be used by the next operation on the
  caller's device stream. On the CPU that means: when the result is there.
- **Ordering.** Every rank calls the same collectives in the same order, with tensors of the same
  shape and dtype. An implementation may assume it and need not match calls by name.
- **Ownership.** The argument is not modified and not kept; the result is a new tensor that belongs
  to the caller.
- **Determinism.** Every rank receives the same bits.
- **Failure.** A peer that is gone ends the call with an exception, or the whole job where the engine
  sees to that (MPI).
- **Lifetime.** A communicator is usable as long as the engine under it is. It owns no threads and
  needs no closing.

Tensors are small (O(channels)), of a floating dtype, on the device of the layer's input, and may
be empty.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor


class Communicator(ABC):
    """The ranks that normalise together, as one of them sees it."""

    @property
    @abstractmethod
    def rank(self) -> int:
        """This rank, 0 ≤ rank < size."""

    @property
    @abstractmethod
    def size(self) -> int:
        """How many ranks take part, at least one."""

    @abstractmethod
    def all_gather(self, tensor: Tensor) -> Tensor:
        """Every rank's tensor (*), stacked in the order of ranks: (size, *)."""

    @abstractmethod
    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over ranks of their tensors (*): (*)."""


class Local(Communicator):
    """One rank alone: its collectives are identities and no message is sent."""

    rank = 0
    size = 1

    def all_gather(self, tensor: Tensor) -> Tensor:
        return tensor.clone().unsqueeze(0)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor.clone()
