"""What graphs are told beside torch's operations: what to write to memory, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .inductor import lower
from .operators import define
from .storages import is_dtensor
from .transforms import exporting, transforming


def computed_once(*tensors: Tensor) -> Sequence[Tensor]:
    """The tensors, which a graph is to write to memory: numbers per channel.

    Else inductor computes them anew for each value of the tensors that they meet, and a division of
    float64 takes as long as many values of memory do.
    """
    if not torch.compiler.is_compiling() or transforming() or not _takes_operators(tensors):
        return tensors
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return tensors  # steps that somebody else's graph differentiates; the operator has no rule
    written: Sequence[Tensor] = torch.ops.syncbn.computed.default(list(tensors))
    return written


def after(first: Tensor, copied: Sequence[Tensor]) -> Sequence[Tensor]:
    """Copies of tensors in a graph, once there is another, which the graph leaves out where nothing
    depends on it, with the message that brings it.
    """
    if not _takes_operators(copied):
        return [tensor.clone() for tensor in copied]
    copies: Sequence[Tensor] = torch.ops.syncbn.after.default(first, list(copied))
    return copies


def _takes_operators(tensors: Sequence[Tensor]) -> bool:
    """Whether a graph may have operators of ours: no DTensors, nor a program without syncbn."""
    return not (exporting() or any(map(is_dtensor, tensors)))


def _clones(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [tensor.clone() for tensor in tensors]


def _shapes(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.empty_like(tensor) for tensor in tensors]


def _computed_shapes(tensors: Sequence[Tensor]) -> list[Tensor]:
    lower(torch.ops.syncbn.computed.default, _realise)
    return _shapes(tensors)


def _realise(_: Any) -> Callable[..., Any]:
    def lowered(tensors: Sequence[Any]) -> Sequence[Any]:
        for tensor in tensors:
            tensor.realize()
        return tensors

    return lowered


define("computed(Tensor[] tensors) -> Tensor[]", _clones, _computed_shapes)
define(
    "after(Tensor first, Tensor[] copied) -> Tensor[]",
    lambda first, copied: _clones(copied),
    lambda first, copied: _shapes(copied),
)
