"""From times to figures: medians, spreads, ratios, and what dominates: arithmetic or exchange."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .measure import ALONE, EXCHANGE, SYNCBN, Times
from .options import Case
from .timing import summary

PASSES = ("forward", "backward", "both")
ARITHMETIC, MESSAGES, WAITING, NOTHING = "arithmetic", "messages", "waiting", "nothing"


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

    Attributes:
        arithmetic: the time without a group over the time with it.
        messages: the time of the messages by themselves over it, at most what is left.
        waiting: the rest, for ranks are never at the same point at the same time.
    """

    arithmetic: float
    messages: float
    waiting: float

    @property
    def dominates(self) -> str:
        """What takes more than half: "arithmetic", "messages" or "waiting"; else "nothing"."""
        shares = {ARITHMETIC: self.arithmetic, MESSAGES: self.messages, WAITING: self.waiting}
        return next((name for name, share in shares.items() if share > 0.5), NOTHING)


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
