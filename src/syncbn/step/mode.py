"""In which of torch's modes a call runs, asked in one place, once per forward and per backward."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..tensors.transforms import batched_or_transforming, exporting, transforming


class Mode(NamedTuple):
    """tracing: torch.jit.trace; compiling: torch.compile or export; exporting: the latter alone.

    transforming: within torch.func or forward mode, which is asked in training only.
    silent: nothing may be sent: eval mode, a trace, an export, or no values (the meta device).
    """

    tracing: bool
    compiling: bool
    exporting: bool
    transforming: bool
    silent: bool


# The usual ones need not be made in every call.
_TRAINING = Mode(False, False, False, transforming=False, silent=False)
_EVAL = Mode(False, False, False, transforming=False, silent=True)


def find_mode(input: Tensor, training: bool) -> Mode:
    """The mode of a forward. input: whatever a user gave as that."""
    compiling = torch.compiler.is_compiling()
    tracing: bool = not compiling and torch._C._is_tracing()
    within = training and transforming()
    meta = isinstance(input, Tensor) and input.is_meta
    if not (tracing or compiling or within or meta):
        return _TRAINING if training else _EVAL
    exported = compiling and exporting()
    silent = not training or tracing or exported or meta
    return Mode(tracing, compiling, exported, within, silent)


class BackwardMode(NamedTuple):
    """differentiable: gradients are to be differentiated again (create_graph), or mapped.

    transforming: within a transform, which takes torch's own operators only.
    """

    compiling: bool
    differentiable: bool
    transforming: bool


_COMPILED = BackwardMode(True, False, False)


def find_backward_mode(dys: Sequence[Tensor]) -> BackwardMode:
    """The mode of a backward that was given dys, of which some may be zeros that stand for none."""
    if torch.compiler.is_compiling():
        return _COMPILED
    within = any(batched_or_transforming(dy) for dy in dys)
    return BackwardMode(False, within or torch.is_grad_enabled(), within)


def is_differentiable(dy: Tensor) -> bool:
    """The same as the mode's, where nothing compiles."""
    return torch.is_grad_enabled() or batched_or_transforming(dy)
