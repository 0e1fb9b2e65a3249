"""From comparisons to a judgement: which layer departs first, and what each layer's row says."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .compare import (
    CALLS,
    DIFFERENT,
    EQUAL,
    LOSS,
    OUTPUT,
    OUTPUT_GRADIENT,
    ROUNDING,
    THE_LOSS,
    Finding,
    Step,
)
from .options import Task
from .train import RANKS, Raised

THE_MODEL = "(model)"
RAISED, NOT_COMPARED = "raises", "not compared"
_WORST = (RAISED, CALLS, DIFFERENT, ROUNDING, EQUAL, NOT_COMPARED)


@dataclass
class Evidence:
    """All that the runs have left, as far as they went."""

    task: Task
    alone: dict[str, dict[str, Any]]  # facts of the reference's modules
    ranks: list[dict[str, dict[str, Any]]]  # and of every rank's
    seen: dict[str, dict[str, str]]
    raised: Raised | None
    findings: list[Finding] = field(default_factory=list)
    order: list[str] = field(default_factory=list)  # modules as they end in one process
    counts: list[Counter[str]] = field(default_factory=list)  # in one process, then on each rank
    losses: list[tuple[float, list[float]]] = field(default_factory=list)

    @property
    def layers(self) -> list[str]:
        """Modules that compute by themselves, in forward order; those that nobody calls last."""
        known = dict.fromkeys([*self.order, *self.alone])
        return [name for name in known if name and self.alone.get(name, {}).get("leaf")]


def gathered(task: Task, folder: Path, raised: Raised | None) -> Evidence:
    """Read what the ranks have written. Steps that some rank has not ended are left out."""
    ranks = [_read(folder / f"facts-{rank}.json") for rank in range(task.ranks)]
    alone = _read(folder / "facts-reference.json")
    evidence = Evidence(task, alone, ranks, _read(folder / "seen.json"), raised)
    evidence.counts = [Counter() for _ in range(task.ranks + 1)]
    for number in range(task.steps):
        files = [folder / f"{RANKS}-{rank}-step-{number}.pt" for rank in range(task.ranks)]
        if not all(file.exists() for file in files):
            break
        step = Step(task, folder, number)
        evidence.findings += step.findings()
        evidence.losses.append(step.losses())
        for total, count in zip(evidence.counts, step.counts(), strict=True):
            total.update(count)
        evidence.order = evidence.order or list(
            dict.fromkeys(event["name"] for event in step.reference["events"])
        )
    return evidence


def _read(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return content


@dataclass(frozen=True)
class Departure:
    """Where ranks depart first. finding: the comparison that shows it, if no rank raised."""

    layer: str
    finding: Finding | None
    backward: bool = False


def departure(evidence: Evidence) -> Departure | None:
    """The first departure in the order in which things are computed; None: all is equal."""
    first = next((each for each in evidence.findings if each.verdict != EQUAL), None)
    if first is None:
        return None if evidence.raised is None else Departure(_raiser(evidence), None)
    # What rounding moves hides no fault that shows without it in the same step.
    sure = [
        each
        for each in evidence.findings
        if each.step == first.step and each.verdict in (DIFFERENT, CALLS) and each.input == EQUAL
    ]
    if first.verdict == ROUNDING and sure:
        first = sure[0]
    if first.verdict == CALLS:
        return Departure(_outermost(first, evidence), first)
    if first.quantity == OUTPUT:
        return Departure(_entered_equal(first, evidence.findings), first)
    if first.quantity == OUTPUT_GRADIENT:
        return Departure(_left_equal(first, evidence.findings), first, backward=True)
    return Departure(_called(first.layer, evidence), first)


def _called(layer: str, evidence: Evidence) -> str:
    """The layer itself or, where only its weights are used, the innermost module that is called."""
    while layer and layer not in evidence.order and layer != THE_LOSS:
        layer = layer.rpartition(".")[0]
    return layer or THE_MODEL


def _raiser(evidence: Evidence) -> str:
    """The layer at which a rank raised; of ranks out of step, the one that some did not call."""
    raised = evidence.raised
    assert raised is not None
    ranks = evidence.ranks
    if raised.said:
        modes = {
            name
            for name in evidence.alone
            if len({facts[name]["training"] for facts in ranks if name in facts}) > 1
        }
        named = set(re.findall(r"forward of layer '(.*?)'", " ".join(raised.said)))
        suspects = modes or named
    elif not raised.modules:  # DistributedDataParallel refuses them, before any forward
        suspects = {name for name, facts in ranks[0].items() if facts.get("torch_sync")}
    else:
        suspects = {raised.modules[-1]}
    first = [name for name in evidence.alone if name in suspects]
    return (first or [""])[0] or THE_MODEL


def _outermost(finding: Finding, evidence: Evidence) -> str:
    """A block that is called another number of times takes its layers with it."""
    other = {each.layer for each in evidence.findings if each.verdict == CALLS}
    outer = [name for name, _ in finding.parents if name in other]
    return (outer or [finding.layer])[0] or THE_MODEL


def _entered_equal(finding: Finding, findings: Iterable[Finding]) -> str:
    """The innermost module around a departing output whose input is still equal."""
    if finding.input == EQUAL:
        return finding.layer or THE_MODEL
    outputs = {
        (each.layer, each.call): each
        for each in findings
        if each.step == finding.step and each.quantity == OUTPUT
    }
    for parent in reversed(finding.parents):
        if parent in outputs and outputs[parent].input == EQUAL:
            return parent[0] or THE_MODEL
    return THE_MODEL


def _left_equal(finding: Finding, findings: Iterable[Finding]) -> str:
    """The module through which backward went before the first gradient that departs."""
    around = set(finding.parents)
    before = ""
    for each in findings:
        if each.step != finding.step or each.quantity != OUTPUT_GRADIENT:
            continue
        if each == finding:
            break
        if (each.layer, each.call) not in around:
            before = each.layer
    return before or THE_LOSS


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
