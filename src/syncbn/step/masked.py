"""Masks: which positions of a batch count. What they leave is packed, as if nothing else were."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..tensors.storages import check_held
from ..tensors.transforms import transforming


def mask_from_lengths(lengths: Tensor, size: int | None = None) -> Tensor:
    """The mask of padded sequences: True where a position is within its sequence.

    Args:
        lengths: (N,), integer, in positions: how much of each sequence counts, from its beginning.
        size: how many positions the padded sequences have; by default the longest length.

    Returns:
        (N, size) bool, on the device of ``lengths``.

    Raises:
        TypeError: ``lengths`` is no tensor of integers.
        ValueError: it has not one dimension, or a length is negative or more than ``size``.

    Example:
        >>> syncbn.mask_from_lengths(torch.tensor([1, 3]))
        tensor([[ True, False, False],
                [ True,  True,  True]])
    """
    if not isinstance(lengths, Tensor) or not _is_integer(lengths.dtype):
        got = lengths.dtype if isinstance(lengths, Tensor) else type(lengths).__name__
        raise TypeError(f"mask_from_lengths: expected lengths as an integer tensor, got {got}")
    if lengths.dim() != 1:
        raise ValueError(
            f"mask_from_lengths: expected lengths of shape (N,), got {tuple(lengths.shape)}"
        )
    check_held({"lengths": lengths})
    longest = int(lengths.max()) if len(lengths) else 0
    size = longest if size is None else size
    if longest > size or (len(lengths) and int(lengths.min()) < 0):
        raise ValueError(
            f"mask_from_lengths: expected lengths from 0 to size = {size}, got "
            f"{int(lengths.min())} to {longest}; lengths count positions of the padded sequences"
        )
    return torch.arange(size, device=lengths.device) < lengths.unsqueeze(1)


def _is_integer(dtype: torch.dtype) -> bool:
    return not (dtype.is_floating_point or dtype.is_complex or dtype == torch.bool)


def check_mask(mask: Tensor, input: Tensor) -> None:
    """Refuse what is no bool mask (N, *) on the device of input (N, C, *)."""
    if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
        got = mask.dtype if isinstance(mask, Tensor) else type(mask).__name__
        raise TypeError(
            f"sync_batch_norm: expected mask as a torch.bool tensor, True where a position counts, "
            f"got {got}; compare to make one, for example mask != 0"
        )
    if input.is_nested:
        raise ValueError(
            "sync_batch_norm: expected mask=None beside a nested tensor, which holds only what "
            f"counts, got one of shape {tuple(mask.shape)}; for a mask pad the input, for example "
            "input.to_padded_tensor(0.0)"
        )
    expected = (*input.shape[:1], *input.shape[2:])
    if mask.shape != expected:
        raise ValueError(
            f"sync_batch_norm: expected mask of shape {expected}, (N, *) for input (N, C, *) of "
            f"shape {tuple(input.shape)}, got {tuple(mask.shape)}; one mask serves all channels"
        )
    if mask.device != input.device:
        raise ValueError(
            f"sync_batch_norm: expected mask on the input's device {input.device}, got "
            f"{mask.device}; move one of them with .to()"
        )
    check_held({"mask": mask})


def resolve_mask(sources: tuple[tuple[list[str], Any], ...], input: Tensor) -> Tensor | None:
    """The mask of the last source, a layer's names and its mask or function, that has one.

    Raises as :func:`check_mask`, with the layer's name.
    """
    for name, source in ((name, each) for names, each in reversed(sources) for name in names):
        mask: Tensor | None = source if isinstance(source, Tensor) else source(name, input)
        if mask is None:
            continue
        try:
            check_mask(mask, input)
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"masking: layer {name!r}: {error}; where the length changes inside the model, "
                "give a function of the layer's name and input, and where a DataParallel splits "
                "the batch, make the mask an input of its module"
            ) from None
        return mask
    return None


def select_valid(input: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The values (V, C) that count of input (N, C, *), and how many each sample has (N,).

    The mask is kept for backward.
    """
    return input.movedim(1, -1)[mask], mask.unsqueeze(-1).flatten(1).sum(1)


def scatter_valid(values: Tensor, input: Tensor, mask: Tensor) -> Tensor:
    """A tensor like input (N, C, *) of the values (V, C) that count, and zeros."""
    output = torch.zeros_like(input.movedim(1, -1))
    output[mask] = values  # not of a view, whose gradient would be one of strides, beyond vmap
    return output.movedim(-1, 1)


def zero_masked(input: Tensor, mask: Tensor) -> Tensor:
    """input (N, C, *) with zeros where nothing counts."""
    if transforming():  # vmap may have made the mask larger than input
        return torch.where(mask.unsqueeze(1), input, 0.0)
    return input.clone().masked_fill_(~mask.unsqueeze(1), 0)  # in place it keeps the strides
