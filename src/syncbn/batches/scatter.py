"""A batch in any nesting of containers: split over devices, and put together again."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..tensors.storages import check_held
from .nested import indivisible, leaves, mapped, parts, rebuilt, tensors

_PLAIN = (bool, int, float, complex, str, bytes)


def scatter(obj: Any, devices: Sequence[torch.device], dim: int = 0) -> list[Any]:
    """One object like ``obj`` for each device that gets a share, the first ones if not all.

    Tensors are split along ``dim`` as evenly as possible, into as many shares as the smallest of
    them has room for, so that nothing is lost. Tensors without dimensions and everything else go
    to every device. Several devices get copies of tensors.

    With several devices, raises TypeError for nested and compressed tensors and packed sequences.
    """
    if len(devices) == 1:
        return [mapped(partial(_placed, devices[0]), obj)]
    for value in leaves(obj):
        if (form := indivisible(value)) is not None:
            raise TypeError(
                f"DataParallel: expected batches of tensors that can be split, got a {form}; give "
                "it padded or dense tensors, and make others of them in the module's forward"
            )
        if isinstance(value, Tensor):
            check_held({"a tensor of the batch": value}, "DataParallel")
    sizes = [tensor.shape[dim] for tensor in tensors(obj)]
    shares = max(1, min([len(devices), *sizes]))

    def share(rank: int, value: Any) -> Any:
        if isinstance(value, Tensor) and value.dim():
            base, extra = divmod(value.shape[dim], shares)
            start = rank * base + min(rank, extra)
            cut = torch.narrow_copy if value.is_sparse else torch.narrow
            value = cut(value, dim, start, base + (rank < extra))
        # a view would share its version with the others' views: what one replica changes in
        # place would be wrong for backward in all
        return _placed(devices[rank], value, copy=shares > 1)

    return [mapped(partial(share, rank), obj) for rank in range(shares)]


def _placed(device: torch.device, value: Any, copy: bool = False) -> Any:
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True, copy=copy)
    return value.to(device) if indivisible(value) else value


def gather(outputs: Sequence[Any], device: torch.device, dim: int = 0) -> Any:
    """One object like each of ``outputs`` with their tensors concatenated along ``dim``.

    Tensors without dimensions become a vector, one element of each output. Other values must be
    equal numbers or strings, or the same object.

    Raises TypeError or ValueError for outputs of different structure or values.
    """
    first = outputs[0]
    kinds = {type(output) for output in outputs}
    if len(kinds) > 1 and not all(isinstance(output, Tensor) for output in outputs):
        names = ", ".join(type(output).__name__ for output in outputs)
        raise TypeError(f"{_EXPECTED}, got {names} from the replicas in turn")
    if isinstance(first, Tensor) and not indivisible(first):
        found = [output.to(device) for output in outputs]
        return torch.cat(found, dim) if first.dim() else torch.stack(found)
    if parts(first) is None:
        return _only_value(outputs)
    inside = [parts(output) or {} for output in outputs]
    if any(other.keys() != inside[0].keys() for other in inside):
        if isinstance(first, (tuple, list)):
            lengths = ", ".join(str(len(output)) for output in outputs)
            raise ValueError(f"{_EXPECTED}, got {kinds.pop().__name__}s of lengths {lengths}")
        keys = ", ".join(str(list(other)) for other in inside)
        raise ValueError(f"{_EXPECTED}, got {kinds.pop().__name__}s with the keys {keys}")
    values = {key: gather([other[key] for other in inside], device, dim) for key in inside[0]}
    return rebuilt(first, values)


def _only_value(outputs: Sequence[Any]) -> Any:
    """What all outputs are."""
    first = outputs[0]
    if not all(o is first or (isinstance(first, _PLAIN) and o == first) for o in outputs):
        if form := indivisible(first):
            values = f"{form}s, which cannot be concatenated"
        else:
            values = ", ".join(repr(output) for output in outputs)
        raise TypeError(f"{_EXPECTED}, got {values}; return what differs as tensors")
    return first


_EXPECTED = (
    "DataParallel: expected every replica to return the same nesting of tuples, lists and dicts of "
    "tensors"
)
