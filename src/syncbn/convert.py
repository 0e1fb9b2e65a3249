"""convert() and revert(): walk a model, swap the classes of its layers, lose nothing.

A layer changes its class in place and stays the same object, as lazy modules do when they become
what they stand for. Parameters, buffers, hooks, flags, user attributes, sharing, and whoever holds
a reference to the layer are therefore untouched by construction.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

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
# Layers that were never converted revert to the torch class they stand in for.
_STANDS_FOR = {target: source for source, target in _TARGETS.items()}

# What a subclass may define without behaving differently from its base.
_HARMLESS = {
    "__annotate__",
    "__annotate_func__",
    "__annotations__",
    "__annotations_cache__",
    "__doc__",
    "__firstlineno__",
    "__init__",
    "__module__",
    "__orig_bases__",
    "__parameters__",
    "__qualname__",
    "__static_attributes__",
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

    Raises:
        TypeError: ``source`` is no Module class or ``target`` no SyncBatchNorm class.

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
) -> ModuleT:
    """Turn every torch BatchNorm1d/2d/3d, its Lazy form and torch.nn.SyncBatchNorm into syncbn's.

    In place: each layer stays the same object with the same parameters, buffers, hooks and
    attributes, only its class changes. Works before or after wrapping in DistributedDataParallel,
    and with optimizers that exist already. :func:`revert` undoes it.

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
    left_alone = []
    candidates: tuple[type[nn.Module], ...] = (_BatchNorm, *_TARGETS)
    for name, layer in module.named_modules():
        if not isinstance(layer, candidates) or (where and not where(name, layer)):
            continue
        if not isinstance(layer, SyncBatchNorm):
            source = _convertible_as(type(layer))
            if source is None:
                left_alone.append(f"{name or 'the module itself'} ({_qualified(type(layer))})")
                continue
            _become(layer, _TARGETS[source], _converted_from=type(layer))
        if process_group is not None:
            layer.process_group = process_group
    if left_alone:
        warnings.warn(
            "convert: left alone, because their classes override BatchNorm's behaviour: "
            f"{', '.join(left_alone)}. Use syncbn.register_conversion(cls, sync_cls) to convert "
            "them, or where= to leave them out",
            stacklevel=2,
        )
    return module


def revert(module: ModuleT) -> ModuleT:
    """Give every syncbn layer back the class that :func:`convert` found, in place.

    ``revert(convert(m))`` is ``m`` as it was. Layers that were built as syncbn layers become the
    torch class they stand in for: BatchNorm1d/2d/3d, or torch.nn.SyncBatchNorm for
    :class:`SyncBatchNorm`. For inference and export with tools that know torch's classes.

    Args:
        module: a model, or a single layer.

    Returns:
        ``module`` itself.

    Raises:
        TypeError: ``module`` is no Module.

    Example:
        >>> layer = syncbn.revert(syncbn.SyncBatchNorm2d(8))
        >>> type(layer).__name__
        'BatchNorm2d'
    """
    _check_module("revert", module)
    for layer in module.modules():
        if not isinstance(layer, SyncBatchNorm):
            continue
        source = vars(layer).pop("_converted_from", None) or _stands_for(type(layer))
        if source is None:
            continue
        if not isinstance(layer, LazyModuleMixin) and issubclass(source, LazyModuleMixin):
            source = source.cls_to_become  # converted while lazy, materialised since
        if not issubclass(source, nn.SyncBatchNorm):
            vars(layer).pop("process_group", None)
        _become(layer, source)
    return module


def _convertible_as(cls: type) -> type[nn.Module] | None:
    """The registered class that ``cls`` is, or differs from by nothing but its constructor."""
    for base in cls.__mro__:
        if base in _TARGETS:
            return base
        if not _HARMLESS.issuperset(vars(base)):
            return None
    return None


def _stands_for(cls: type) -> Any:
    return next((_STANDS_FOR[base] for base in cls.__mro__ if base in _STANDS_FOR), None)


def _become(layer: nn.Module, cls: type[nn.Module], **attributes: Any) -> None:
    vars(layer).update(attributes)
    layer.__class__ = cls


def _check_module(operation: str, module: object) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{operation}: expected a torch.nn.Module, got {type(module).__name__}")


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
