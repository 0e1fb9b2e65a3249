"""spikingjelly: https://github.com/fangwei123456/spikingjelly, activation_based/layer

In step mode "m" layers flatten (T, N, C, *) to (T·N, C, *): every step of every sample counts.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ...layers import modules
from ...layers.modules import SyncBatchNorm
from .rules import Rule

_PATHS = "spikingjelly.activation_based.layer.bn", "spikingjelly.activation_based.layer"


def _flattened(layer: Any, input: Any) -> Any:
    steps = isinstance(input, Tensor) and layer.step_mode == "m" and input.dim() > 2
    return input.flatten(0, 1) if steps else input


def _rule(name: str, base: type[SyncBatchNorm], *needs: str) -> Rule:
    sources = tuple(f"{path}.{name}" for path in _PATHS)
    return Rule(sources, base, keeps=True, needs=("step_mode", *needs), view=_flattened)


RULES = tuple(
    rule
    for dims in (1, 2, 3)
    for rule in (
        _rule(f"BatchNorm{dims}d", getattr(modules, f"SyncBatchNorm{dims}d")),
        _rule(f"ThresholdDependentBatchNorm{dims}d", SyncBatchNorm, "alpha", "v_th"),
        _rule(f"TemporalEffectiveBatchNorm{dims}d", SyncBatchNorm, "scale"),
    )
)
