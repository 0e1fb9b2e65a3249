"""revert(): every layer gets back the class that convert found."""

from __future__ import annotations

import warnings
from typing import TypeVar

import torch.nn as nn
from torch.nn.modules.lazy import LazyModuleMixin

from ..batches.empty import own_forward
from ..layers.modules import SyncBatchNorm
from ..step.identity import forget
from .becoming import become, materialised
from .data_parallel import DataParallel
from .names import check_module, grouped
from .quantisation import without_observers
from .registry import Origin, default_origin

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_CONTEXTS = "_mask_sources", "_accumulator"  # what contexts around a layer set


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
    check_module("revert", module)
    left_alone: list[tuple[str, nn.Module]] = []
    reverted = []
    for name, layer in module.named_modules():
        if not isinstance(layer, SyncBatchNorm):
            continue
        origin = vars(layer).get("_origin") or default_origin(type(layer))
        ours = origin and type(layer) in (origin.target, materialised(origin.target))
        if origin is None or not ours or own_forward(layer) is not None:
            left_alone.append((name, layer))
            continue
        if "_origin" not in vars(layer):
            _narrow_statistics(layer)
        lazy = isinstance(layer, LazyModuleMixin)
        source = origin.source if lazy else materialised(origin.source)
        layer.skip_nonfinite = False
        forget(layer)
        _drop_attributes(layer, origin, source)
        become(layer, source)
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
            f"{grouped(left_alone, 400)}. Use syncbn.register_conversion(cls, sync_cls) to say "
            "what they stand for",
            stacklevel=2,
        )
    return module


def _drop_attributes(layer: SyncBatchNorm, origin: Origin, source: type) -> None:
    """All that convert and our layers have added, and the group that it had."""
    if origin.had_group or issubclass(source, nn.SyncBatchNorm):
        layer.process_group = origin.process_group
    else:
        vars(layer).pop("process_group", None)
    for attribute in ("_origin", "reproducible", *_CONTEXTS):
        vars(layer).pop(attribute, None)


def _narrow_statistics(layer: SyncBatchNorm) -> None:
    """Running statistics of the weight's dtype, the only one that torch's layers compute with."""
    for buffer in (layer.running_mean, layer.running_var):
        if buffer is not None and layer.weight is not None and buffer.dtype != layer.weight.dtype:
            buffer.data = buffer.data.to(layer.weight.dtype)


def _revert_wrappers(module: nn.Module) -> None:
    for wrapper in module.modules():
        revert_wrapper(wrapper)


def revert_wrapper(wrapper: nn.Module) -> None:
    """Make a torch.nn.DataParallel of one that convert has changed, and leave its layers."""
    if type(wrapper) is DataParallel and "_origin" in vars(wrapper):
        become(wrapper, vars(wrapper).pop("_origin"))
