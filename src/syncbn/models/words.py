"""What convert warns of: layers that it left alone, and calls that change nothing."""

from __future__ import annotations

import logging
import warnings

from .names import grouped, shortened
from .plan import OVERRIDES, Plan

_LONGEST = 600  # characters of a warning
_log = logging.getLogger("syncbn")
_REGISTER = (
    "Use syncbn.register_conversion(cls, sync_cls) to convert them, or where= to leave them out"
)


def warn(plan: Plan, kind: str, stacklevel: int) -> None:
    """Say what a plan leaves as it is. kind: the model's class, in words."""
    if plan.frozen:
        _log.info("convert: frozen, and so left as they are: %s", grouped(plan.frozen, 400))
    for text in _texts(plan, shortened(kind, 80)):
        short = text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
        warnings.warn(short, stacklevel=stacklevel + 1)


def _texts(plan: Plan, kind: str) -> list[str]:
    if plan.changes or plan.ours:
        return [f"convert: {reason}" for reason in _reasons(plan, _LONGEST - 10)]
    if plan.left or plan.compiled:
        room = (_LONGEST - 90) // (len(plan.left) + bool(plan.compiled))
        first, *others = _reasons(plan, room)
        return [
            "convert: nothing at all was converted, and each rank will normalise its own batch: "
            + ". ".join([first, *(other[0].upper() + other[1:] for other in others)])
        ]
    if plan.has_graphs or plan.may_be_empty:
        return []
    if plan.passed_over:
        count = len(plan.passed_over)
        return [
            f"convert: where chose none of the model's {count} batch norm{'s'[: count > 1]}: "
            f"{grouped(plan.passed_over, 400)}; it is called with such a name and the layer"
        ]
    frozen = f" but frozen ones: {grouped(plan.frozen, 300)}" if plan.frozen else ""
    return [
        "convert: expected a model with batch norms (torch.nn.BatchNorm*, SyncBatchNorm, or a "
        f"registered class), found none in {kind}{frozen}; layers such as GroupNorm have no "
        "statistics of a batch"
    ]


def _reasons(plan: Plan, room: int) -> list[str]:
    """What was left alone or may wait, and why, each in about ``room`` characters."""
    texts = []
    if plan.compiled:
        shown = [*plan.compiled[:3], *["…"][: len(plan.compiled) > 3]]
        texts.append(
            "left alone, because they are compiled, and will normalise each rank's batch by "
            f"itself: {', '.join(shown)}. Convert the model they were made of, which torch.compile "
            "takes, or leave them out with where="
        )
    for reason, layers in plan.unsafe.items():
        rest = room - len(reason) - 25
        texts.append(f"may wait for ever, {reason}: {grouped(layers, rest)}")
    for reason, layers in plan.left.items():
        remedy = f". {_REGISTER}" if reason == OVERRIDES or "layout" in reason else ""
        rest = room - len(reason) - len(remedy) - 20
        texts.append(f"left alone, {reason}: {grouped(layers, rest)}{remedy}")
    return texts
