"""What a rank does while it waits for the others: it tells what it waits for, and reads what they
have told, so that the one that is missing has a name.

Ranks that wait for a second, that give a call up or that fail leave a note where the others find
it. The usual exchange is over before that and touches none of this.
"""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

from .base import check_timeout
from .words import ranks

SLICE = 1.0  # seconds between looks at the notes
_WARN = 60.0  # seconds after which users are told
_GRACE = 1.0  # seconds in which others tell that they failed, too
# What timeout() was called with, for good or to open a block; and the open blocks of all threads.
_called: deque[timeout] = deque(maxlen=100)
_blocks: list[timeout] = []


class timeout:
    """Wait at most ``seconds`` for other ranks in each exchange of a synchronised layer.

    Called, it holds from then on; as a context manager, ``with syncbn.timeout(60):``, until the
    block ends. Every rank should set the same. The group's own timeout, 30 minutes by default,
    stays the longest. On a device NCCL waits, by the group's timeout alone.

    Args:
        seconds: > 0; None for the group's timeout, as at the beginning.

    Raises:
        TypeError, ValueError: another value.

    Example:
        >>> with syncbn.timeout(60):
        ...     y = syncbn.SyncBatchNorm(3)(torch.randn(4, 3))
    """

    def __init__(self, seconds: float | None) -> None:
        if seconds is not None:
            check_timeout("timeout", seconds)
        self.seconds = math.inf if seconds is None else float(seconds)
        _called.append(self)

    def __enter__(self) -> None:
        with suppress(ValueError):  # a hundred calls ago
            _called.remove(self)
        _blocks.append(self)

    def __exit__(self, *_: object) -> None:
        _blocks.remove(self)


def limit_of(longest: float) -> float:
    """The seconds to wait, where the group's timeout is ``longest``."""
    for latest in (_blocks, _called):
        with suppress(IndexError):
            return min(longest, latest[-1].seconds)
    return longest


class Notes(Protocol):
    """Where each rank leaves its last note."""

    def leave(self, rank: int, note: str) -> None: ...

    def read(self, ranks: Iterable[int]) -> Mapping[int, str]:
        """The notes of those of them that left one."""


class StoreNotes:
    """Notes in a store of torch.distributed, whose process may have ended or stopped.

    Then there are no more.
    """

    def __init__(self, store: Any) -> None:
        self._store, self._lost = store, False

    def leave(self, rank: int, note: str) -> None:
        self._try(lambda: self._store.set(str(rank), note))

    def read(self, ranks: Iterable[int]) -> Mapping[int, str]:
        def found() -> Mapping[int, str]:
            there = [rank for rank in ranks if self._store.check([str(rank)])]
            return {rank: self._store.get(str(rank)).decode(errors="replace") for rank in there}

        return self._try(found) or {}

    def _try(self, action: Callable[[], Any]) -> Any:
        """In a thread, which a store that does not answer keeps for ever."""
        results: list[Any] = []

        def run() -> None:
            with suppress(Exception):
                results.append(action())

        if not self._lost:
            thread = threading.Thread(target=run, daemon=True)
            thread.start()
            thread.join(2 * SLICE)
            self._lost = not results
        return results[0] if results else None


class _Note(NamedTuple):
    """In which call a rank waits, failed or gave up; how many it has given up so far."""

    number: int
    given_up: int
    state: str
    words: str


