"""What to do with a layer, from what its batches are worth."""

from __future__ import annotations

import math
from dataclasses import dataclass

# How many independent values a mean should come from. Published practice is 16 to 64 samples:
# batches of 16 per device train ResNet-50 as well as 32 (23.7 and 23.6 % error; Y. Wu & K. He,
# "Group Normalization", 2018, arXiv:1803.08494, table 2), and large runs normalise over groups of
# 32 to 64 samples (C. Ying et al., "Image Classification at Supercomputer Scale", 2018,
# arXiv:1811.06992). Of 32 independent values the mean is 0.18 deviations off.
ENOUGH = 32.0
# Fewer than that in all are past help: there, batches of 4 cost 3.7 % error, of 2 eleven.
FEW = 4.0
_MARGIN = 1 - 1e-9  # so that 32 samples, computed as 31.999…, are enough


@dataclass(frozen=True)
class Situation:
    """effective_size: independent values in one rank's batch; nan where none was measured.
    cost, step: seconds that the layer's exchanges take in a step, and that a step takes; nan.
    """

    ranks: int
    effective_size: float
    cost: float
    step: float


@dataclass(frozen=True)
class Advice:
    """What to do with one layer: true where it should be synchronised; ``str()`` says why.

    action: "synchronise", "leave local" or "freeze". group_size: over how many consecutive ranks to
    synchronise, which is a divisor of their number; 1 for a layer that is left alone. noise: the
    standard error of the mean of one rank's batch, relative to the deviation; nan if not measured.
    cost: seconds per step that the layer's exchanges would take.
    """

    action: str
    group_size: int
    noise: float
    cost: float
    text: str

    def __bool__(self) -> bool:
        return self.action == "synchronise"

    def __str__(self) -> str:
        return self.text


def advise(situation: Situation) -> Advice:
    """Synchronise where one rank's batch is worth less than ENOUGH, over as few ranks as do."""
    ranks, own = situation.ranks, situation.effective_size
    noise = own**-0.5 if own > 0 else math.nan
    if not own > 0:
        why = "leave local: it got no values in training, or none that are finite and differ"
        return Advice("leave local", 1, noise, situation.cost, why)
    has = f"one rank's batch is worth {_number(own)} independent values"
    off = f"its mean is about {noise:.2f} deviations off"
    enough = f"{ENOUGH:g} are enough"
    if own >= ENOUGH * _MARGIN:
        costs = _costs(situation, "synchronising would cost")
        text = f"leave local: {has}, and {enough} ({off}){costs}"
        return Advice("leave local", 1, noise, situation.cost, text)
    if ranks == 1:
        wanted = math.ceil(ENOUGH * _MARGIN / own)
        text = (
            f"synchronise, once there are more ranks than this one: {has}, and {enough} ({off}); "
            f"{wanted} ranks with such batches would do, or a batch {wanted} times as large"
        )
        return Advice("synchronise", 1, noise, situation.cost, text)
    if ranks * own < FEW * _MARGIN:
        text = (
            f"freeze: even all {ranks} ranks' batches together are worth "
            f"{_number(ranks * own)} independent values, less than {FEW:g}; keep the running "
            "statistics of a trained model (eval mode), take larger batches, or a layer without "
            "statistics of a batch"
        )
        return Advice("freeze", 1, noise, situation.cost, text)
    size = next(
        (k for k in range(2, ranks) if ranks % k == 0 and k * own >= ENOUGH * _MARGIN),
        ranks,
    )
    over = f"all {ranks} ranks" if size == ranks else f"groups of {size} ranks, which is enough"
    together = f"{size} ranks' together {_number(size * own)}"
    text = f"synchronise over {over}: {has}, {together}, and {enough} ({off})"
    text += _costs(situation, "costs")
    return Advice("synchronise", size, noise, situation.cost, text)


def _costs(situation: Situation, verb: str) -> str:
    if situation.ranks == 1 or math.isnan(situation.cost):
        return ""
    of = "" if math.isnan(situation.step) else f" of {_time(situation.step)}"
    return f"; {verb} about {_time(situation.cost)} per step{of}"


def _number(value: float) -> str:
    return f"{value:.0f}" if value >= 10 else f"{value:.1f}"


def _time(seconds: float) -> str:
    if seconds >= 1:
        return f"{seconds:.2g} s"
    return f"{seconds * 1e3:.2g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.0f} µs"
