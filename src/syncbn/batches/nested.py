"""What a batch is made of: the one walk through tensors in containers, and how to build one anew.

Containers are lists, tuples, named tuples, mappings (dicts of every kind, UserDict, what tokenizers
and models of transformers return) and dataclasses. Everything else is one thing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def parts(obj: Any) -> dict[Any, Any] | None:
    """What a container holds, by key, place or field; None for what is no container."""
    if isinstance(obj, Mapping):
        return dict(obj.items())
    if isinstance(obj, (tuple, list)) and not isinstance(obj, PackedSequence):
        return dict(enumerate(obj))
    if is_dataclass(obj) and not isinstance(obj, (type, Tensor)):
        return {field.name: getattr(obj, field.name) for field in fields(obj)}
    return None


def rebuilt(container: Any, values: dict[Any, Any]) -> Any:
    """A new container of the same type and attributes, with ``values`` in place of its parts."""
    cls = type(container)
    if isinstance(container, tuple):
        return cls._make(values.values()) if hasattr(cls, "_make") else cls(list(values.values()))
    if isinstance(container, Mapping) and not isinstance(container, MutableMapping):
        return cls(values)
    new = copy.copy(container)
    if isinstance(container, list):
        new[:] = values.values()
    elif isinstance(container, Mapping):
        for key, value in values.items():
            new[key] = value
    else:
        for name, value in values.items():
            object.__setattr__(new, name, value)  # also where it is frozen
    return new


def mapped(function: Callable[[Any], Any], obj: Any) -> Any:
    """``obj`` with ``function`` of all that is no container, in new containers."""
    found = parts(obj)
    if found is None:
        return function(obj)
    return rebuilt(obj, {key: mapped(function, value) for key, value in found.items()})


def leaves(obj: Any) -> Iterator[Any]:
    """All in ``obj`` that is no container."""
    found = parts(obj)
    if found is None:
        yield obj
    else:
        for value in found.values():
            yield from leaves(value)


def tensors(obj: Any) -> Iterator[Tensor]:
    """Every tensor in ``obj`` whose dimension 0 may be that of samples."""
    return (leaf for leaf in leaves(obj) if isinstance(leaf, Tensor) and leaf.dim())


def indivisible(obj: Any) -> str | None:
    """What holds samples in a form that cannot be cut along a dimension, in words; else None."""
    if isinstance(obj, PackedSequence):
        return "packed sequence"
    if isinstance(obj, Tensor):
        if obj.is_nested:
            return "nested tensor"
        return None if obj.layout in (torch.strided, torch.sparse_coo) else "compressed tensor"
    return None
