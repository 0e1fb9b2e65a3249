"""What explains a difference: what the layers are, and what they do inside."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._python_dispatch import TorchDispatchMode

from ...batches.empty import own_forward
from ...comm import resolve
from ...layers.modules import SyncBatchNorm
from ...models.registry import is_candidate, target_of
from .capture import Capture

_HALF = (torch.float16, torch.bfloat16)


def facts_of(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Of every module: its class, its mode, and for batch norms whether they synchronise."""
    return {name: _facts(module) for name, module in model.named_modules()}


def _facts(module: nn.Module) -> dict[str, Any]:
    own = [*module.parameters(recurse=False), *module.buffers(recurse=False)]
    facts: dict[str, Any] = {
        "kind": type(module).__name__,
        "class": f"{type(module).__module__}.{type(module).__qualname__}",
        "training": module.training,
        "leaf": bool(own) or not any(True for _ in module.children()),
        "norm": is_candidate(module),
    }
    if isinstance(module, SyncBatchNorm):
        world = dist.get_world_size() if dist.is_initialized() else 1
        facts |= {"group": resolve(module.process_group).size, "world": world}
    elif isinstance(module, _BatchNorm):
        alone = target_of(type(module)) is None or own_forward(module) is not None
        facts |= {"left_alone": alone, "torch_sync": isinstance(module, nn.SyncBatchNorm)}
    return facts


class Observations(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Which operators that explain differences ran directly in which module.

    ``seen``: name → {"random" | "half" | "batch_norm": the first such operator's name}.
    """

    def __init__(self, capture: Capture) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.seen: dict[str, dict[str, str]] = {}
        self._capture = capture

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = self._capture.running[-1] if self._capture.stack else ""
        operator = func.overloadpacket.__name__
        if torch.Tag.nondeterministic_seeded in func.tags and not _without_effect(func, args):
            self._see(name, "random", operator)
        if isinstance(result, torch.Tensor) and result.dtype in _HALF:
            self._see(name, "half", f"{operator} in {str(result.dtype).partition('.')[2]}")
        if "batch_norm" in operator:
            self._see(name, "batch_norm", operator)
        return result

    def _see(self, name: str, what: str, operator: str) -> None:
        self.seen.setdefault(name, {}).setdefault(what, operator)


def _without_effect(func: Any, args: Any) -> bool:
    """A dropout of probability 0, or in eval mode."""
    names = [argument.name for argument in func._schema.arguments]
    given = dict(zip(names, args, strict=False))
    return given.get("p", given.get("dropout_p", 1)) == 0 or given.get("train") is False
