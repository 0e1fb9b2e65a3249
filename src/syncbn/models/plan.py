"""What convert is to do with every layer of a model, found out before the first one changes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch.nn as nn

from ..batches.empty import own_forward
from ..layers.modules import SyncBatchNorm
from ..step.checks import check_options
from .graphs import compiled_batch_norms, has_graphs
from .known.table import held_back, is_frozen_class, why_alone
from .names import described, names_of_modules, shortened
from .registry import Origin, is_candidate, known_rule, target_of

Named = tuple[str, Any]
OVERRIDES = "because they override BatchNorm's behaviour"
_LAYOUT = "because of another version's layout than the one that syncbn knows"


class Change(NamedTuple):
    """A layer that becomes one of ours. group: that of a class that keeps it by another name."""

    name: str
    layer: Any
    origin: Origin
    group: Any


@dataclass
class Plan:
    """Every batch norm of a model, in one of these.

    changes: those that become ours. ours: those that are; unsafe: of these, by the reason,
    those that what holds them may pass by. left: the others, by the reason.
    compiled: in graphs, in words. passed_over: which where does not want. frozen: of classes that
    normalise by fixed numbers, which stay as they are. has_graphs: whether parts are compiled,
    which tell nothing of batch norms that use their running statistics. may_be_empty: whether
    where, a Monitor's for example, has reasons to choose none.
    """

    changes: list[Change] = field(default_factory=list)
    ours: list[Named] = field(default_factory=list)
    unsafe: dict[str, list[Named]] = field(default_factory=dict)
    left: dict[str, list[Named]] = field(default_factory=dict)
    compiled: list[str] = field(default_factory=list)
    passed_over: list[Named] = field(default_factory=list)
    frozen: list[Named] = field(default_factory=list)
    has_graphs: bool = False
    may_be_empty: bool = False


def survey(module: nn.Module, where: Callable[[str, nn.Module], bool] | None) -> Plan:
    """Ask where about every batch norm, and decide about those that it wants.

    Raises ValueError or TypeError for a layer whose eps or momentum its forward would refuse.
    """
    plan, reasons = Plan(), _reasons(module)
    for layer, names in names_of_modules(module).items():
        if _is_frozen(type(layer)):
            plan.frozen.append((names[0], layer))
            continue
        why = reasons.get(layer, "")
        if not (why or is_candidate(layer)):
            continue
        if where is not None and not any(where(name, layer) for name in names):
            plan.passed_over.append((names[0], layer))
        elif isinstance(layer, SyncBatchNorm):
            plan.ours.append((names[0], layer))
            if why:
                plan.unsafe.setdefault(why, []).append((names[0], layer))
        elif why:
            plan.left.setdefault(why, []).append((names[0], layer))
        else:
            plan.changes.append(_change(names[0], layer))
    plan.compiled = [
        f"{shortened(name or 'the module itself', 50)} ({what})"
        for name, holder, what in compiled_batch_norms(module)
        if where is None or where(name, holder)
    ]
    plan.may_be_empty = bool(plan.passed_over) and getattr(where, "may_choose_none", False)
    plan.has_graphs = has_graphs(module)
    for change in plan.changes:
        _check_options(change.name, change.layer)
    return plan


def _reasons(module: nn.Module) -> dict[nn.Module, str]:
    """Why layers stay: for their own sake, their holders', or with a layer that stays whole."""
    alone = {layer: why for layer in module.modules() if (why := _why(layer))}
    inside = {
        part: why
        for layer, why in reversed(alone.items())  # the outermost has the last word
        for part in layer.modules()
        if is_candidate(part) and not isinstance(part, SyncBatchNorm)
    }
    return inside | alone | held_back(module)


def _is_frozen(cls: type[nn.Module]) -> bool:
    """Whether it normalises by fixed numbers, and nobody has registered what it becomes."""
    ours = issubclass(cls, SyncBatchNorm)
    return not ours and is_frozen_class(cls) and target_of(cls) is None


def _why(layer: nn.Module) -> str:
    cls = type(layer)
    if isinstance(layer, SyncBatchNorm) or _is_frozen(cls):
        return ""
    target = target_of(cls)
    if target is None and (why := why_alone(cls)):
        return why
    if not is_candidate(layer):
        return ""
    known = known_rule(layer)
    if known is not None and (problem := known[0].misfit(known[1], layer)):
        return f"{_LAYOUT} ({shortened(problem, 240)})"
    return OVERRIDES if target is None or own_forward(layer) is not None else ""


def _change(name: str, layer: nn.Module) -> Change:
    target, known, state = target_of(type(layer)), known_rule(layer), vars(layer)
    assert target is not None, "what has none has a reason to stay"
    origin = Origin(type(layer), target, state.get("process_group"), "process_group" in state)
    held_as = known[0].group if known else ""
    return Change(name, layer, origin, getattr(layer, held_as, None) if held_as else None)


def _check_options(name: str, layer: Any) -> None:
    """Refuse, by the layer's name, what its forward would refuse."""
    momentum = getattr(layer, "momentum", None)
    try:
        check_options(0.0 if momentum is None else momentum, getattr(layer, "eps", 1e-5))
    except (TypeError, ValueError) as error:
        said = str(error).partition(": ")[2]
        raise type(error)(f"convert: layer {described(name, layer)}: {said}") from None
