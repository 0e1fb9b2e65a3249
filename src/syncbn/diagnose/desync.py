"""`syncbn trace`: the calls of all ranks in one table, and the first in which they differ."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..comm.exchanges import DONE, FAILED, GAVE_UP, IN_FLIGHT
from ..comm.words import ranges, ranks
from .traces import Call, Column, Columns, Key, Traces, read

_LONG = 1.0  # seconds from which a call that has not ended is a wait
AGREE, DIFFER = 0, 1  # the command's exit status


class NoTraces(ValueError):
    """A folder without any."""


@dataclass(frozen=True)
class Finding:
    """What is to be said of one communicator. call: where its ranks first differ, if they do."""

    call: int | None
    text: str


def show(folder: Path, *, last: int, as_json: bool) -> int:
    """Print what ranks did, as tables or as one JSON object; return the exit status.

    last: how many calls to show, up to the first difference.

    Raises:
        NoTraces: there is no such folder, or no trace in it that can be read.
    """
    traces = _existing(folder)
    findings = {key: finding_of(key, columns) for key, columns in traces.communicators.items()}
    status = DIFFER if any(finding.call for finding in findings.values()) else AGREE
    if as_json:
        print(json.dumps(_as_object(folder, traces, findings, last), indent=2))
        return status
    for name, why in traces.left_out.items():
        print(f"{name}: left out, {why}")
    for key, finding in sorted(findings.items(), key=lambda item: item[1].call is None):
        columns = traces.communicators[key]
        print(f"\n{key}\n{finding.text}")
        for line in table(key, columns, finding, last):
            print(line)
    return status


def _existing(folder: Path) -> Traces:
    if not folder.is_dir():
        raise NoTraces(f"expected a folder, got {str(folder)!r}, which is none")
    traces = read(folder)
    if not traces.processes:
        wrong = "".join(f"; {name}: {why}" for name, why in traces.left_out.items())
        raise NoTraces(
            f"no trace (rank-<number>.json) in {str(folder)!r}: set SYNCBN_TRACE, or call "
            f"syncbn.trace, on every rank; they are written on failure, SIGUSR1 and exit{wrong}"
        )
    return traces


def finding_of(key: Key, columns: Columns) -> Finding:
    """The first difference between ranks, or that there is none."""
    begin = max(column.first for column in columns.values())
    numbers = sorted({number for c in columns.values() for number in c.calls if number >= begin})
    for number in numbers:
        if text := _difference(number, key, columns):
            return Finding(number, text)
    end = numbers[-1] if numbers else 0
    agreed = f"ranks agree in calls {begin} to {end}" if numbers else "no call in common is kept"
    missing = sorted(set(range(key.size)).difference(columns))
    if missing:
        agreed += f"; no file of {ranks(missing)}"
    waits = [_waits(column, end) for column in columns.values()]
    if not missing and min(waits) >= _LONG:
        agreed += (
            f"; all are in call {end}, the same, for {min(waits):.1f} s: look at the network and "
            "the machines, not at the program"
        )
    return Finding(None, agreed)


def _difference(number: int, key: Key, columns: Columns) -> str:
    """What is wrong in a call; empty where nothing is."""
    here = {rank: c.calls[number] for rank, c in columns.items() if number in c.calls}
    gave_up = [rank for rank, call in here.items() if call.state == GAVE_UP]
    made = {rank: call for rank, call in here.items() if rank not in gave_up}
    if len({call.words for call in made.values()}) > 1:
        return f"FIRST DIFFERENCE in call {number}: ranks make different calls"
    if gave_up and not made and len(gave_up) == key.size:
        return f"FIRST FAILURE in call {number}, which all ranks gave up"
    if gave_up:
        return (
            f"FIRST DIFFERENCE in call {number}: {ranks(gave_up)} gave it up"
            f"{_waiting(made, columns, number)}"
        )
    failed = [rank for rank, call in made.items() if call.state == FAILED]
    stuck = [rank for rank in made if _waits(columns[rank], number) >= _LONG]
    absent = _absent(number, key, columns, made, sure=bool(failed or stuck))
    if absent and (failed or stuck):
        return (
            f"FIRST DIFFERENCE in call {number}: {ranks(absent)} did not make it"
            f"{_waiting(made, columns, number)}; {'; '.join(absent.values())}"
        )
    if failed:
        return f"FIRST FAILURE in call {number}, on {ranks(failed)}"
    return ""


def _waiting(made: Mapping[int, Call], columns: Columns, number: int) -> str:
    waits = [rank for rank, call in made.items() if call.state in (IN_FLIGHT, FAILED)]
    longest = max((_waits(columns[rank], number) for rank in waits), default=0.0)
    seconds = f" for {longest:.1f} s" if longest else ""
    return f", {ranks(waits)} waited{seconds}" if waits else ""


def _waits(column: Column, number: int) -> float:
    """How long the rank had been in a call when it wrote or failed; 0 where the call was done."""
    call = column.calls.get(number)
    if call is None or call.state not in (IN_FLIGHT, FAILED):
        return 0.0
    return max(0.0, (call.ended or column.written) - call.began)


def _absent(
    number: int, key: Key, columns: Columns, made: Mapping[int, Call], sure: bool
) -> dict[int, str]:
    """Ranks that have not made a call that others have begun, and what is known of them."""
    found = {}
    began = min((call.began for call in made.values()), default=0.0)
    for rank in range(key.size):
        column = columns.get(rank)
        if column is None:
            found[rank] = (
                f"rank {rank} has no file: it was killed, made no call at all, or is not traced"
            )
        elif number not in column.calls and column.last < number:
            how = f"rank {rank} had made {column.last} call{'' if column.last == 1 else 's'}"
            if column.has_ended:
                found[rank] = f"{how} when it ended ({column.why})"
            elif column.written >= began - _LONG:
                at = time.strftime("%H:%M:%S", time.localtime(column.written))
                found[rank] = f"{how} and was elsewhere when it wrote its file, at {at}"
            # Else its file is older than the call.
    return found if sure else {}


def table(key: Key, columns: Columns, finding: Finding, last: int) -> Iterable[str]:
    """The last calls up to the first difference, which is marked; then the errors in full."""
    rows = _rows(columns, finding, last)
    if not rows:
        return
    lines, errors = [(" ", "call", "ranks", "")], dict[str, set[int]]()
    for number in rows:
        mark, label = ">" if number == finding.call else "", str(number)
        for what, who in _grouped(number, key, columns).items():
            who_all = "all" if len(who) == key.size else ranges(who)
            lines.append((mark, label, who_all, what))
            label = ""
        for rank, column in columns.items():
            if (call := column.calls.get(number)) and call.error:
                errors.setdefault(call.error, set()).add(rank)
    wide = [max(len(line[i]) for line in lines) for i in range(3)]
    for line in lines:
        yield "  ".join(f"{cell:{width}}" for cell, width in zip(line, [*wide, 0], strict=True))
    for error, failed in errors.items():
        yield f"{ranks(failed)}: {error}"


def _rows(columns: Columns, finding: Finding, last: int) -> list[int]:
    numbers = {number for column in columns.values() for number in column.calls}
    until = finding.call or max(numbers, default=0)
    return sorted(number for number in numbers if number <= until)[-last:]


def _grouped(number: int, key: Key, columns: Columns) -> dict[str, list[int]]:
    """Who did the same in a call."""
    found: dict[str, list[int]] = {}
    for rank in range(key.size):
        column = columns.get(rank)
        call = column.calls.get(number) if column else None
        if column is None:
            what = "no file"
        elif call is None:
            what = "no call" if column.last < number else "no longer kept"
        elif call.state == IN_FLIGHT:
            what = f"{call.words}: in flight"
        else:
            what = call.words if call.state == DONE else f"{call.words}: {call.state}"
        found.setdefault(what, []).append(rank)
    return found


def _as_object(
    folder: Path, traces: Traces, findings: Mapping[Key, Finding], last: int
) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "agree": not any(finding.call for finding in findings.values()),
        "processes": traces.processes,
        "left_out": traces.left_out,
        "communicators": [
            {
                **key._asdict(),
                "first_difference": findings[key].call,
                "text": findings[key].text,
                "missing": sorted(set(range(key.size)).difference(columns)),
                "ranks": {
                    rank: {"calls": column.last, "written": column.written, "why": column.why}
                    for rank, column in sorted(columns.items())
                },
                "rows": [
                    {
                        "call": number,
                        "ranks": {
                            rank: column.calls[number]._asdict()
                            for rank, column in sorted(columns.items())
                            if number in column.calls
                        },
                    }
                    for number in _rows(columns, findings[key], last)
                ],
            }
            for key, columns in traces.communicators.items()
        ],
    }
