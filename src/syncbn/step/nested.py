"""Jagged nested tensors: the values of all their samples are the batch. Other forms are refused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nested import nested_tensor_from_jagged

from ..tensors.storages import form_of

_REMEDIES = {
    "sparse_coo": "give its values (V, C), input.coalesce().values() where its last dimension is "
    "dense, or input.to_dense()",
    "nested": "lay it out as torch.nested.nested_tensor(samples, layout=torch.jagged) does, or pad "
    "it and give a mask",
}


def is_jagged(input: Any) -> bool:
    return isinstance(input, Tensor) and input.is_nested and input.layout is torch.jagged


def check_form(input: Any) -> None:
    """Refuse what has no strides of its own, unless it is a jagged (N, C, *) without holes."""
    form = form_of(input)
    if form is None:
        return
    if not is_jagged(input):
        raise TypeError(
            f"sync_batch_norm: expected a dense tensor as input, got a {form} one; "
            f"{_REMEDIES.get(form, 'convert it first, for example input.to_dense()')}"
        )
    if input._ragged_idx < 2:
        shape = ["ragged" if dim == input._ragged_idx else n for dim, n in enumerate(input.shape)]
        raise ValueError(
            "sync_batch_norm: expected a nested (N, C, *) as input, got one of shape "
            f"({', '.join(map(str, shape))}); channels are dimension 1: input.transpose(1, 2) of "
            "a nested (N, ragged, C)"
        )
    if input.lengths() is not None:
        raise ValueError(
            "sync_batch_norm: expected a nested tensor without holes as input, got one that has "
            "lengths beside offsets; input.contiguous(), before it is transposed, leaves them out"
        )


def packed_values(nested: Any, training: bool, by_sample: bool) -> tuple[Tensor, Tensor | None]:
    """The values of a jagged (N, C, *) as they lie: (V, C, *) or (1, C, *).

    by_sample: as (V, C, *), and with how many belong to each sample (N,).
    """
    values, offsets, ragged = nested.values(), nested.offsets(), nested._ragged_idx - 1
    if training and not offsets.is_meta:
        _check_ends(offsets, values.shape[ragged])
    if by_sample:
        return values.movedim(ragged, 0), offsets.diff()
    # torch's own operator, which serves eval mode, is slow where channels lie otherwise.
    return values.unsqueeze(0) if values.is_contiguous() else values.movedim(ragged, 0), None


def nested_like(nested: Any, values: Tensor, packed: Tensor) -> Tensor:
    """values, which are like what was packed, in the place of those of nested."""
    ragged = nested._ragged_idx
    return nested_tensor_from_jagged(
        values.squeeze(0) if packed.dim() == nested.dim() else values.movedim(0, ragged - 1),
        nested.offsets(),
        jagged_dim=ragged,
        min_seqlen=nested._maybe_min_seqlen,
        max_seqlen=nested._maybe_max_seqlen,
    )


def _check_ends(offsets: Tensor, size: int) -> None:
    """Refuse values before or behind all samples, which would count."""
    held = offsets[-1] - offsets[0]
    if torch.compiler.is_compiling() or not offsets.is_cpu:
        torch._assert_async(
            held == size, "sync_batch_norm: expected a nested tensor all of whose values are in it"
        )
    elif held != size:
        raise ValueError(
            "sync_batch_norm: expected a nested tensor all of whose values are in its samples, got "
            f"offsets from {offsets[0]} to {offsets[-1]} for {size} values; cut the others off"
        )
