"""The last exchanges of this process, in a ring, and the file that they are written to.

`syncbn trace` (diagnose/desync.py) reads the files of all ranks together.
"""

from __future__ import annotations

import copy
import json
import os
import socket
import tempfile
import threading
import time
import warnings
from collections import Counter, deque
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch.distributed as dist

from .._version import __version__
from .endings import Endings

if TYPE_CHECKING:
    from .framed import Framed

VERSION = 1  # of the files
KEPT = 1000  # exchanges, of all communicators together
IN_FLIGHT, DONE, FAILED, GAVE_UP = "in flight", "done", "failed", "gave up"
_started = time.time()  # about when this process did
_places: Counter[tuple[Any, ...]] = Counter()  # those that look the same


class Place:
    """A communicator, as one of its ranks sees it: what tells it from others, on all ranks alike.

    members: the processes that its ranks are. number: which one it is of those that look the same.
    """

    def __init__(self, comm: Framed) -> None:
        self.engine, self.rank, self.size = comm._name(), comm.rank, comm.size
        self.group, members = comm._members()
        if members is None:  # ranks of this process
            self.process, self.members = _process(), list(range(comm.size))
            self.group += f" of process {self.process}"
        else:
            self.process, self.members = members[comm.rank], list(members)
        self._start()
        self._beside: Place | None = None

    def _start(self) -> None:
        same = self.engine, self.group, tuple(self.members), self.rank
        _places[same] += 1
        self.number, self.calls = _places[same], 0
        self.last: Exchange | None = None

    def beside(self) -> Place:
        """The same for calls that are not frames, which have numbers of their own."""
        if self._beside is None:
            self._beside = copy.copy(self)
            self._beside.engine += ", on a device"
            self._beside._start()
        return self._beside


def _process() -> int:
    """The number of this process in its job."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank()
    with suppress(ValueError):
        return int(os.environ.get("RANK", "0"))
    return 0


class Exchange:
    """One call; ``outcome`` is a word, and where it failed the error's first line."""

    __slots__ = ("began", "ended", "number", "outcome", "place", "words")

    def __init__(self, place: Place, number: int, words: str) -> None:
        self.place, self.number, self.words = place, number, words
        self.began, self.ended = time.time(), None
        self.outcome = IN_FLIGHT

    ended: float | None

    @property
    def failure(self) -> str:
        """The error that it ended with."""
        state, _, text = self.outcome.partition(": ")
        return text if state == FAILED else ""

    def finish(self, outcome: str) -> None:
        self.ended, self.outcome = time.time(), outcome


def first_line(text: str) -> str:
    return next(iter(text.splitlines()), "")[:2000]


class Log:
    """A ring of exchanges, and the folder that it is written to."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder.absolute()
        self._ring: deque[Exchange] = deque(maxlen=KEPT)
        self._places: dict[Place, None] = {}
        self._writing = threading.RLock()  # again, by a signal's handler
        self._process, self._complained = _process(), False
        self._pid = os.getpid()
        self.endings = Endings(self.write)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except OSError as error:
            raise type(error)(f"cannot write traces to {str(folder)!r}: {error}") from None

    def begin(self, place: Place, number: int, words: str) -> Exchange:
        if self._pid != os.getpid():  # a fork, whose parent's exchanges these are
            self._pid = os.getpid()
            self._ring.clear()
            self._places.clear()
            self._writing = threading.RLock()
        self.endings.take()  # signals, from the main thread
        self._process, place.calls = place.process, number
        last = place.last
        if last is not None and last.number == number and last.outcome == DONE:
            last.words, last.ended, last.outcome = words, None, IN_FLIGHT
            return last
        place.last = exchange = Exchange(place, number, words)
        self._places[place] = None  # first: a signal may write between the two
        self._ring.append(exchange)
        return exchange

    def write(self, why: str) -> Path | None:
        """Write the file, whole; None where that is impossible, which is no reason to stop."""
        if self._pid != os.getpid():
            return None
        with self._writing:
            path = self._folder / f"rank-{self._process}.json"
            try:
                _replace(path, json.dumps(self._content(why)))
            except Exception as error:  # whatever it is: the exchange's own is to be raised
                self._complain(f"syncbn.trace: cannot write {str(path)!r}: {error}")
                return None
        return path

    def _content(self, why: str) -> dict[str, Any]:
        exchanges = list(self._ring)
        places = list(self._places)
        numbers = {place: number for number, place in enumerate(places)}
        told = ("engine", "group", "members", "number", "rank", "size", "calls")
        return {
            "version": VERSION,
            "syncbn": __version__,
            "process": self._process,
            "host": socket.gethostname(),
            "pid": self._pid,
            "started": _started,
            "written": time.time(),
            "why": why,
            "communicators": [{name: getattr(place, name) for name in told} for place in places],
            "exchanges": [
                {
                    "communicator": numbers[each.place],
                    "call": each.number,
                    "words": each.words,
                    "began": each.began,
                    "ended": each.ended,
                    "outcome": each.outcome,
                }
                for each in exchanges
            ],
        }

    def _complain(self, text: str) -> None:
        if not self._complained:
            self._complained = True
            with suppress(Warning):  # where warnings are errors
                warnings.warn(text, stacklevel=2)


def _replace(path: Path, text: str) -> None:
    """Write a file whole: who reads it meanwhile finds the one before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, name = tempfile.mkstemp(".tmp", ".rank-", path.parent)
    try:
        with open(descriptor, "w") as file:
            file.write(text)
        os.replace(name, path)
    except OSError:
        with suppress(OSError):
            os.unlink(name)
        raise
