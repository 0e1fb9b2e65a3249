"""What torch.compile's backend, inductor, does not see in torch's own operations.

It asks operators for shapes before it compiles them: their lowerings are made known then.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any


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
