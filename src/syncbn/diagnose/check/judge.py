"""From comparisons to a judgement: which layer departs first."""

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
    not_finite: list[str] = field(default_factory=list)  # modules whose values are nan or infinite

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
        evidence.not_finite = evidence.not_finite or step.not_finite()
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
