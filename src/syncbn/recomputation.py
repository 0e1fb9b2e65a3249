"""Activation checkpointing runs a forward again, inside backward: running statistics move once."""

from __future__ import annotations

import torch
from torch import Tensor

Statistics = tuple[Tensor | None, Tensor | None, Tensor | None]


def moving(statistics: Statistics, momentum: float | None) -> tuple[Statistics, float | None]:
    """What a forward in training is to move, and by how much; then call :func:`settle`.

    A second forward runs the same operations, as checkpointing demands, but moves by nothing. A
    compiled graph that was traced in the first forward runs in the second, too. So it moves
    copies, and asks whenever it runs whether to keep them.
    """
    if torch.compiler.is_compiling():
        if torch.compiler.is_exporting():
            return statistics, momentum
        mean, var, batches = (None if t is None else t.detach().clone() for t in statistics)
        return (mean, var, batches), momentum
    if recomputing():
        mean, var, _ = statistics
        return (mean, var, None), 0.0
    return statistics, momentum


def settle(statistics: Statistics, moved: Statistics) -> None:
    """Give ``statistics`` the values of ``moved``, unless those are of a second forward."""
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting():
        return
    for old, new in zip(statistics, moved, strict=True):
        if old is not None and new is not None:
            old.copy_(torch.where(_first_forward(old.device), new, old))


def recomputing() -> bool:
    """Whether backward is running: a forward inside it is a second one."""
    return torch._C._current_graph_task_id() != -1


@torch.library.custom_op("syncbn::first_forward", mutates_args=())
def _first_forward(device: torch.device) -> Tensor:
    """A bool (). As an operator it is asked when a graph runs, not when it is traced."""
    return torch.full((), not recomputing(), device=device)


@_first_forward.register_fake
def _(device: torch.device) -> Tensor:
    return torch.empty((), dtype=torch.bool, device=device)
