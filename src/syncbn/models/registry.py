"""Which class converts to which, and back: torch's, what users register, and other libraries'."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic

import torch.nn as nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..layers import lazy, modules
from ..layers.modules import SyncBatchNorm
from .known.rules import Rule
from .known.table import rule_of

_TARGETS: dict[type[nn.Module], type[SyncBatchNorm]] = {
    nn.BatchNorm1d: modules.SyncBatchNorm1d,
    nn.BatchNorm2d: modules.SyncBatchNorm2d,
    nn.BatchNorm3d: modules.SyncBatchNorm3d,
    nn.SyncBatchNorm: modules.SyncBatchNorm,
    nn.LazyBatchNorm1d: lazy.LazySyncBatchNorm1d,
    nn.LazyBatchNorm2d: lazy.LazySyncBatchNorm2d,
    nn.LazyBatchNorm3d: lazy.LazySyncBatchNorm3d,
}
_SHARDED: dict[tuple[type, type], type[SyncBatchNorm]] = {}
# What a subclass may define without behaving differently from its base.
_HARMLESS = {
    "__annotate__",
    "__annotate_func__",
    "__annotations__",
    "__annotations_cache__",
    "__conditional_annotations__",
    "__constants__",
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
    """Teach :func:`syncbn.convert` a foreign class, say a BatchNorm fused with an activation.

    Layers of class ``source`` (and of subclasses that add nothing but a constructor) become
    ``target`` by assignment to ``__class__``: ``target``'s methods find ``source``'s attributes.
    :func:`syncbn.revert` assigns ``source`` back. A later registration of the same class
    replaces the earlier one, and any replaces what convert knows of timm's and other libraries'
    classes by their names.

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


@dataclass(frozen=True)
class Origin:
    """What a layer is to revert to: its class, the class it got, the group it had, if any."""

    source: type[nn.Module]
    target: type[nn.Module]
    process_group: Any = None
    had_group: bool = False

    def __deepcopy__(self, memo: dict[int, Any]) -> Origin:
        return self

    def __reduce__(self) -> tuple[Any, ...]:
        return Origin, (self.source, self.target, None, self.had_group)  # a pickle carries no group


def is_candidate(layer: nn.Module) -> bool:
    """Whether convert must decide about ``layer``: a BatchNorm, or of a class that it knows."""
    return isinstance(layer, (_BatchNorm, *_TARGETS)) or any(map(rule_of, type(layer).__mro__))


def target_of(cls: type) -> type[SyncBatchNorm] | None:
    """What layers of class ``cls`` become; None where that would change their behaviour."""
    source = _differs_by_constructor_only(cls, _is_source)
    if source in _TARGETS:
        return _TARGETS[source]
    if source is not None:
        rule = rule_of(source)
        return None if rule is None or rule.misfit(source) else rule.target(source)
    if not _is_sharded(cls):
        return None
    sharding, inner = cls.__bases__
    target = target_of(inner)
    return target and _sharded(cls, sharding, target)


def known_rule(layer: nn.Module) -> tuple[Rule, type[nn.Module]] | None:
    """The rule that makes a layer one of ours, and the class that it is for, if there is one."""
    source = _differs_by_constructor_only(_inner(type(layer)), _is_source)
    rule = None if source is None or source in _TARGETS else rule_of(source)
    return None if rule is None else (rule, source)


def normalised_by(layer: nn.Module, input: Any) -> Any:
    """The values (N, C, *) of an input that a layer normalises, where its rule says which."""
    rule = getattr(type(layer), "_rule", None) or next(iter(known_rule(layer) or ()), None)
    return rule.view(layer, input) if isinstance(rule, Rule) else input


def _is_source(cls: type) -> bool:
    return cls in _TARGETS or rule_of(cls) is not None


def _inner(cls: type) -> type:
    """The layer's own class, of one that fully_shard made."""
    inner: type = cls.__bases__[-1] if _is_sharded(cls) else cls
    return inner


def _is_sharded(cls: type) -> bool:
    """Whether fully_shard made ``cls``: FSDPModule in front of the layer's own class."""
    bases = cls.__bases__
    return [base.__name__ for base in bases[:-1]] == ["FSDPModule"] and (
        bases[0].__module__.startswith("torch.distributed.")
    )


def _sharded(cls: type, sharding: type, target: type[SyncBatchNorm]) -> type[SyncBatchNorm]:
    """``target`` as fully_shard would have made it of a layer, which is now a ``cls``."""
    if (cls, target) not in _SHARDED:
        own = {"__deepcopy__": vars(cls)["__deepcopy__"], "__module__": cls.__module__}
        _SHARDED[cls, target] = type(f"FSDP{target.__name__}", (sharding, target), own)
    return _SHARDED[cls, target]


def default_origin(cls: type) -> Origin | None:
    """What a layer built as ``cls`` reverts to: the first class registered to become it."""
    sources: dict[type, type[nn.Module]] = {}
    for source, target in _TARGETS.items():
        sources.setdefault(target, source)
    target = _differs_by_constructor_only(cls, sources.__contains__)
    return None if target is None else Origin(sources[target], cls)


def _differs_by_constructor_only(cls: type, known: Callable[[type], bool]) -> Any:
    """The first class that is known and that ``cls`` is or derives from without other behaviour."""
    for base in cls.__mro__:
        if known(base):
            added = (extra for extra in cls.__mro__ if extra not in base.__mro__)
            harmless = all(_HARMLESS.issuperset(vars(extra)) or extra is Generic for extra in added)
            return base if harmless else None
    return None
