"""masking(): a mask for layers deep inside a model whose forward can't be edited."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch.nn as nn
from torch import Tensor
from torch.compiler import is_compiling

from .masks import check_mask
from .modules import SyncBatchNorm


@contextmanager
def masking(
    model: nn.Module, mask: Tensor | Callable[[str, Tensor], Tensor | None]
) -> Iterator[None]:
    """Within the context, every syncbn layer of ``model`` is called with the mask.

    A layer that is given a mask by the model itself keeps that one; of contexts inside each other
    the innermost that has a mask for a layer gives it. Activation checkpointing computes a forward
    again during backward: then backward belongs inside the context, too.

    Args:
        model: holds syncbn layers (:func:`syncbn.convert`), at any depth.
        mask: (N, *) bool as for :func:`syncbn.sync_batch_norm`, for layers whose inputs all have
            the shape (N, C, *). Or a function of a layer's qualified name and input that returns
            the layer's mask, or None for none: for models that change the length on their way.

    Raises:
        TypeError: ``model`` is no Module, or ``mask`` neither tensor nor function.
        ValueError: ``model`` has no syncbn layer; in its forward, the mask doesn't fit a layer,
            which is named.
        RuntimeError: in backward, a checkpointed layer runs again after the context.

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
    layers = [(n, layer) for n, layer in model.named_modules() if isinstance(layer, SyncBatchNorm)]
    if not layers:
        raise ValueError(
            "masking: expected a model with syncbn layers, got none in "
            f"{type(model).__name__}; convert it first: syncbn.convert(model)"
        )
    with ExitStack() as stack:
        for name, layer in layers:
            hook = layer.register_forward_pre_hook(
                _supplier(name, mask), prepend=True, with_kwargs=True
            )
            stack.callback(hook.remove)
        yield


def _supplier(name: str, mask: Any) -> Callable[..., Any]:
    def supply(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given = args[1] if len(args) > 1 else kwargs.get("mask")
        if given is not None or not (args or "input" in kwargs):
            return None
        input = args[0] if args else kwargs["input"]
        own = mask if isinstance(mask, Tensor) else mask(name, input)
        if own is None:
            return None
        try:
            check_mask(own, input)
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"masking: layer {name!r}: {error}; where the length changes inside the model, "
                "give a function of the layer's name and input, and where a DataParallel splits "
                "the batch, make the mask an input of its module"
            ) from None
        if not is_compiling():
            vars(layer)["_masked_as"] = name
        return (*args[:1], *args[2:]), {**kwargs, "mask": own}

    return supply
