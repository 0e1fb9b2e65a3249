"""What torch.compile's backend, inductor, does not see in torch's own operations.

It asks operators for shapes before it compiles them: their lowerings are made known then.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .operators import define
from .transforms import transforming


def lower(operator: Any, make: Callable[[Any], Callable[..., Any]]) -> None:
    """Let inductor, if somebody has imported it, lower an operator as ``make(its lowerings)`` does,
    which is asked once.
    """
    lowering = sys.modules.get("torch._inductor.lowering")
    if lowering is not None and operator not in lowering.lowerings:
        lowering.register_lowering(operator, type_promotion_kind=None)(make(lowering))


def input_behind(tensor: Any) -> Any:
    """The input of a graph that one of inductor's tensors is, or is a view of; else None."""
    from torch._inductor import ir

    data = tensor.data
    if isinstance(data, ir.BaseView):
        data = data.unwrap_view()
    return ir.TensorBox(data) if isinstance(getattr(data, "data", None), ir.InputBuffer) else None


def computed_once(*tensors: Tensor) -> Sequence[Tensor]:
    """The tensors, which a graph is to write to memory: numbers per channel.

    Else inductor computes them anew for each value of the tensors that they meet, and a division of
    float64 takes as long as many values of memory do.
    """
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting() or transforming():
        return tensors
    written: Sequence[Tensor] = torch.ops.syncbn.computed.default(list(tensors))
    return written


def after(first: Tensor, copied: Sequence[Tensor]) -> Sequence[Tensor]:
    """Copies of tensors in a graph, once there is another, which the graph leaves out where nothing
    depends on it, with the message that brings it.
    """
    if torch.compiler.is_exporting():
        return [tensor.clone() for tensor in copied]
    copies: Sequence[Tensor] = torch.ops.syncbn.after.default(first, list(copied))
    return copies


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
