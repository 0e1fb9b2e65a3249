"""Which layer a call is of, in words that are the same on every rank.

A layer that convert() met is known by its name in that model. Another has a number: ranks that make
the same layers in the same order give them the same ones.
"""

from __future__ import annotations

from itertools import count

import torch
import torch.nn as nn

_numbers = count(1)


def take_number(layer: nn.Module) -> None:
    """Give a layer a number, unless it is known by something."""
    if "_identity" not in vars(layer):
        vars(layer)["_identity"] = next(_numbers)


def take_name(layer: nn.Module, name: str) -> None:
    """Let a layer be known by its name in a model. It has none where it is the model itself."""
    if name and vars(layer).get("_identity") != name:
        vars(layer)["_identity"] = name
    take_number(layer)


def identity_of(layer: nn.Module | None) -> str:
    """A layer's name, or class and number. None: a call of sync_batch_norm without a layer."""
    if layer is None:
        return "sync_batch_norm"
    # What a graph reads it is made anew for: a block that is compiled once serves many layers.
    if torch.compiler.is_compiling():
        return f"a compiled {type(layer).__name__}"
    found = vars(layer)["_identity"]
    return found if isinstance(found, str) else f"{type(layer).__name__} {found}"
