"""The names of a model's modules: one that is shared has several."""

from __future__ import annotations

import torch.nn as nn


def names_of_modules(model: nn.Module) -> dict[nn.Module, list[str]]:
    """All names of each module, in the order of named_modules(), which gives only the first."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def described(name: str, layer: nn.Module) -> str:
    """A layer, as warnings name it."""
    cls = type(layer)
    return f"{name or 'the module itself'} ({cls.__module__}.{cls.__qualname__})"
