"""Communicator: who takes part, and two collectives. Nothing else.

What a caller may rely on and an implementer owes; tests/support/contract.py holds every one of them
to it.

- **Blocking.** A collective returns when its result may be used by the next operation on the
  caller's device stream. On the CPU that means: when the result is there. It may return before
  the other ranks have theirs; it is no barrier for anything but its own numbers.
- **Ordering.** Every rank calls the same collectives in the same order, with tensors of the same
  shape and dtype. An implementation may assume it and need not match calls by name. One that
  notices otherwise raises, on every rank. Communicators are independent of each other: ranks may
  interleave the calls on several, again all in one order.
- **Ownership.** The argument may have any strides, is not modified, and is not kept: its owner may
  overwrite it as soon as the call returns, before the other ranks' calls do. The result is a new
  tensor that belongs to the caller, shared with no other rank.
- **Determinism.** Every rank receives the same bits. all_gather passes bits on as they are;
  all_reduce adds in the argument's dtype, in an order that doesn't depend on who comes first.
- **Failure.** A peer that is gone ends the call with an exception: at once where the engine
  notices, else after the engine's timeout. It names the operation and what is known of the peers.
  After it the communicator is of no use; an implementation must not let later calls meet the
  wrong partners. An engine may end the whole job instead (MPI).
- **Threads.** Calls on one communicator come one at a time, but not always from the same thread:
  torch runs backward in the caller's thread on the CPU, in a thread of its own for other devices.
- **Lifetime.** A communicator is usable as long as the engine under it is. It owns no threads and
  needs no closing. It is neither copied nor pickled, alone or with a layer: ``copy.deepcopy``
  returns the communicator itself, pickle is refused.
- **Equality.** Two communicators over the same ranks of the same engine may compare equal; hash
  accordingly. The default, identity, is right where in doubt.

``rank`` and ``size`` are constant, cheap and never communicate: layers ask in every step.

Tensors are small (O(channels)), of any floating dtype, on the device of the layer's input, and may
be empty. Calls come from inside autograd functions, so collectives need no derivative.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from typing import NoReturn

    from typing_extensions import Self


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
        """Every rank's tensor (*), stacked in the order of ranks: (size, *), of the same dtype."""

    @abstractmethod
    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum over ranks of their tensors (*): (*), of the same dtype."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        return self

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{type(self).__name__}: a communicator belongs to its process and cannot be pickled; "
            "construct one where it is needed"
        )


class Local(Communicator):
    """One rank alone: its collectives are identities and no message is sent."""

    rank = 0
    size = 1

    def all_gather(self, tensor: Tensor) -> Tensor:
        return tensor.clone().unsqueeze(0)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        return tensor.clone()


def described(operation: str, shape: Sequence[int], dtype: torch.dtype) -> str:
    """A call, as errors name it: ranks' calls agree where their descriptions do."""
    return f"{operation} of {tuple(shape)} {str(dtype).removeprefix('torch.')}"


def check_timeout(operation: str, timeout: float) -> None:
    """Refuse what threads cannot wait for: no seconds, or too many."""
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(
            f"{operation}: expected a number of seconds as timeout, got {type(timeout).__name__}"
        )
    if not 0 < timeout <= threading.TIMEOUT_MAX:
        raise ValueError(
            f"{operation}: expected 0 < timeout ≤ {threading.TIMEOUT_MAX:g}, got {timeout}; it is "
            "in seconds, of waiting for the other ranks"
        )
