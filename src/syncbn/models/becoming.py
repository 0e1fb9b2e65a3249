"""How a layer changes its class: the same object, with all that it holds."""

from __future__ import annotations

from typing import Any

import torch.nn as nn
from torch.nn.modules.lazy import LazyModuleMixin

from ..batches.empty import unwatch_copy


def become(layer: nn.Module, cls: type[nn.Module], **attributes: Any) -> None:
    unwatch_copy(layer)
    vars(layer).update(attributes)
    layer.__class__ = cls


def materialised(cls: Any) -> Any:
    """What a lazy class becomes; another class itself."""
    return cls.cls_to_become if issubclass(cls, LazyModuleMixin) else cls
