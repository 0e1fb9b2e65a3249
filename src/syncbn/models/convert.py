"""convert(): walk a model, swap the classes of its layers, lose nothing.

A layer stays the same object and only changes its class, as torch's lazy modules do: parameters,
buffers, hooks, attributes, sharing and references to it are untouched by construction.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch.nn as nn

from ..comm import group_size_for, resolve, subgroups
from ..layers.modules import SyncBatchNorm
from ..layers.replaced import watch_replacements
from ..step.identity import take_name
from .becoming import become
from .data_parallel import DataParallel
from .names import check_module, check_where
from .plan import Change, survey
from .words import warn

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def convert(
    module: ModuleT,
    process_group: Any = None,
    *,
    group_size: int | None = None,
    samples: int | None = None,
    batch_per_rank: int | None = None,
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

    Layers of timm, detectron2, mmengine, apex, inplace_abn, torchsparse, spconv and spikingjelly
    are known by their classes' names: docs/libraries.md. Other subclasses that change behaviour
    are left alone and named in one warning, by class with counts; :func:`register_conversion`
    teaches convert what to do with them. So are layers of a version with another layout, what a
    layer that is left alone holds, and batch norms inside what torch.jit, torch.export and torch.fx
    have compiled: convert before that.
    Nothing changes before all layers are seen. A warning of its own says that nothing at all was
    converted, that ``where`` chose no layer, or that the model has no batch norm. Layers that
    normalise by fixed numbers (FrozenBatchNorm2d) stay; the logger "syncbn" names them.

    Args:
        module: a model, or a single layer.
        process_group: as for :class:`SyncBatchNorm`; None leaves layers that have a group with it.
        group_size: instead of ``process_group``, normalise over groups of that many consecutive
            ranks: [0 … k−1], [k … 2k−1] and so on. 1 means local statistics. Every rank must make
            this call: the first with its k makes the groups, later ones share them.
        samples, batch_per_rank: instead of ``group_size``, how many samples statistics are to come
            from, and how many each rank has in a step: the least ``group_size`` that reaches them,
            within hosts where it can be (docs/when.md). Ranks compare these two.
        where: called with each layer's qualified name and the layer; False leaves it alone. A
            layer that is shared has several names and converts if where says so for one of them.
        reproducible, skip_nonfinite: as for :class:`SyncBatchNorm`; None leaves layers as they are.

    Returns:
        ``module`` itself.

    Raises:
        TypeError: ``module`` is no Module, ``where`` not callable, or a wrong ``process_group``.
        ValueError: a group that this rank is not in; a ``group_size`` that does not divide the
            number of ranks, comes with a ``process_group``, or before
            torch.distributed.init_process_group; ``samples`` without ``batch_per_rank``, beside
            another choice of groups, more than all ranks have, or others on other ranks.
        ValueError or TypeError: a layer, named, whose eps or momentum its forward would refuse.

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.BatchNorm2d(8))
        >>> model = syncbn.convert(model)
        >>> type(model[1]).__name__
        'SyncBatchNorm2d'
    """
    return convert_layers(
        module,
        process_group,
        where,
        group_size=choose_group_size(process_group, group_size, samples, batch_per_rank),
        reproducible=reproducible,
        skip_nonfinite=skip_nonfinite,
        stacklevel=3,
    )


def choose_group_size(
    process_group: Any, group_size: int | None, samples: int | None, batch_per_rank: int | None
) -> int | None:
    """The group_size that convert's arguments say, of which one alone may choose the groups."""
    given = {"process_group": process_group, "group_size": group_size, "samples": samples}
    chosen = [name for name, value in given.items() if value is not None]
    if len(chosen) > 1:
        values = " and ".join(f"{name}={given[name]!r}" for name in chosen)
        raise ValueError(
            f"convert: expected one of process_group, group_size and samples, got {values}; leave "
            "all but one out"
        )
    if (samples is None) != (batch_per_rank is None):
        raise ValueError(
            "convert: expected samples and batch_per_rank together, got "
            f"samples={samples!r} and batch_per_rank={batch_per_rank!r}; pass both, or group_size"
        )
    if samples is None or batch_per_rank is None:
        return group_size
    return group_size_for(samples, batch_per_rank)


def convert_layers(
    module: ModuleT,
    process_group: Any,
    where: Callable[[str, nn.Module], bool] | None = None,
    *,
    group_size: int | None = None,
    reproducible: bool | None = None,
    skip_nonfinite: bool | None = None,
    keep_ours: bool = False,
    stacklevel: int,
) -> ModuleT:
    """:func:`convert`, with warnings for the caller ``stacklevel`` frames above.

    keep_ours: let layers that are syncbn's already be as they are, options and names included.
    """
    check_module("convert", module)
    check_where("convert", where)
    watch_replacements()
    if group_size is not None:
        process_group = subgroups(group_size)
    resolve(process_group)
    plan = survey(module, where)
    for change in plan.changes:
        _apply(change)
    changed = ((change.name, change.layer) for change in plan.changes)
    for name, layer in (*([] if keep_ours else plan.ours), *changed):
        take_name(layer, name)
        if process_group is not None or group_size is not None:
            layer.process_group = process_group
        if reproducible is not None:
            layer.reproducible = reproducible
        if skip_nonfinite is not None:
            layer.skip_nonfinite = skip_nonfinite
    _convert_wrappers(module)
    warn(plan, type(module).__name__, stacklevel)
    return module


def _apply(change: Change) -> None:
    become(change.layer, change.origin.target, _origin=change.origin)
    if change.group is not None:
        vars(change.layer)["process_group"] = change.group


def _convert_wrappers(module: nn.Module) -> None:
    for wrapper in [each for each in module.modules() if type(each) is nn.DataParallel]:
        if any(isinstance(layer, SyncBatchNorm) for layer in wrapper.modules()):
            become(wrapper, DataParallel, _origin=nn.DataParallel)
