"""In which of torch's modes a call runs, asked in one place, once per forward and per backward."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..tensors.transforms import batched_or_transforming, transforming


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


def find_mode(input: Tensor, training: bool) -> Mode:
    """The mode of a forward. input: whatever a user gave as that."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    compiling = torch.compiler.is_compiling()
    exporting = compiling and torch.compiler.is_exporting()
    silent = not training or tracing or exporting or (isinstance(input, Tensor) and input.is_meta)
    return Mode(tracing, compiling, exporting, training and transforming(), silent)


class BackwardMode(NamedTuple):
    """differentiable: gradients are to be differentiated again (create_graph), or mapped.

    transforming: within a transform, which takes torch's own operators only.
    """

    compiling: bool
    differentiable: bool
    transforming: bool


def find_backward_mode(dy: Tensor) -> BackwardMode:
    """The mode of a backward that was given dy."""
    if torch.compiler.is_compiling():
        return BackwardMode(True, False, False)
    within = batched_or_transforming(dy)
    return BackwardMode(False, within or torch.is_grad_enabled(), within)
