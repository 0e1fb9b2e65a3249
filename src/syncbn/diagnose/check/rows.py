"""What is said of each layer."""

from __future__ import annotations

from dataclasses import dataclass

from .compare import CALLS, DIFFERENT, EQUAL, LOSS, ROUNDING, THE_LOSS, Finding
from .judge import THE_MODEL, Departure, Evidence

RAISED, NOT_COMPARED = "raises", "not compared"
_WORST = (RAISED, CALLS, DIFFERENT, ROUNDING, EQUAL, NOT_COMPARED)


@dataclass(frozen=True)
class Row:
    """A layer: how far it is from one process, at most, over all steps, calls and ranks.

    Attributes:
        layer: its name in the model.
        kind: its class on the ranks.
        synchronised: for batch norms, whether they normalise over all ranks; None for others.
        calls: how often one process called it.
        calls_on_ranks: how often each rank did; nothing for the loss.
        differences: quantity → relative difference; only what was compared.
        verdict: equal, rounding, different, calls differ, raises or not compared.
        first: whether it is the first that departs.
    """

    layer: str
    kind: str
    synchronised: bool | None
    calls: int
    calls_on_ranks: tuple[int, ...]
    differences: dict[str, float]
    verdict: str
    first: bool


def rows(evidence: Evidence, found: Departure | None) -> tuple[Row, ...]:
    """One for every layer in forward order, the model as a whole and the loss."""
    first = found.layer if found else None
    by_layer: dict[str, list[Finding]] = {}
    for each in evidence.findings:
        by_layer.setdefault(each.layer or THE_MODEL, []).append(each)
    names = evidence.layers
    if first is not None and first not in (*names, THE_MODEL, THE_LOSS):
        names = _with_block(names, first)
    return tuple(
        _row(evidence, name, by_layer.get(name, []), first)
        for name in (*names, THE_MODEL, THE_LOSS)
    )


def _with_block(names: list[str], block: str) -> list[str]:
    """A block before its first layer."""
    place = [n for n, name in enumerate(names) if name.startswith(f"{block}.")]
    at = place[0] if place else len(names)
    return [*names[:at], block, *names[at:]]


def _row(evidence: Evidence, name: str, findings: list[Finding], first: str | None) -> Row:
    module = "" if name == THE_MODEL else name
    facts = evidence.ranks[0].get(module) or evidence.alone.get(module, {})
    differences: dict[str, float] = {}
    for each in findings:
        if each.verdict != CALLS:
            worst = max(differences.get(each.quantity, 0.0), each.relative)
            differences[each.quantity] = worst
    verdicts = {each.verdict for each in findings} | {NOT_COMPARED}
    if evidence.raised and name == first:
        verdicts.add(RAISED)
    counts = [] if name == THE_LOSS else [count[module] for count in evidence.counts]
    return Row(
        layer=name,
        kind=LOSS if name == THE_LOSS else facts.get("kind", "?"),
        synchronised=synchronised(evidence, module),
        calls=counts[0] if counts else 0,
        calls_on_ranks=tuple(counts[1:]),
        differences=differences,
        verdict=next(each for each in _WORST if each in verdicts),
        first=name == first,
    )


def synchronised(evidence: Evidence, name: str) -> bool | None:
    """Whether a batch norm normalises over all ranks, on each of them; None for other layers."""
    facts = [each[name] for each in evidence.ranks if name in each]
    if not facts or not any(each["norm"] or "group" in each for each in facts):
        return None
    return all(each["training"] and each.get("group") == each.get("world", 0) for each in facts)
