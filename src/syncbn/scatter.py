"""A batch in any nesting of tuples, lists and dicts: split over devices, and put together again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

_PLAIN = (bool, int, float, complex, str, bytes)


def scatter(obj: Any, devices: Sequence[torch.device], dim: int = 0) -> list[Any]:
    """One object like ``obj`` for each device that gets a share, the first ones if not all.

    Tensors are split along ``dim`` as evenly as possible, into as many shares as the smallest of
    them has room for, so that nothing is lost. Tensors without dimensions and everything else go
    to every device. Several devices get copies of tensors.
    """
    sizes = [tensor.shape[dim] for tensor in _tensors(obj) if tensor.dim()]
    shares = max(1, min([len(devices), *sizes]))

    def share(rank: int, tensor: Tensor) -> Tensor:
        if tensor.dim():
            base, extra = divmod(tensor.shape[dim], shares)
            start = rank * base + min(rank, extra)
            tensor = tensor.narrow(dim, start, base + (rank < extra))
        # a view would share its version with the others' views: what one replica changes in
        # place would be wrong for backward in all
        return tensor.to(devices[rank], non_blocking=True, copy=shares > 1)

    return [_mapped(partial(share, rank), obj) for rank in range(shares)]


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
    if isinstance(first, Tensor):
        tensors = [output.to(device) for output in outputs]
        return torch.cat(tensors, dim) if first.dim() else torch.stack(tensors)
    if isinstance(first, dict):
        if any(output.keys() != first.keys() for output in outputs):
            keys = ", ".join(str(list(output)) for output in outputs)
            raise ValueError(f"{_EXPECTED}, got dicts with the keys {keys}")
        return _like(first, [(k, gather([o[k] for o in outputs], device, dim)) for k in first])
    if isinstance(first, (tuple, list)):
        if len({len(output) for output in outputs}) > 1:
            lengths = ", ".join(str(len(output)) for output in outputs)
            raise ValueError(f"{_EXPECTED}, got {kinds.pop().__name__}s of lengths {lengths}")
        return _like(first, [gather(values, device, dim) for values in zip(*outputs, strict=True)])
    if not all(o is first or (isinstance(first, _PLAIN) and o == first) for o in outputs):
        values = ", ".join(repr(output) for output in outputs)
        raise TypeError(f"{_EXPECTED}, got {values}; return what differs as tensors")
    return first


_EXPECTED = (
    "DataParallel: expected every replica to return the same nesting of tuples, lists and dicts of "
    "tensors"
)


def _tensors(obj: Any) -> Iterator[Tensor]:
    if isinstance(obj, Tensor):
        yield obj
    elif isinstance(obj, (tuple, list, dict)):
        for value in obj.values() if isinstance(obj, dict) else obj:
            yield from _tensors(value)


def _mapped(function: Callable[[Tensor], Tensor], obj: Any) -> Any:
    """``obj`` with ``function`` of its tensors in new containers of the same kinds."""
    if isinstance(obj, Tensor):
        return function(obj)
    if isinstance(obj, dict):
        return _like(obj, [(key, _mapped(function, value)) for key, value in obj.items()])
    if isinstance(obj, (tuple, list)):
        return _like(obj, [_mapped(function, value) for value in obj])
    return obj


def _like(container: Any, values: list[Any]) -> Any:
    """A container of the same type: tuples with fields take them one by one."""
    cls = type(container)
    if isinstance(container, tuple) and hasattr(container, "_fields"):
        return cls(*values)
    if hasattr(container, "default_factory"):
        return cls(container.default_factory, values)
    return cls(values)
