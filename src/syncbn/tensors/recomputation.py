"""Activation checkpointing runs a forward again, inside backward: running statistics move once.

In the first forward, unless that one is told not to track them, as fairscale's checkpoint_wrapper
does because torch's own layers would move twice: then the second forward owes the move.
"""

from __future__ import annotations

import threading
from collections.abc import MutableMapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from .operators import define
from .storages import check_held
from .transforms import exporting


class _Thread(threading.local):
    recomputing = False


_thread = _Thread()
# running_mean → how many forwards, of checkpoints as far as one can tell, were told not to move it:
# as many second ones may
_owed: MutableMapping[Tensor, int] = WeakTensorKeyDictionary()
_entries: dict[object, int] = _owed.data  # type: ignore[attr-defined]  # tells sooner if there are any


def recomputing() -> bool:
    """Whether backward is running: a forward inside it is a second one."""
    return torch._C._current_graph_task_id() != -1 or _thread.recomputing


def recompute_here(again: bool) -> None:
    """Tell a thread that works for another one whether that one is :func:`recomputing`."""
    _thread.recomputing = again


def moves(running_mean: Tensor | None) -> bool:
    """Whether a forward that is told to track moves the statistics. To be asked once by each."""
    if not recomputing():
        if _entries and running_mean is not None and _in_checkpoint():
            _owed.pop(running_mean, None)  # or this one's second forward would be taken for theirs
        return True
    if running_mean is None or running_mean not in _owed:
        return False
    _owed[running_mean] -= 1
    if not _owed[running_mean]:
        del _owed[running_mean]
    return True


def withhold(running_mean: Tensor, num_batches_tracked: Tensor | None) -> None:
    """Note that a forward in training is told not to track these statistics."""
    if torch.compiler.is_compiling():
        if num_batches_tracked is not None and not (exporting() or torch.is_grad_enabled()):
            _withhold_in_graph(running_mean, num_batches_tracked)
    elif not recomputing() and _in_checkpoint():
        _owed[running_mean] = _owed.get(running_mean, 0) + 1


def _in_checkpoint() -> bool:
    """Whether this may be a checkpoint's first forward: nothing is saved, or hooks save it."""
    hooked: bool = torch._C._autograd._top_saved_tensors_default_hooks(True) is not None
    return hooked or not torch.is_grad_enabled()


def moves_in_graph(statistics: dict[str, Tensor], saves: bool) -> list[Tensor]:
    """:func:`moves` of the first one as a bool (), and copies of all, which must be held.

    Both when a graph runs, not when it is traced. saves: whether gradients were enabled when it was
    traced; while it runs they may not be.
    """
    found: list[Tensor] = torch.ops.syncbn.moves.default(
        list(statistics.values()), list(statistics), saves
    )
    return found


def _moves(statistics: list[Tensor], names: list[str], saves: bool) -> list[Tensor]:
    check_held(dict(zip(names, statistics, strict=True)))
    with torch.set_grad_enabled(saves):
        first = torch.full((), moves(statistics[0]), device=statistics[0].device)
    return [first, *(tensor.clone() for tensor in statistics)]


def _shapes(statistics: list[Tensor], *_: Any) -> list[Tensor]:
    first = torch.empty((), dtype=torch.bool, device=statistics[0].device)
    return [first, *(torch.empty_like(tensor) for tensor in statistics)]


define("moves(Tensor[] statistics, str[] names, bool saves) -> Tensor[]", _moves, _shapes)


# A graph leaves out an operator that changes nothing: this one says that it changes the counter.
@torch.library.custom_op("syncbn::withhold", mutates_args=("num_batches_tracked",))
def _withhold_in_graph(running_mean: Tensor, num_batches_tracked: Tensor) -> None:
    with torch.no_grad():  # as when it was traced
        withhold(running_mean, None)
