"""What comes into a model's BatchNorm layers: its moments, measured by hooks, on this rank alone.

Hooks see every kind of layer, torch's and foreign ones among them, however it normalises.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.parameter import is_lazy

from ..kernels import FLOATING, select_kernels
from ..numerics.moments import Merged
from ..step.masked import select_valid
from ..step.tracking import skips_nonfinite
from ..tensors.recomputation import recomputing
from ..tensors.storages import is_dtensor
from .freezing import is_frozen
from .inputs import input_of, mask_of
from .registry import is_candidate


def layers_with_statistics(model: nn.Module, frozen: bool = False) -> dict[str, Any]:
    """The BatchNorm layers of a model that have running statistics, by their first names.

    frozen: whether those are among them whose statistics stay.
    """
    return {
        name: layer
        for name, layer in model.named_modules()
        if is_candidate(layer)
        and (frozen or not is_frozen(layer))
        and all(getattr(layer, key, None) is not None for key in ("running_mean", "running_var"))
    }


def check_statistics(operation: str, layers: Mapping[str, Any]) -> None:
    """Refuse layers that have no numbers yet, or only a part of them."""
    for name, layer in layers.items():
        if is_lazy(layer.running_mean):
            raise ValueError(
                f"{operation}: expected initialised layers, got the lazy {name!r}, which has not "
                "seen its first input; run a batch through the model first"
            )
        if is_dtensor(layer.running_mean):
            raise TypeError(
                f"{operation}: expected plain running statistics, got a DTensor in layer {name!r}; "
                "leave the layer's buffers out of distribute_module"
            )


def counters_of(layer: nn.Module) -> list[Tensor]:
    """What counts a layer's batches."""
    counters = (layer._buffers.get(f"num_batches_{what}") for what in ("tracked", "skipped"))
    return [counter for counter in counters if counter is not None]


@contextmanager
def statistics_kept(layers: Mapping[str, Any]) -> Iterator[None]:
    """Whatever moves running statistics and counters within, they are then what they were."""
    kept = [
        (buffer, buffer.clone())
        for layer in layers.values()
        for buffer in (layer.running_mean, layer.running_var, *counters_of(layer))
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for buffer, before in kept:
                buffer.copy_(before)


@contextmanager
def measuring(operation: str, layers: Mapping[str, Any]) -> Iterator[dict[str, Merged]]:
    """Within the context, measure what comes into each of the layers in training mode.

    A checkpoint's second forward is left out. What a layer itself refuses, it refuses.
    """
    found = {name: Merged() for name in layers}
    with ExitStack() as hooks:
        for name, layer in layers.items():
            hook = _Hook(operation, name, layer, found[name])
            hooks.callback(layer.register_forward_pre_hook(hook, with_kwargs=True).remove)
        yield found


def ignore(*_: Any) -> None:
    """The hook of a copy that was made of a layer while it was measured."""


class _Hook:
    def __init__(self, operation: str, name: str, own: nn.Module, measured: Merged) -> None:
        self.operation, self.name, self.own, self.measured = operation, name, own, measured

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return ignore

    @torch.no_grad()
    def __call__(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        copied = layer is not self.own and not getattr(layer, "_is_replica", False)
        if copied or not layer.training or recomputing():
            return
        x = input_of(layer, args, kwargs)
        if is_dtensor(x):
            raise TypeError(
                f"{self.operation}: expected plain tensors as input of layer {self.name!r}, got a "
                "DTensor; give the layer input.to_local()"
            )
        if not _is_fit(layer, x):
            return
        mask, x = mask_of(layer, args, kwargs, x), x.detach()
        x = x if mask is None else select_valid(x, mask)[0]
        packed = select_kernels(x).steps.measure(x)
        if skips_nonfinite(layer):
            packed = torch.where(packed.isfinite().all(), packed, 0)
        self.measured.add(packed)


def _is_fit(layer: Any, x: Any) -> bool:
    if not isinstance(x, Tensor) or x.dtype not in FLOATING or x.dim() < 2:
        return False
    return bool(x.shape[1] == layer.running_mean.numel() > 0)
