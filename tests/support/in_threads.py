"""Ranks that are threads: run a function on each of them, with a time limit."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import syncbn

LIMIT = 30.0  # seconds that a test's threads may take; a hang is a failure


def outcomes(function: Callable[..., Any], argument_lists: list[tuple[Any, ...]]) -> list[Any]:
    """What ``function(*arguments)`` returned, or the exception it raised, in a thread for each."""
    found: list[Any] = [None] * len(argument_lists)

    def run(index: int) -> None:
        try:
            found[index] = function(*argument_lists[index])
        except BaseException as error:
            found[index] = error

    started = [
        threading.Thread(target=run, args=(index,), daemon=True) for index in range(len(found))
    ]
    for thread in started:
        thread.start()
    for thread in started:
        thread.join(LIMIT)
    hanging = [index for index, thread in enumerate(started) if thread.is_alive()]
    assert not hanging, f"threads {hanging} hang after {LIMIT:g} s"
    return found


def attempts(size: int, function: Callable[..., Any], **options: Any) -> list[Any]:
    """:func:`outcomes` of ``function(communicator)``, which each rank runs in its with block."""

    def run(comm: syncbn.comm.Threads) -> Any:
        with comm:
            return function(comm)

    return outcomes(run, [(comm,) for comm in syncbn.comm.threads(size, **options)])


def in_threads(size: int, function: Callable[..., Any], **options: Any) -> list[Any]:
    """``function(communicator)`` of every rank; the first rank's own exception is raised."""
    found = attempts(size, function, timeout=LIMIT / 2, **options)
    errors = [error for error in found if isinstance(error, BaseException)]
    own = [error for error in errors if "syncbn.comm.threads" not in str(error)]
    for error in own or errors:
        raise error
    return found


def watch_arrivals(comms: list[syncbn.comm.Threads]) -> Callable[[int], None]:
    """``until(count)``, which returns when ``count`` ranks wait in a collective of ``comms``.

    For tests in which somebody is late: no sleep makes sure of that. Call it before any collective.
    """
    group = comms[0]._group
    lock = threading.RLock()
    group.changed, arrived = threading.Condition(lock), threading.Condition(lock)
    wait = group._wait

    def noticed(*args: Any) -> None:
        arrived.notify_all()
        wait(*args)

    def until(count: int) -> None:
        with arrived:  # whoever was counted has let go of the lock: it waits
            assert arrived.wait_for(lambda: len(group.round.calls) >= count, LIMIT)

    group._wait = noticed
    return until
