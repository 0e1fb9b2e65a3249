"""Says so where another library's conversion replaces this package's layers in a model."""

from __future__ import annotations

import warnings
from typing import Any

import torch
import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.module import register_module_module_registration_hook

_hooks: list[Any] = []  # one, from the first layer on
# Plain layers in a synchronised one's place are a revert by hand, for export for example.
_PLAIN = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)


class Watched(_BatchNorm):
    """A layer that :func:`watch_replacements` tells of."""


def watch_replacements() -> None:
    """Warn from now on where another synchronised batch norm takes such a layer's place and state.

    torch's ``convert_sync_batchnorm`` takes ours for plain batch norms and asks nobody; so do
    timm's and Lightning's, which end in torch's class, and apex's ``convert_syncbn_model``. A new
    layer with a new state is meant. Not seen: a single layer that is converted by itself, as no
    module takes what comes of it; and classes that are no _BatchNorm of torch's.
    """
    if not _hooks and not torch.compiler.is_compiling():  # no graph registers hooks
        _hooks.append(register_module_module_registration_hook(_look))


def _look(parent: nn.Module, name: str, new: nn.Module | None) -> None:
    if not isinstance(new, _BatchNorm) or isinstance(new, Watched) or type(new) in _PLAIN:
        return
    old = parent._modules.get(name)
    if not isinstance(old, Watched) or not _takes_over(old, new):
        return
    kind, torchs = type(new), isinstance(new, nn.SyncBatchNorm)
    shown = "torch.nn.SyncBatchNorm" if torchs else f"{kind.__module__}.{kind.__qualname__}"
    calls = "convert_sync_batchnorm and Trainer(sync_batchnorm=True)" if torchs else "conversions"
    theirs = "torch's" if torchs else "the others"
    warnings.warn(
        f"{shown}: is replacing syncbn's layers, as {calls} do; leave that call or flag out to "
        f"keep syncbn's, or syncbn.revert the model first for {theirs}",
        stacklevel=3,  # the conversion's line: one location, so that many layers warn once
    )


def _takes_over(old: Any, new: Any) -> bool:
    """Whether new has old's very state, or, where both have none, the same options."""
    state = [
        (getattr(old, name, None), getattr(new, name, None)) for name in ("weight", "running_mean")
    ]
    if any(mine is not None for pair in state for mine in pair):
        return any(mine is not None and mine is theirs for mine, theirs in state)
    names = ("num_features", "eps", "momentum")
    return all(getattr(old, name, None) == getattr(new, name, None) for name in names)
