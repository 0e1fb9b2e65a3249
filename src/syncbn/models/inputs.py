"""What a layer is about to normalise, as a hook before its forward sees it: values and mask."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..layers.modules import SyncBatchNorm
from ..step.masked import check_mask, resolve_mask
from ..step.nested import is_jagged, packed_values
from .registry import normalised_by


@torch.no_grad()
def input_of(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The values (N, C, *) of a layer's input, or (V, C, *) of a nested one; whatever it is, if
    that is no tensor.
    """
    x: Any = normalised_by(layer, args[0] if args else kwargs.get("input"))
    if is_jagged(x) and x._ragged_idx > 1:
        return packed_values(x.detach(), training=False, by_sample=True)[0]
    return x


def mask_of(
    layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], x: Tensor
) -> Tensor | None:
    """The mask (N, *) of what :func:`input_of` found, its own or one of masking(), if there is one.

    What is no mask at all the layer itself refuses.
    """
    if not isinstance(layer, SyncBatchNorm):
        return None
    mask: Any = args[1] if len(args) > 1 else kwargs.get("mask")
    if mask is None and layer._mask_sources:
        return resolve_mask(layer._mask_sources, x)
    if not isinstance(mask, Tensor):
        return None
    check_mask(mask, x)
    return mask
