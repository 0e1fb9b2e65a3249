"""Sections: each prints one line, catches its own failure and ends when its time is over."""

from __future__ import annotations

import json
import signal
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple, NoReturn

from .machine import Machine

WHOLE = 300  # seconds that a run may take
_PATIENCE = 5
_WORDS = 400  # characters of an error that a line shows


class Overrun(BaseException):
    """The time of a section is over; nothing that catches exceptions is to catch it."""


class Skipped(Exception):
    """A section cannot run here, or no further. Its text says why."""


class Result(NamedTuple):
    """figures: a line for people; data: what they come from, for machines."""

    figures: str
    data: Any = None


class Section(NamedTuple):
    name: str
    seconds: float  # its budget
    run: Callable[[Machine], Result]


@dataclass
class Outcome:
    name: str
    state: str  # ok, skip or FAIL
    line: str
    seconds: float = 0.0
    data: Any = None


@dataclass
class Report:
    """What is kept of a run, written anew after every section: a machine may go away."""

    command: str
    path: Path | None
    outcomes: list[Outcome] = field(default_factory=list)

    def add(self, outcome: Outcome) -> None:
        self.outcomes.append(outcome)
        print(f"[{outcome.state}] {outcome.name}: {outcome.line}", flush=True)
        if self.path is not None:
            content = {"command": self.command, "sections": [asdict(o) for o in self.outcomes]}
            self.path.write_text(json.dumps(content, indent=1, default=str) + "\n")

    @property
    def failed(self) -> bool:
        return any(outcome.state == "FAIL" for outcome in self.outcomes)


def run_sections(
    sections: Sequence[Section], machine: Machine, report: Report, whole: float = WHOLE
) -> None:
    """All of them in turn, whatever happens to any; those that no time is left for are skipped.

    The times are those of a GPU: a CPU, which others share perhaps, has much more.
    """
    if not machine.is_gpu:
        whole *= _PATIENCE
        sections = [each._replace(seconds=_PATIENCE * each.seconds) for each in sections]
    began = time.monotonic()
    for section in sections:
        left = whole - (time.monotonic() - began)
        if left < min(section.seconds, 5):
            report.add(Outcome(section.name, "skip", f"no time is left of {whole:g} s"))
            continue
        report.add(run_section(section, machine, left))


def run_section(section: Section, machine: Machine, left: float) -> Outcome:
    """left: seconds of the whole run; a section that they do not suffice for is skipped."""
    seconds = min(section.seconds, left)
    start = time.monotonic()
    outcome = Outcome(section.name, "ok", "")
    try:
        with _limited(seconds):
            outcome.line, outcome.data = section.run(machine)
    except Skipped as reason:
        outcome.state, outcome.line = "skip", str(reason)
    except Overrun:
        outcome.state = "skip" if left < section.seconds else "FAIL"
        outcome.line = f"not done within {seconds:.3g} s"
    except Exception as error:
        outcome.state, outcome.line = "FAIL", f"{type(error).__name__}: {_in_a_line(str(error))}"
        outcome.data = traceback.format_exc()
    outcome.seconds = round(time.monotonic() - start, 1)
    outcome.line += f" ({outcome.seconds:g} s)"
    return outcome


def _in_a_line(text: str) -> str:
    """The beginning, and of a rank's traceback the last line, which has the error."""
    lines = text.strip().splitlines() or [""]
    if "Traceback" in text:
        return f"{lines[0]} {lines[-1]}"[:_WORDS]
    return " ".join(text.split())[:_WORDS]


@contextmanager
def _limited(seconds: float) -> Iterator[None]:
    """Raises Overrun in the main thread when the time is over."""

    def over(number: int, frame: FrameType | None) -> NoReturn:
        raise Overrun

    before = signal.signal(signal.SIGALRM, over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
