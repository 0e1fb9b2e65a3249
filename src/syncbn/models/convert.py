"""convert() and revert(): walk a model, swap the classes of its layers, lose nothing.

A layer stays the same object and only changes its class, as torch's lazy modules do: parameters,
buffers, hooks, attributes, sharing and references to it are untouched by construction.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch.nn as nn
from torch.nn.modules.lazy import LazyModuleMixin

from ..batches.empty import own_forward, unwatch_copy
from ..comm import resolve, subgroups
from ..layers.modules import SyncBatchNorm
from ..step.identity import forget, take_name
from .data_parallel import DataParallel
from .graphs import compiled_batch_norms
from .names import described, names_of_modules
from .quantisation import without_observers
from .registry import Origin, default_origin, is_candidate, target_of
from .replaced import watch_replacements

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_CONTEXTS = "_mask_sources", "_accumulator"  # what contexts around a layer set


def convert(
    module: ModuleT,
    process_group: Any = None,
    *,
    group_size: int | None = None,
    where: Callable[[str, nn.Module], bool] | None = None,
    reproducible: bool | None = None,
    skip_nonfinite: bool | None = None,
) -> ModuleT:
    """Turn every torch BatchNorm1d/2d/3d, its Lazy form and torch.nn.SyncBatchNorm into syncbn's.

    In place: each layer stays the same object, only its class changes. Works before or after
    wrapping in DistributedDataParallel or fully_shard, with optimizers that exist. :func:`revert`
    undoes it.

    A torch.nn.DataParallel around such layers becomes a :class:`syncbn.DataParallel` on the same
    devices, because torch's does not synchronise its replicas.

    Subclasses that change behaviour are left alone and named in one warning;
    :func:`register_conversion` teaches convert what to do with them. Another warning names batch
    norms inside what torch.jit, torch.export and torch.fx have compiled: convert before that.

    Args:
        module: a model, or a single layer.
        process_group: as for :class:`SyncBatchNorm`; None leaves layers that have a group with it.
        group_size: instead of ``process_group``, normalise over groups of that many consecutive
            ranks: [0 … k−1], [k … 2k−1] and so on. 1 means local statistics. Every rank must make
            this call: the first with its k makes the groups, later ones share them.
        where: called with each layer's qualified name and the layer; False leaves it alone. A
            layer that is shared has several names and converts if where says so for one of them.
        reproducible, skip_nonfinite: as for :class:`SyncBatchNorm`; None leaves layers as they are.

    Returns:
        ``module`` itself.

    Raises:
        TypeError: ``module`` is no Module, ``where`` not callable, or a wrong ``process_group``.
        ValueError: a group that this rank is not in; a ``group_size`` that does not divide the
            number of ranks, comes with a ``process_group``, or before
            torch.distributed.init_process_group.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> model = syncbn.convert(model)
        >>> type(model[1]).__name__
        'SyncBatchNorm2d'
    """
    if group_size is not None and process_group is not None:
        raise ValueError(
            f"convert: expected process_group or group_size, got both ({process_group!r} and "
            f"{group_size}); leave one out"
        )
    return convert_layers(
        *(module, process_group, where),
        group_size=group_size,
        reproducible=reproducible,
        skip_nonfinite=skip_nonfinite,
        stacklevel=3,
    )


def convert_layers(
    module: ModuleT,
    process_group: Any,
    where: Callable[[str, nn.Module], bool] | None = None,
    *,
    group_size: int | None = None,
    reproducible: bool | None = None,
    skip_nonfinite: bool | None = None,
    stacklevel: int,
) -> ModuleT:
    """:func:`convert`, with warnings for the caller ``stacklevel`` frames above."""
    _check_module("convert", module)
    watch_replacements()
    if where is not None and not callable(where):
        raise TypeError(
            "convert: expected where to be a function of a layer's name and the layer, got "
            f"{type(where).__name__}"
        )
    if group_size is not None:
        process_group = subgroups(group_size)
    resolve(process_group)
    layers: list[tuple[str, Any]] = [
        (names[0], layer)
        for layer, names in names_of_modules(module).items()
        if is_candidate(layer) and (where is None or any(where(name, layer) for name in names))
    ]
    compiled = [
        f"{name or 'the module itself'} ({what})"
        for name, holder, what in compiled_batch_norms(module)
        if where is None or where(name, holder)
    ]
    left_alone = []
    for name, layer in layers:
        if not isinstance(layer, SyncBatchNorm):
            target = target_of(type(layer))
            if target is None or own_forward(layer) is not None:
                left_alone.append(described(name, layer))
                continue
            origin = Origin(type(layer), target, getattr(layer, "process_group", None))
            _become(layer, target, _origin=origin)
        take_name(layer, name)
        if process_group is not None or group_size is not None:
            layer.process_group = process_group
        if reproducible is not None:
            layer.reproducible = reproducible
        if skip_nonfinite is not None:
            layer.skip_nonfinite = skip_nonfinite
    _convert_wrappers(module)
    if compiled:
        warnings.warn(
            "convert: left alone, because they are compiled, and will normalise each rank's batch "
            f"by itself: {', '.join(compiled)}. Convert the model they were made of, which "
            "torch.compile takes, or leave them out with where=",
            stacklevel=stacklevel,
        )
    if left_alone:
        warnings.warn(
            "convert: left alone, because they override BatchNorm's behaviour: "
            f"{', '.join(left_alone)}. Use syncbn.register_conversion(cls, sync_cls) to convert "
            "them, or where= to leave them out",
            stacklevel=stacklevel,
        )
    return module


def revert(module: ModuleT) -> ModuleT:
    """Give every syncbn layer back the class that :func:`convert` found, in place.

    ``revert(convert(m))`` is ``m`` as it was. Layers that were built as syncbn layers become the
    torch class they stand in for: BatchNorm1d/2d/3d, or torch.nn.SyncBatchNorm for
    :class:`SyncBatchNorm` (whose Lazy form torch lacks: it must have seen its input); their running
    statistics, if of another ``statistics_dtype``, become of the weight's dtype. What convert did
    not make (parametrized or sharded since, or with behaviour of its own) is left alone and named
    in one warning. Another names layers that cannot be quantised, where ``prepare`` or
    ``prepare_qat`` came after convert. For inference, export and tools that know torch's classes.

    Args:
        module: a model, or a single layer. Returned.

    Raises TypeError where it is no Module.

    Example:
        >>> layer = syncbn.revert(syncbn.SyncBatchNorm2d(8))
        >>> type(layer).__name__
        'BatchNorm2d'
    """
    _check_module("revert", module)
    left_alone, reverted = [], []
    for name, layer in module.named_modules():
        if not isinstance(layer, SyncBatchNorm):
            continue
        origin = vars(layer).get("_origin") or default_origin(type(layer))
        ours = origin and type(layer) in (origin.target, _materialised(origin.target))
        if origin is None or not ours or own_forward(layer) is not None:
            left_alone.append(described(name, layer))
            continue
        if "_origin" not in vars(layer):
            _narrow_statistics(layer)
        lazy = isinstance(layer, LazyModuleMixin)
        source = origin.source if lazy else _materialised(origin.source)
        layer.skip_nonfinite = False
        forget(layer)
        for attribute in ("_origin", "process_group", "reproducible", *_CONTEXTS):
            vars(layer).pop(attribute, None)
        if issubclass(source, nn.SyncBatchNorm):
            layer.process_group = origin.process_group
        _become(layer, source)
        reverted.append((name, layer))
    _revert_wrappers(module)
    if unprepared := without_observers(module, reverted):
        warnings.warn(
            f"revert: cannot be quantised: {', '.join(unprepared)}, to which torch.ao.quantization "
            "gave no observers, because it prepared them as syncbn's layers. Prepare the plain "
            "model, convert it then, and revert it to quantise",
            stacklevel=2,
        )
    if left_alone:
        warnings.warn(
            "revert: left alone, because convert did not give them their classes: "
            f"{', '.join(left_alone)}. Use syncbn.register_conversion(cls, sync_cls) to say what "
            "they stand for",
            stacklevel=2,
        )
    return module


def _narrow_statistics(layer: SyncBatchNorm) -> None:
    """Running statistics of the weight's dtype, the only one that torch's layers compute with."""
    for buffer in (layer.running_mean, layer.running_var):
        if buffer is not None and layer.weight is not None and buffer.dtype != layer.weight.dtype:
            buffer.data = buffer.data.to(layer.weight.dtype)


def _convert_wrappers(module: nn.Module) -> None:
    for wrapper in [each for each in module.modules() if type(each) is nn.DataParallel]:
        if any(isinstance(layer, SyncBatchNorm) for layer in wrapper.modules()):
            _become(wrapper, DataParallel, _origin=nn.DataParallel)


def _revert_wrappers(module: nn.Module) -> None:
    for wrapper in module.modules():
        if type(wrapper) is DataParallel and "_origin" in vars(wrapper):
            _become(wrapper, vars(wrapper).pop("_origin"))


def _materialised(cls: Any) -> Any:
    """What a lazy class becomes; another class itself."""
    return cls.cls_to_become if issubclass(cls, LazyModuleMixin) else cls


def _become(layer: nn.Module, cls: type[nn.Module], **attributes: Any) -> None:
    unwatch_copy(layer)
    vars(layer).update(attributes)
    layer.__class__ = cls


def _check_module(operation: str, module: object) -> None:
    if not isinstance(module, nn.Module):
        raise TypeError(f"{operation}: expected a torch.nn.Module, got {type(module).__name__}")
