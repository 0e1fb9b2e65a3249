"""masking(): a mask for layers deep inside a model whose forward can't be edited."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.nn as nn
from torch import Tensor

from ..layers.modules import SyncBatchNorm
from .names import names_of_modules


@contextmanager
def masking(
    model: nn.Module, mask: Tensor | Callable[[str, Tensor], Tensor | None]
) -> Iterator[None]:
    """Within the context, every syncbn layer of ``model`` is called with the mask.

    A layer that is given a mask by the model itself keeps that one; of contexts inside each other
    the innermost that has a mask for a layer gives it. Activation checkpointing computes a forward
    again during backward: then backward belongs inside the context, too, or that forward has no
    mask.

    Args:
        model: holds syncbn layers (:func:`syncbn.convert`), at any depth.
        mask: (N, *) bool as for :func:`syncbn.sync_batch_norm`, for layers whose inputs all have
            the shape (N, C, *). Or a function of a layer's qualified name and input that returns
            the layer's mask, or None for none: for models that change the length on their way. A
            layer that is shared is asked for under each of its names until there is a mask.

    Raises:
        TypeError: ``model`` is no Module, or ``mask`` neither tensor nor function.
        ValueError: ``model`` has no syncbn layer; in its forward, the mask doesn't fit a layer,
            which is named.

    Example:
        >>> model = syncbn.convert(torch.nn.Sequential(torch.nn.BatchNorm1d(2)))
        >>> x = torch.tensor([[[1.0, 3.0, 99.0], [2.0, 4.0, 99.0]]])  # one sequence of two, padded
        >>> with syncbn.masking(model, syncbn.mask_from_lengths(torch.tensor([2]), 3)):
        ...     model(x).detach()[0, 0].round()
        tensor([-1.,  1.,  0.])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"masking: expected a torch.nn.Module, got {type(model).__name__}")
    if not isinstance(mask, Tensor) and not callable(mask):
        raise TypeError(
            "masking: expected a bool tensor or a function of a layer's name and input as mask, "
            f"got {type(mask).__name__}"
        )
    layers = {
        layer: names
        for layer, names in names_of_modules(model).items()
        if isinstance(layer, SyncBatchNorm)
    }
    if not layers:
        raise ValueError(
            "masking: expected a model with syncbn layers, got none in "
            f"{type(model).__name__}; convert it first: syncbn.convert(model)"
        )
    with ExitStack() as stack:
        for layer, names in layers.items():
            stack.enter_context(_masked(layer, (names, mask)))
        yield


@contextmanager
def _masked(layer: SyncBatchNorm, source: tuple[list[str], Any]) -> Iterator[None]:
    layer._mask_sources = (*layer._mask_sources, source)
    try:
        yield
    finally:
        sources = vars(layer).pop("_mask_sources", ())  # none if it was reverted meanwhile
        others = tuple(other for other in sources if other is not source)
        if others:
            layer._mask_sources = others
