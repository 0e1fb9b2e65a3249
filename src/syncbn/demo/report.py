"""What the demonstration says at its end: a table, a sentence, or JSON."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table

from .options import PLAIN, SYNCBN, WHOLE, Arm, DemoOptions
from .run import ArmReport, Report


def configuration(options: DemoOptions) -> str:
    """The batch and how it is split, for titles: ``One image per rank on 4 ranks``."""
    batch = options.batch_per_rank
    images = "One image" if batch == 1 else f"{batch} images"
    return f"{images} per rank on {options.ranks} rank{'s' if options.ranks > 1 else ''}"


def of(report: Report, arm: Arm) -> ArmReport:
    """The report of one arm."""
    return next(found for found in report.arms if found.arm == arm)


def table(report: Report) -> Table:
    """One row per arm, for a terminal of 80 columns."""
    options = report.options
    epochs = f"{options.epochs} epoch{'s' if options.epochs > 1 else ''}"
    out = Table(
        title=f"{configuration(options)}, {epochs}, seed {options.seed}",
        caption=(
            f"Weights: largest relative difference to one process after {options.check_steps} "
            "float64 steps. Loss: training, last part of the run. Step: median."
        ),
        box=box.SIMPLE_HEAD,
    )
    out.add_column("Arm", no_wrap=True)
    for heading in ("validation\naccuracy (%)", "final\nloss (nats)", "time per\nstep (s)"):
        out.add_column(heading, justify="right")
    out.add_column("weights differ\n(relative)", justify="right")
    for arm in report.arms:
        difference = arm.weight_difference
        out.add_row(
            arm.arm.label,
            f"{arm.accuracy_percent:.1f}",
            f"{arm.loss:.3f}",
            f"{arm.seconds_per_step:.4f}",
            "reference" if difference is None else f"{difference:.1e}",
        )
    return out


def sentence(report: Report) -> str:
    """The finding, in numbers of this run."""
    plain, sync, whole = (of(report, arm) for arm in (PLAIN, SYNCBN, WHOLE))
    return (
        f"{configuration(report.options)}: BatchNorm reaches {plain.accuracy_percent:.0f} %, "
        f"syncbn {sync.accuracy_percent:.0f} %, one process with the whole batch "
        f"{whole.accuracy_percent:.0f} %; syncbn's weights are the one process's to "
        f"{sync.weight_difference:.0e}."
    )


def as_json(report: Report, *, picture: str | None) -> str:
    """One JSON object with everything that was measured; a number that is not finite is null."""
    content = {
        "options": asdict(report.options),
        "arms": {arm.arm.key: _arm_as_dict(arm) for arm in report.arms},
        "picture": picture,
        "seconds": report.seconds,
        "versions": report.versions,
    }
    return json.dumps(_finite(content), indent=2, allow_nan=False)


def _arm_as_dict(arm: ArmReport) -> dict[str, Any]:
    content = asdict(arm)
    return {"label": content.pop("arm")["label"], **content}


def _finite(content: Any) -> Any:
    if isinstance(content, dict):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, (list, tuple)):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
