"""The three arms, one after the other, and what they found."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from .. import launch
from ..versions import versions
from . import train
from .data import Digits
from .options import ARMS, WHOLE, Arm, DemoOptions
from .train import Outcome, Point, Progress, Task


@dataclass(frozen=True)
class ArmReport:
    """What one arm found; weight_difference is None for the arm the others are compared with."""

    arm: Arm
    accuracy_percent: float
    loss: float
    validation_loss: float
    seconds_per_step: float
    weight_difference: float | None
    curve: tuple[Point, ...]


@dataclass(frozen=True)
class Report:
    """All arms in the order of ARMS, the seconds they took together and the versions used."""

    options: DemoOptions
    arms: tuple[ArmReport, ...]
    seconds: float
    versions: dict[str, str]


def run(
    options: DemoOptions, digits: Digits, *, on_progress: Callable[[Arm, Progress], None]
) -> Report:
    """Train the arms in turn, each in processes of its own.

    Raises:
        RankFailed: a rank died; no process is left.
        KeyboardInterrupt, SystemExit: told to stop by a signal; no process is left.
    """
    start = time.perf_counter()
    outcomes: dict[Arm, Outcome] = {}
    for arm in ARMS:
        task = Task(arm, options, digits)

        def pass_on(progress: Progress, arm: Arm = arm) -> None:
            on_progress(arm, progress)

        outcomes[arm] = launch.launch(train.run_rank, task, ranks=task.ranks, on_message=pass_on)
    return Report(
        options=options,
        arms=tuple(_arm_report(arm, outcomes[arm], outcomes[WHOLE]) for arm in ARMS),
        seconds=time.perf_counter() - start,
        versions=versions(),
    )


def weight_difference(outcome: Outcome, reference: Outcome) -> float:
    """max over parameters of max |w − w_ref| / max |w_ref|, after the float64 steps."""
    return max(
        float((outcome.weights[name] - wanted).abs().max() / wanted.abs().max())
        for name, wanted in reference.weights.items()
    )


def _arm_report(arm: Arm, outcome: Outcome, reference: Outcome) -> ArmReport:
    return ArmReport(
        arm=arm,
        accuracy_percent=outcome.curve[-1].accuracy_percent,
        loss=outcome.loss,
        validation_loss=outcome.curve[-1].loss,
        seconds_per_step=outcome.seconds_per_step,
        weight_difference=None if arm == WHOLE else weight_difference(outcome, reference),
        curve=outcome.curve,
    )
