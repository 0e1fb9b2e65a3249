"""Why ranks depart: the likeliest of the usual causes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .compare import CALLS, EQUAL, LOSS, OUTPUT, ROUNDING, Finding
from .judge import THE_MODEL, Departure, Evidence
from .options import TOLERANCES
from .words import said, times

_NAMED = 5  # layers that a sentence names before it counts the rest
_HALVES = ("bfloat16", "float16")


@dataclass(frozen=True)
class Cause:
    """Why a layer departs.

    kind: not converted, left alone, eval, group, random, function, calls, loss, half, rounding,
    data, raises, backward or unknown. text: what is wrong and what to do.
    """

    layer: str
    kind: str
    text: str


def cause(evidence: Evidence, found: Departure) -> Cause:
    """The likeliest cause of the first departure."""
    kind, text = next(_candidates(evidence, found))
    return Cause(found.layer, kind, text)


def _candidates(evidence: Evidence, found: Departure) -> Iterator[tuple[str, str]]:
    """(kind, text), the most certain first."""
    module = "" if found.layer == THE_MODEL else found.layer
    finding = found.finding
    if finding is None:
        yield from _raised(evidence, module)
    elif finding.verdict == CALLS:
        yield "calls", _calls(evidence, module)
    elif finding.quantity == LOSS:
        yield _loss(evidence, finding)
    else:
        if found.layer == THE_MODEL and _data_differ(evidence, finding.step):
            yield "data", said("data")
        yield from _norm(evidence, module)
        yield from _operators(evidence, found, module)
        yield from _precision(evidence, finding, module)
        yield _by_itself(found, finding)


def _raised(evidence: Evidence, name: str) -> Iterator[tuple[str, str]]:
    raised = evidence.raised
    assert raised is not None
    what = said(
        "raises",
        rank=raised.rank,
        kind=raised.kind,
        step=raised.step + 1,
        text=raised.text[:300] + ("…" if len(raised.text) > 300 else ""),
    )
    for kind, text in _norm(evidence, name):
        yield kind, f"{text} {what}"
    if raised.said:
        ranks = "; ".join(f"rank {rank}: {text}" for rank, text in enumerate(raised.said))
        yield "raises", said("desync", text=f"{ranks}.")
    yield "raises", what


def _data_differ(evidence: Evidence, step: int) -> bool:
    return any(
        each.step == step and not each.layer and each.quantity == OUTPUT and each.input != EQUAL
        for each in evidence.findings
    )


def _norm(evidence: Evidence, name: str) -> Iterator[tuple[str, str]]:
    """What a batch norm is, on the ranks."""
    ranks = [each.get(name, {}) for each in evidence.ranks]
    facts = ranks[0]
    if not (facts.get("norm") or "group" in facts):
        return
    cls = facts["class"]
    asleep = [rank for rank, each in enumerate(ranks) if not each.get("training", True)]
    if evidence.alone.get(name, {}).get("training") and asleep:
        where = "on all ranks" if len(asleep) == len(ranks) else f"on rank {asleep[0]}"
        yield "eval", said("eval", cls=cls, where=where)
    elif "group" in facts:
        if facts["group"] < facts["world"]:
            yield "group", said("group", group=facts["group"], world=facts["world"])
    elif facts["torch_sync"]:
        yield "not converted", said("torch")
    else:
        kind = "left alone" if facts["left_alone"] else "not converted"
        others = _others(evidence, name)
        yield kind, said(kind, cls=cls, name=facts["kind"], others=others)


def _others(evidence: Evidence, name: str) -> str:
    """The layers of which the same is to be said."""
    facts = evidence.ranks[0]
    alike = [
        other
        for other in evidence.layers
        if other != name
        and facts.get(other, {}).get("left_alone") is facts[name]["left_alone"]
        and facts[other]["training"]
    ]
    if not alike:
        return ""
    return f" (and so {'does' if len(alike) == 1 else 'do'} {_listed(alike)})"


def _listed(names: Sequence[str]) -> str:
    more = len(names) - _NAMED
    listed = ", ".join(name or THE_MODEL for name in names[:_NAMED])
    return f"{listed} and {more} more" if more > 0 else listed


def _operators(evidence: Evidence, found: Departure, name: str) -> Iterator[tuple[str, str]]:
    """Operators that ran in the module itself."""
    seen = evidence.seen.get(name, {})
    finding = found.finding
    if "random" in seen:
        yield "random", said("random", operator=seen["random"])
    elif finding and finding.random and finding.layer == name:
        yield "random", said("random", operator="another seed gives another output")
    if "batch_norm" in seen and not evidence.alone.get(name, {}).get("norm"):
        yield "function", said("function", operator=seen["batch_norm"])


def _precision(evidence: Evidence, finding: Finding, name: str) -> Iterator[tuple[str, str]]:
    dtype = evidence.task.dtype
    half = evidence.seen.get(name, {}).get("half") or ("its output" if finding.half else "")
    small = finding.quantity != OUTPUT or finding.relative <= TOLERANCES["bfloat16"]
    if dtype in _HALVES or (half and small):
        yield "half", said("half", operator=half or dtype, relative=finding.relative)
    if finding.verdict == ROUNDING:
        yield "rounding", said("rounding")


def _by_itself(found: Departure, finding: Finding) -> tuple[str, str]:
    if found.backward:
        return "backward", said("backward")
    if finding.quantity == OUTPUT:
        return "unknown", said("forward")
    return "unknown", said("weight", quantity=finding.quantity.replace("_", " "))


def _calls(evidence: Evidence, name: str) -> str:
    alone, *ranks = (count[name] for count in evidence.counts)
    rank = next(rank for rank, count in enumerate(ranks) if count != alone)
    return said("calls", alone=times(alone), rank=rank, there=times(ranks[rank]))


def _loss(evidence: Evidence, finding: Finding) -> tuple[str, str]:
    """From the numbers of one process and of the ranks, while all outputs are equal."""
    if finding.verdict == ROUNDING:
        return "rounding", said("rounding")
    whole, ranks = evidence.losses[finding.step]
    shares = evidence.task.shares
    split = " + ".join(map(str, shares))
    uneven = len(set(shares)) > 1
    most = evidence.task.tolerance * max(map(abs, (whole, *ranks)))

    def equal(value: float) -> bool:
        return abs(value - whole) <= most

    key = "no mean"
    if uneven and equal(sum(ranks) / len(ranks)):
        key = "own weights"
    elif uneven and max(ranks) - min(ranks) <= most:
        key = "uneven"
    elif equal(sum(ranks)):
        key = "sum"
    return "loss", said(key, split=split)


def notes(evidence: Evidence, found: Departure | None) -> list[str]:
    """What is no fault, but good to know."""
    task, sentences = evidence.task, []
    norms = [name for name, each in evidence.alone.items() if each.get("norm") or "group" in each]
    frozen = [name for name in norms if not evidence.alone[name]["training"]]
    if frozen:
        sentences.append(f"In eval mode everywhere, normalising no batch: {_listed(frozen)}.")
    if not norms:
        sentences.append("The model has no batch norm.")
    if len(set(task.shares)) > 1:
        sentences.append(
            f"{task.batch} samples on {task.ranks} ranks are "
            f"{' + '.join(map(str, task.shares))}: the check weighed each rank's loss by its "
            "samples, n·ranks/batch. A training loop that does not do so departs from one process."
        )
    random = [name for name, each in evidence.seen.items() if "random" in each]
    if random and (found is None or found.layer not in random):
        sentences.append(f"Random numbers are drawn in: {_listed(random)}.")
    if evidence.not_finite:
        sentences.append(
            "Nan or infinity in one process, too, first in "
            f"{_listed(evidence.not_finite[:1])}: whether ranks would train alike on numbers is "
            "not shown from there on."
        )
    silent = [name for name in evidence.layers if not evidence.counts[0][name]]
    if silent and evidence.order:
        sentences.append(f"Never called: {_listed(silent)}.")
    return sentences
