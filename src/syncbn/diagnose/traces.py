"""The traces that ranks have left in a folder, put together by communicator and call."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..comm.exchanges import VERSION
from ..comm.words import ranges


class Call(NamedTuple):
    """What one rank did in one call. state: "done", "in flight", "failed" or "gave up"."""

    words: str
    began: float
    ended: float | None
    state: str
    error: str


@dataclass(frozen=True)
class Column:
    """What one rank did on one communicator. last: the number of its last call, kept or not."""

    written: float
    why: str
    last: int
    calls: dict[int, Call] = field(default_factory=dict)

    @property
    def has_ended(self) -> bool:
        return self.why in ("exit", "SIGTERM")

    @property
    def first(self) -> int:
        """Of the calls that are kept."""
        return min(self.calls, default=self.last + 1)


class Key(NamedTuple):
    """What tells a communicator from others."""

    engine: str
    group: str
    members: tuple[int, ...]
    size: int
    number: int

    def __str__(self) -> str:
        name = f" {self.group[:20]!r}" if self.group else ""
        again = f" no. {self.number}" if self.number > 1 else ""
        of = self.members != tuple(range(self.size))
        members = f", which are processes {ranges(self.members)}" if of else ""
        return f"{self.engine}{name}{again}, {self.size} ranks{members}"


Columns = Mapping[int, Column]  # by rank


@dataclass(frozen=True)
class Traces:
    """A folder's. processes: of which there is a file; left_out: files, and why."""

    processes: list[int]
    left_out: dict[str, str]
    communicators: dict[Key, dict[int, Column]]


def read(folder: Path) -> Traces:
    """All rank-*.json of a folder.

    Left out are those that are damaged, and those of an earlier run: written before another's
    process was there.
    """
    files, left_out = dict[str, dict[str, Any]](), dict[str, str]()
    for path in sorted(folder.glob("rank-*.json")):
        found = _readable(path)
        if isinstance(found, str):
            left_out[path.name] = found
        else:
            files[path.name] = found
    latest = max((file["started"] for file in files.values()), default=0.0)
    communicators: dict[Key, dict[int, Column]] = {}
    processes = []
    for name, file in files.items():
        if file["written"] < latest:
            left_out[name] = "of an earlier run: written before another rank's process was there"
            continue
        processes.append(file["process"])
        for key, rank, column in file["columns"]:
            communicators.setdefault(key, {})[rank] = column
    return Traces(sorted(processes), left_out, communicators)


def _readable(path: Path) -> dict[str, Any] | str:
    """What a file says, or why it says nothing."""
    try:
        return _parsed(path)
    except (OSError, LookupError, ValueError, TypeError, ArithmeticError, RecursionError) as error:
        return f"not a trace that can be read ({type(error).__name__}: {error})"


def _parsed(path: Path) -> dict[str, Any]:
    content = json.loads(path.read_text())
    if content["version"] != VERSION:
        raise ValueError(f"version {content['version']}, expected {VERSION}")
    file: dict[str, Any] = {name: float(content[name]) for name in ("started", "written")}
    file["process"], why = int(content["process"]), str(content["why"])
    file["columns"] = columns = []
    for said in content["communicators"]:
        group, members = str(said["group"]), tuple(int(member) for member in said["members"])
        size, rank = int(said["size"]), int(said["rank"])
        if not 0 <= rank < size or len(members) != size:
            raise ValueError(f"rank {rank} of {size}, which are {len(members)} processes")
        key = Key(str(said["engine"]), group, members, size, int(said["number"]))
        columns.append((key, rank, Column(file["written"], why, int(said["calls"]))))
    for said in content["exchanges"]:
        state, _, error = str(said["outcome"]).partition(": ")
        ended = None if said["ended"] is None else float(said["ended"])
        call = Call(str(said["words"]), float(said["began"]), ended, state, error)
        columns[int(said["communicator"])][2].calls[int(said["call"])] = call
    return file
