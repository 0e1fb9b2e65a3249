"""inplace_abn: https://github.com/mapillary/inplace_abn/blob/main/inplace_abn/abn.py"""

from __future__ import annotations

from typing import Any

from ...layers.modules import SyncBatchNorm
from .fronts import ACTIVATIONS, Activated, Invertible
from .rules import Rule


def _check(layer: Any) -> str:
    if layer.activation in ACTIVATIONS:
        return ""
    return f"expected an activation of {', '.join(ACTIVATIONS)}, got {layer.activation!r}"


def _rule(name: str, front: type, group: str = "") -> Rule:
    needs = "activation", "activation_param"
    return Rule(
        (f"inplace_abn.abn.{name}",),
        SyncBatchNorm,
        keeps=True,
        front=front,
        needs=(*needs, *([group] if group else [])),
        group=group,
        check=_check,
    )


RULES = (
    _rule("ABN", Activated),
    _rule("InPlaceABN", Invertible),
    _rule("InPlaceABNSync", Invertible, group="group"),
)