class Waiting:
    """One rank's notes on one communicator, and those of its peers.

    engine: what errors begin with.
    """

    def __init__(self, engine: str, rank: int, size: int, notes: Notes | None) -> None:
        self._who = f"{engine}: rank {rank} of {size}"
        given = "loader" if engine == "ProcessGroup" else "loader, comm"
        self.remedy = (
            "; every rank must make the same calls, forward and backward: see the other ranks' "
            "errors, and where loaders differ in length iterate over "
            f"syncbn.until_all_done({given})"
        )
        self._others = [other for other in range(size) if other != rank]
        self._rank, self._notes = rank, notes
        self._given_up, self._left, self._warned = 0, (0, ""), 0
        self._ended: str | None = None

    def check(self) -> None:
        """Refuse a call after one that failed."""
        if self._ended is not None:
            raise RuntimeError(self._ended)

    def look(self, number: int, operation: str, text: str, waited: float, longest: float) -> None:
        """To be called every second of waiting, ``waited`` so far, in call ``number``: ``text``.

        Raises RuntimeError where it is in vain: a rank has failed or given the call up, or it takes
        longer than ``longest``, the engine's timeout, or :class:`timeout`'s.
        """
        self._leave(number, "waits", text)
        notes, limit = self._read(), limit_of(longest)
        missing = self._missing(number, notes)
        if lost := self._lost(number, notes):
            raise RuntimeError(f"{self._who}: {operation}: {lost}{self.remedy}")
        if waited >= limit:
            raise RuntimeError(
                f"{self._who}: {operation}: {missing} not arrived within {limit:g} s, "
                f"{'the group' if limit == longest else 'syncbn'}'s timeout, in call {number}"
                f"{self.remedy}"
            )
        if waited >= _WARN and self._warned != number:
            self._warned = number
            with suppress(Warning):  # an error by the user's filters would be one on this rank
                warnings.warn(
                    f"{self._who} has waited {waited:.0f} s in call {number}: {text}; {missing} "
                    f"not arrived. It will wait for {limit - waited:.0f} s more: see "
                    "https://syncbn.github.io/syncbn/hangs.html",
                    stacklevel=2,
                )

    def explain(self, number: int, text: str) -> str:
        """After the engine's failure in a call: who gave up or does not tell that it failed, too.

        Empty where all tell.
        """
        self._leave(number, "waits", text)
        end, notes = time.monotonic() + _GRACE, self._read()
        while not self._lost(number, notes) and self._absent(number, notes):
            if time.monotonic() > end:
                return f"{self._missing(number, notes)} not arrived in call {number}"
            time.sleep(0.05)
            notes = self._read()
        return self._lost(number, notes)

    def last_words(self, rank: int) -> str:
        """Why a rank has ended, if it said so."""
        note = self._read().get(rank)
        if note is None or note.state == "waits":
            return ""
        return f": {note.state} in call {note.number}: {note.words}"

    def give_up(self, number: int, words: str) -> None:
        """Tell the others that call ``number`` will not come from here."""
        if self._ended is None:
            self._given_up += 1
            self._leave(number, "gave up", words, again=True)

    def withdraw(self, number: int, text: str) -> None:
        """Tell the others that call ``number`` comes after all, if they were told otherwise."""
        if self._left == (number, "gave up"):
            self._leave(number, "waits", text)

    def fail(self, number: int, error: BaseException) -> None:
        """Tell the others that nothing more will come, and refuse what does."""
        words = f"{type(error).__name__}: {error}"
        if self._ended is None:
            text = str(error) if isinstance(error, RuntimeError) else f"{self._who}: {words}"
            self._ended = text if "has ended" in text else f"{text}; this communicator has ended"
        self._leave(number, "failed", words)

    def _leave(self, number: int, state: str, words: str, again: bool = False) -> None:
        if self._notes is not None and (again or self._left != (number, state)):
            self._left = number, state
            self._notes.leave(self._rank, f"{number}\t{self._given_up}\t{state}\t{words[:2000]}")

    def _read(self) -> dict[int, _Note]:
        notes = {}
        for rank, note in sorted(self._notes.read(self._others).items()) if self._notes else ():
            if not note:
                continue
            number, given_up, state, words = note.split("\t", 3)
            notes[rank] = _Note(int(number), int(given_up), state, words)
        return notes

    def _lost(self, number: int, notes: Mapping[int, _Note]) -> str:
        """Who failed, or gave up a call that this rank did not."""
        for rank, note in notes.items():
            gave_up = note.number == number and note.given_up > self._given_up
            if note.state == "failed" or (note.state == "gave up" and gave_up):
                return f"rank {rank} {note.state} in call {note.number}: {note.words}"
        return ""

    def _absent(self, number: int, notes: Mapping[int, _Note]) -> list[int]:
        return [r for r in self._others if r not in notes or notes[r].number < number]

    def _missing(self, number: int, notes: Mapping[int, _Note]) -> str:
        absent = self._absent(number, notes) or self._others
        return f"{ranks(absent)} {'have' if len(absent) > 1 else 'has'}"
