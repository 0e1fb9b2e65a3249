"""What of a batch travels between ranks: plain data, and never code.

A pickle can run anything where it is read. So containers are spelled in lists, dicts and strings,
which torch.load reads with the tensors in them under ``weights_only=True``, and built anew here.
"""

from __future__ import annotations

import io
import sys
from collections import OrderedDict, defaultdict
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

_VALUES = (bool, int, float, complex, str, bytes)
_FACTORIES = {"None": None} | {f.__name__: f for f in (list, dict, set, tuple, *_VALUES)}


def packed(obj: Any) -> bytes:
    """``obj``: tensors, numbers, strings and None in lists, tuples, named tuples and dicts.

    Raises TypeError, which names its type, for anything else in it.
    """
    stream = io.BytesIO()
    torch.save(_spelled(obj), stream)
    return stream.getvalue()


def unpacked(content: bytes) -> Any:
    """What :func:`packed` made bytes of. Tensors come to devices of the type that they were on.

    Raises ValueError for any other bytes, and for named tuples of classes that aren't imported.
    """
    try:
        return _read(torch.load(io.BytesIO(content), weights_only=True, map_location=_here))
    except _UnknownClass:
        raise
    except Exception as error:  # of whatever kind: the bytes are another's
        raise ValueError("it is not what until_all_done sends") from error


class _UnknownClass(ValueError):
    pass


def _spelled(obj: Any) -> Any:
    """A tensor itself; else a list of the kind and what it holds."""
    cls = type(obj)
    if cls in (Tensor, torch.nn.Parameter) and obj.layout is torch.strided and not obj.is_nested:
        return obj.detach().clone()  # a view would bring all of its storage
    if obj is None or cls in _VALUES:
        return ["value", obj]
    if cls in (list, tuple, torch.Size):
        return [cls.__name__, *map(_spelled, obj)]
    if cls in (dict, OrderedDict):
        return [cls.__name__, *([_spelled(key), _spelled(obj[key])] for key in obj)]
    if cls is defaultdict and obj.default_factory in _FACTORIES.values():
        factory = getattr(obj.default_factory, "__name__", "None")
        return [cls.__name__, factory, *([_spelled(key), _spelled(obj[key])] for key in obj)]
    if _is_named_tuple(cls) and _found(cls.__module__, cls.__qualname__) is cls:
        return ["named", cls.__module__, cls.__qualname__, *map(_spelled, obj)]
    raise TypeError(f"{cls.__module__}.{cls.__qualname__}")


def _read(spelled: Any) -> Any:
    if isinstance(spelled, Tensor):
        return spelled
    kind, *rest = spelled
    if kind == "value":
        return rest[0]
    if kind in ("list", "tuple", "Size"):
        values = [_read(value) for value in rest]
        return {"list": list, "tuple": tuple, "Size": torch.Size}[kind](values)
    if kind == "named":
        module, qualname, *values = rest
        return _named_tuple(module, qualname, [_read(value) for value in values])
    if kind == "defaultdict":
        factory, *rest = rest
        return defaultdict(_FACTORIES[factory], _pairs(rest))
    return {"dict": dict, "OrderedDict": OrderedDict}[kind](_pairs(rest))


def _pairs(spelled: list[Any]) -> list[tuple[Any, Any]]:
    return [(_read(key), _read(value)) for key, value in spelled]


def _is_named_tuple(cls: Any) -> bool:
    return isinstance(cls, type) and issubclass(cls, tuple) and hasattr(cls, "_fields")


def _found(module: str, qualname: str) -> Any:
    """What is imported under this name, or None. Imports nothing: a peer may name what it likes."""
    found: Any = sys.modules.get(module)
    for name in qualname.split("."):
        found = vars(found).get(name) if isinstance(found, (ModuleType, type)) else None
    return found


def _named_tuple(module: str, qualname: str, values: list[Any]) -> Any:
    cls = _found(module, qualname)
    if not _is_named_tuple(cls) or len(cls._fields) != len(values):
        raise _UnknownClass(f"{module}.{qualname}, which is no named tuple that is imported here")
    return tuple.__new__(cls, values)  # not by the class's own constructor


def _here(storage: Any, location: str) -> Any:
    """Place what another rank had on its device on this rank's."""
    kind = location.split(":")[0]
    return torch.serialization.default_restore_location(storage, kind)  # type: ignore[no-untyped-call]
