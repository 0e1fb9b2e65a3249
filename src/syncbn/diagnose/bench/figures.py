"""From times to figures: medians, spreads, ratios, and what dominates: arithmetic or exchange."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from .measure import ALONE, EXCHANGE, SYNCBN, Times
from .options import Case
from .timing import summary

PASSES = ("forward", "backward", "both")
ARITHMETIC, MESSAGES, WAITING = "arithmetic", "messages", "waiting"


@dataclass(frozen=True)
class Timing:
    """Median ± half the interquartile distance, in ms, and times syncbn's (median of rounds)."""

    median_ms: float
    spread_ms: float
    over_syncbn: float


Kinds = dict[str, dict[str, Timing]]  # kind → pass → timing


@dataclass(frozen=True)
class Row:
    """The figures of one case, of one call."""

    case: Case
    times: Kinds


@dataclass(frozen=True)
class Balance:
    """Where the time of forward and backward goes, in shares of 1.

    The exchange is messages and waiting.

    Attributes:
        arithmetic: the time without a group over the time with it.
        messages: the time of the messages by themselves over it, at most what is left.
        waiting: the rest, for ranks are never at the same point at the same time.
    """

    arithmetic: float
    messages: float
    waiting: float

    @property
    def dominates(self) -> Literal["arithmetic", "exchange", "nothing"]:
        """What takes more than half; "nothing" only where each takes exactly a half."""
        if self.arithmetic == 0.5:
            return "nothing"
        return "arithmetic" if self.arithmetic > 0.5 else "exchange"

    @property
    def by(self) -> Literal["messages", "waiting"] | None:
        """The larger part of an exchange that dominates; else None."""
        if self.dominates != "exchange":
            return None
        return "messages" if self.messages >= self.waiting else "waiting"


def row_of(case: Case, times: Times) -> Row:
    """Of the times of one case."""
    return Row(case, _kinds(times))


def total_of(cases: Sequence[Case], times: Sequence[Times]) -> Kinds:
    """Of all calls together: each round's times added up over the cases, as often as they occur."""
    rounds = range(len(times[0][SYNCBN]))
    return _kinds(
        {
            kind: [
                tuple(
                    sum(case.calls * each[kind][number][part] for case, each in zip(cases, times))  # noqa: B905
                    for part in range(2)
                )
                for number in rounds
            ]
            for kind in times[0]
        }
    )


def balance_of(kinds: Kinds) -> Balance | None:
    """None where one rank exchanges nothing."""
    if ALONE not in kinds:
        return None
    arithmetic = min(1.0, kinds[ALONE]["both"].over_syncbn)
    messages = min(1 - arithmetic, kinds[EXCHANGE]["both"].over_syncbn)
    return Balance(arithmetic, messages, 1 - arithmetic - messages)


def ranking(kinds: Kinds) -> tuple[str, ...]:
    """The layers by their time of forward and backward, the fastest first."""
    layers = [kind for kind in kinds if kind not in (ALONE, EXCHANGE)]
    return tuple(sorted(layers, key=lambda kind: kinds[kind]["both"].median_ms))


def _kinds(times: Times) -> Kinds:
    ours = _by_pass(times[SYNCBN])
    return {
        kind: {
            name: Timing(*summary(values, ours[name])) for name, values in _by_pass(rounds).items()
        }
        for kind, rounds in times.items()
    }


def _by_pass(rounds: Sequence[tuple[float, ...]]) -> dict[str, list[float]]:
    forward, backward = (list(values) for values in zip(*rounds, strict=True))
    return dict(zip(PASSES, (forward, backward, [sum(parts) for parts in rounds]), strict=True))
