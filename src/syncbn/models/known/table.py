"""All rules, by the qualified names of the classes that they are for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib import import_module
from operator import attrgetter

import torch.nn as nn

from ...layers.modules import SyncBatchNorm
from . import (
    apex,
    detectron2,
    inplace_abn,
    openmmlab,
    sparse,
    spikingjelly,
    timm,
    torch_geometric,
    torchvision,
)
from .rules import Rule

_ALL = (
    *(*apex.RULES, *detectron2.RULES, *inplace_abn.RULES, *openmmlab.RULES, *sparse.RULES),
    *(*spikingjelly.RULES, *timm.RULES, *torch_geometric.RULES, *torchvision.RULES),
)
_RULES = {source: rule for rule in _ALL for source in rule.sources}
_FROZEN = frozenset((*detectron2.FROZEN, *timm.FROZEN, *torchvision.FROZEN))
_ALONE = apex.ALONE | torch_geometric.ALONE
_HOLDERS = torch_geometric.HOLDERS


def rule_of(cls: type) -> Rule | None:
    """The rule for this very class, not for those that derive from it."""
    return _RULES.get(f"{cls.__module__}.{cls.__qualname__}")


def is_frozen_class(cls: type) -> bool:
    """Whether its layers normalise by fixed numbers: there is nothing to synchronise."""
    return any(name in _FROZEN for name in _names(cls))


def why_alone(cls: type) -> str:
    """ "" or why layers of a class that has statistics can become none of ours."""
    return next((_ALONE[name] for name in _names(cls) if name in _ALONE), "")


def held_back(model: nn.Module) -> dict[nn.Module, str]:
    """Layers whose holders don't always call them, each with the reason to leave it alone."""
    found: dict[nn.Module, str] = {}
    for module in model.modules():
        for name in _names(type(module)):
            if name in _HOLDERS and (why := _HOLDERS[name](module)):
                found |= dict.fromkeys(module.children(), why)
    return found


def target_named(attribute: str) -> type[SyncBatchNorm] | None:
    """The class that pickles name syncbn.<attribute>; its library is imported, as it is needed."""
    for rule in _ALL:
        for source in rule.sources if rule.keeps or rule.front is not None else ():
            if rule.attribute(source) == attribute:
                path, _, name = source.rpartition(".")
                try:
                    found = attrgetter(name)(sys.modules.get(path) or import_module(path))
                except (ImportError, AttributeError):
                    return None
                return rule.target(found)
    return None


def _names(cls: type) -> Iterator[str]:
    return (f"{base.__module__}.{base.__qualname__}" for base in cls.__mro__)
