"""The batch norms of a model that a Monitor watches."""

from __future__ import annotations

import weakref
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch.nn.parameter import is_lazy

from ...batches.empty import closed
from ...models.names import names_of_modules
from ...models.registry import is_candidate

_PREFIXES = ("module.", "_orig_mod.")  # of DistributedDataParallel and torch.compile


class Layer(NamedTuple):
    """names: all that it has in the model. eps: see :class:`syncbn.SyncBatchNorm`."""

    names: tuple[str, ...]
    channels: int
    eps: float
    module: weakref.ref[nn.Module]

    @property
    def name(self) -> str:
        """The first, as rows and pictures show it."""
        return self.names[0] or "(the model itself)"


def find_layers(model: nn.Module) -> list[Layer]:
    """The batch norms that hooks can see, in the model's order.

    Raises ValueError where there are none, or one does not know its number of channels yet.
    """
    inside = {part for module in model.modules() if closed(module) for part in module.modules()}
    norms = {
        module: names
        for module, names in names_of_modules(model).items()
        if is_candidate(module) and hasattr(module, "num_features")
    }
    if not norms:
        raise ValueError(
            "Monitor: expected a model with batch norms (torch.nn.BatchNorm*, SyncBatchNorm, or "
            f"syncbn's layers), got none in {type(model).__name__}; layers such as GroupNorm have "
            "no statistics of a batch"
        )
    seen = {module: names for module, names in norms.items() if module not in inside}
    if not seen:
        raise ValueError(
            f"Monitor: expected batch norms that run in eager mode, got {len(norms)} inside what "
            "torch.compile or torch.jit compiled, where no hook runs; give the Monitor the model "
            "that was compiled, and run that one for the steps that are to be observed"
        )
    return [_layer(tuple(names), module) for module, names in seen.items()]


def find_layer(layers: Sequence[Layer], name: str, module: nn.Module) -> Layer:
    """The one that is ``module``, else has its name, but for what wrappers put before it.

    Raises ValueError where there is none.
    """
    for layer in layers:
        if layer.module() is module:
            return layer
    for layer in layers:
        if _bare(name) in map(_bare, layer.names):
            return layer
    names = ", ".join(repr(layer.names[0]) for layer in layers)
    raise ValueError(
        f"Monitor.where: expected a layer of the model that was monitored, got {name!r} "
        f"({type(module).__name__}); it knows {names}"
    )


def _bare(name: str) -> str:
    while name.startswith(_PREFIXES):
        name = name.partition(".")[2]
    return name


def _layer(names: tuple[str, ...], module: Any) -> Layer:
    if any(map(is_lazy, (*module.parameters(), *module.buffers()))):
        raise ValueError(
            f"Monitor: expected layers that know their channels, got {type(module).__name__} "
            f"{names[0]!r}, which has seen no input; run the model once before"
        )
    return Layer(names, module.num_features, module.eps, weakref.ref(module))


def home_of(model: nn.Module) -> torch.device:
    """The device of the model's first parameter or buffer."""
    for tensors in (model.parameters(), model.buffers()):
        for tensor in tensors:
            return tensor.device
    return torch.device("cpu")
