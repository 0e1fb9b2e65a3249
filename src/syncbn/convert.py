"""convert() and revert(): walk a model, swap the classes of its layers, lose nothing.

A layer stays the same object and only changes its class, as torch's lazy modules do: parameters,
buffers, hooks, attributes, sharing and references to it are untouched by construction.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Container
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from . import modules
from .comm import resolve
from .modules import SyncBatchNorm

ModuleT = TypeVar("ModuleT", bound=nn.Module)

_TARGETS: dict[type[nn.Module], type[SyncBatchNorm]] = {
    nn.BatchNorm1d: modules.SyncBatchNorm1d,
    nn.BatchNorm2d: modules.SyncBatchNorm2d,
    nn.BatchNorm3d: modules.SyncBatchNorm3d,
    nn.SyncBatchNorm: modules.SyncBatchNorm,
    nn.LazyBatchNorm1d: modules.LazySyncBatchNorm1d,
    nn.LazyBatchNorm2d: modules.LazySyncBatchNorm2d,
    nn.LazyBatchNorm3d: modules.LazySyncBatchNorm3d,
}
# What a subclass may define without behaving differently from its base.
_HARMLESS = {
    "__annotate__",
    "__annotate_func__",
    "__annotations__",
    "__annotations_cache__",
    "__conditional_annotations__",
    "__doc__",
    "__firstlineno__",
    "__init__",
    "__module__",
    "__orig_bases__",
    "__parameters__",
    "__qualname__",
    "__static_attributes__",
    "__type_params__",
}


def register_conversion(source: type[nn.Module], target: type[SyncBatchNorm]) -> None:
    """Teach :func:`convert` a foreign class, for example a BatchNorm fused with an activation.

    Layers of class ``source`` (and of subclasses that add nothing but a constructor) become
    ``target`` by assignment to ``__class__``: ``target``'s methods find ``source``'s attributes.
    :func:`revert` assigns ``source`` back. A later registration of the same class replaces the
    earlier one.

    Args:
        source: the class that models contain.
        target: a subclass of :class:`SyncBatchNorm` that works on ``source``'s attributes.

    Raises TypeError where ``source`` is no Module class or ``target`` no SyncBatchNorm class.

    Example:
        >>> class BatchNormReLU(torch.nn.BatchNorm2d):
        ...     def forward(self, x):
        ...         return super().forward(x).relu()
        >>> class SyncBatchNormReLU(syncbn.SyncBatchNorm2d):
        ...     def forward(self, x):
        ...         return super().forward(x).relu()
        >>> syncbn.register_conversion(BatchNormReLU, SyncBatchNormReLU)
        >>> type(syncbn.convert(BatchNormReLU(8))).__name__
        'SyncBatchNormReLU'
    """
    for name, given, base in (("source", source, nn.Module), ("target", target, SyncBatchNorm)):
        if not (isinstance(given, type) and issubclass(given, base)):
            raise TypeError(
                f"register_conversion: expected a subclass of {base.__name__} as {name}, "
                f"got {given!r}"
            )
    _TARGETS[source] = target


def convert(
    module: ModuleT,
    process_group: Any = None,
    *,
    where: Callable[[str, nn.Module], bool] | None = None,
    _stacklevel: int = 2,
) -> ModuleT:
    """Turn every torch BatchNorm1d/2d/3d, its Lazy form and torch.nn.SyncBatchNorm into syncbn's.

    In place: each layer stays the same object, only its class changes. Works before or after
    wrapping in DistributedDataParallel, with optimizers that exist. :func:`revert` undoes it.

    Subclasses that change behaviour are left alone and named in one warning;
    :func:`register_conversion` teaches convert what to do with them.

    Args:
        module: a model, or a single layer.
        process_group: as for :class:`SyncBatchNorm`; None leaves layers that have a group with it.
        where: called with each layer's qualified name and the layer; False leaves it alone.

    Returns:
        ``module`` itself.

    Raises:
        TypeError: ``module`` is no Module, ``where`` not callable, or a wrong ``process_group``.
        ValueError: a group that this rank is not in.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> model = syncbn.convert(model)
        >>> type(model[1]).__name__
        'SyncBatchNorm2d'
    """
    _check_module("convert", module)
    if where is not None and not callable(where):
        raise TypeError(
            "convert: expected where to be a function of a layer's name and the layer, got "
            f"{type(where).__name__}"
        )
    resolve(process_group)
    candidates: tuple[type[nn.Module], ...] = (_BatchNorm, *_TARGETS)
    layers = [
        (name, layer)
        for name, layer in module.named_modules()
        if isinstance(layer, candidates) and (where is None or where(name, layer))
    ]
    left_alone = []
    for name, layer in layers:
        if not isinstance(layer, SyncBatchNorm):
            source = _differs_by_constructor_only(type(layer), _TARGETS)
            if source is None:
                left_alone.append(_described(name, layer))
                continue
            target = _TARGETS[source]
            origin = _Origin(type(layer), target, getattr(layer, "process_group", None))
            _become(layer, target, _origin=origin)
        if process_group is not None:
            layer.process_group = process_group
    if left_alone:
        warnings.warn(
            "convert: left alone, because their classes override BatchNorm's behaviour: "
            f"{', '.join(left_alone)}. Use syncbn.register_conversion(cls, sync_cls) to convert "
            "them, or where= to leave them out",
            stacklevel=_stacklevel,
        )
    return module


def revert(module: ModuleT) -> ModuleT:
    """Give every syncbn layer back the class that :func:`convert` found, in place.

    ``revert(convert(m))`` is ``m`` as it was. Classes that convert did not assign (parametrized or
    sharded since, or subclasses with behaviour of their own) are left alone and named in one
    warning. Layers that were built as syncbn layers become the
    torch class they stand in for: BatchNorm1d/2d/3d, or torch.nn.SyncBatchNorm for
    :class:`SyncBatchNorm`. For inference and export with tools that know torch's classes.

    Args:
        module: a model, or a single layer. Returned.

    Raises TypeError where it is no Module.

    Example:
        >>> layer = syncbn.revert(syncbn.SyncBatchNorm2d(8))
        >>> type(layer).__name__
        'BatchNorm2d'
    """
    _check_module("revert", module)
    left_alone = []
    for name, layer in module.named_modules():
        if not isinstance(layer, SyncBatchNorm):
            continue
        origin = vars(layer).get("_origin") or _stands_for(type(layer))
        if origin is None or type(layer) not in (origin.target, _materialised(origin.target)):
            left_alone.append(_described(name, layer))
            continue
        lazy = isinstance(layer, LazyModuleMixin)
        source = origin.source if lazy else _materialised(origin.source)
        for attribute in ("_origin", "process_group"):
            vars(layer).pop(attribute, None)
        if issubclass(source, nn.SyncBatchNorm):
            layer.process_group = origin.process_group
        _become(layer, source)
    if left_alone:
        warnings.warn(
            "revert: left alone, because convert did not give them their classes: "
            f"{', '.join(left_alone)}. Use syncbn.register_conversion(cls, sync_cls) to say what "
            "they stand for",
            stacklevel=2,
        )
    return module


@dataclass(frozen=True)
class _Origin:
    """What a converted layer was: its class, the class it got, the group it had."""

    source: type[nn.Module]
    target: type[nn.Module]
    process_group: Any = None

    def __deepcopy__(self, memo: dict[int, Any]) -> _Origin:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return _Origin, (self.source, self.target)  # a pickle carries no group


def _stands_for(cls: type) -> _Origin | None:
    """What a layer built as ``cls`` reverts to: the first class registered to become it."""
    sources: dict[type, type[nn.Module]] = {}
    for source, target in _TARGETS.items():
        sources.setdefault(target, source)
    target = _differs_by_constructor_only(cls, sources)
    return None if target is None else _Origin(sources[target], cls)


def _materialised(cls: Any) -> Any:
    """What a lazy class becomes; another class itself."""
    return cls.cls_to_become if issubclass(cls, LazyModuleMixin) else cls


def _differs_by_constructor_only(cls: type, known: Container[type]) -> Any:
    """The first class in ``known`` that ``cls`` is or derives from without other behaviour."""
    for base in cls.__mro__:
        if base in known:
            added = (extra for extra in cls.__mro__ if extra not in base.__mro__)
            harmless = all(_HARMLESS.issuperset(vars(extra)) or extra is Generic for extra in added)
            return base if harmless else None
    return None


def _become(layer: nn.Module, cls: type[nn.Module], **attributes: Any) -> None:
    vars(layer).update(attributes)
    layer.__class__ = cls


def _check_module(operation: str, module: object) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{operation}: expected a torch.nn.Module, got {type(module).__name__}")


def _described(name: str, layer: nn.Module) -> str:
    cls = type(layer)
    return f"{name or 'the module itself'} ({cls.__module__}.{cls.__qualname__})"
