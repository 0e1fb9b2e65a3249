"""Whether exchanges are traced: ``syncbn.trace``, the variable SYNCBN_TRACE, and what calls tell.

Off, it costs a look at :data:`active` per message.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

from torch import Tensor

from .exchanges import DONE, FAILED, GAVE_UP, Exchange, Log, Place, first_line

VARIABLE = "SYNCBN_TRACE"

active = True  # whether messages are recorded; and until the environment was asked
_log: Log | None = None
_asking = threading.Lock()


class trace:
    """Keep the last 1000 exchanges of this process, and write them to a file of ``folder``.

    Written are which call on which communicator, of which layer, from when to when, and how it
    ended; never values. To rank-<rank>.json, when an exchange fails, on SIGUSR1 and SIGTERM, and
    when the process ends; ``syncbn trace folder`` then shows in one table where ranks part. Every
    rank should call it, or have the environment variable SYNCBN_TRACE=folder, which does the same
    from the first exchange on. Called, it holds from then on; as a context manager until the block
    ends. Exchanges in compiled graphs on a device are not seen.

    Args:
        folder: where to, one for each job; it is made. A file that this rank has left there before
            is replaced. None ends it.

    Raises:
        OSError: nothing can be written there.

    Example:
        >>> import tempfile
        >>> with syncbn.trace(tempfile.mkdtemp()) as trace:
        ...     y = syncbn.SyncBatchNorm(3)(torch.randn(4, 3))
        ...     path = trace.write()  # now, too
        >>> path.name
        'rank-0.json'
    """

    def __init__(self, folder: str | os.PathLike[str] | None) -> None:
        self._own = None if folder is None else Log(Path(folder))
        with _asking:
            self._before = active, _log
            _use(self._own is not None, self._own)

    def write(self) -> Path | None:
        """Write the file now. Its path; None where it could not be written."""
        return None if self._own is None else self._own.write("asked for")

    def __enter__(self) -> trace:
        return self

    def __exit__(self, *_: object) -> None:
        self.write()
        with _asking:
            _use(*self._before)


def _use(on: bool, log: Log | None) -> None:
    global active, _log
    if _log is not None:
        _log.endings.give_back()
    active, _log = on, log
    if log is not None:
        log.endings.take()


def _current() -> Log | None:
    """The log, made at the first exchange where the environment wants one."""
    global active
    with _asking:
        if _log is None and active:
            active = False
            if folder := os.environ.get(VARIABLE):
                try:
                    _use(True, Log(Path(folder)))
                except OSError as error:
                    warnings.warn(f"{VARIABLE}: {error}; nothing is traced", stacklevel=2)
    return _log


def begin(place: Place, number: int, words: str) -> Exchange | None:
    """Note that a message of a call begins. A call may have several."""
    log = _current()
    return None if log is None else log.begin(place, number, words)


def fail(place: Place, error: BaseException) -> None:
    """Note how the last call on a communicator ended, and write."""
    log = _current() if active else None
    if log is not None and place.last is not None:
        text = first_line(f"{type(error).__name__}: {error}")
        place.last.finish(f"{FAILED}: {text}")
        log.write(text)


def give_up(place: Place, number: int, words: str) -> None:
    """Note that a call will not come from this rank, and write."""
    log = _current() if active else None
    text = first_line(words)
    if log is not None and not (place.last and text.startswith(place.last.failure or "\0")):
        log.begin(place, number, "no call").finish(f"{GAVE_UP}: {text}")
        log.write(text)


def recorded(place: Place, words: str, message: Callable[[], Tensor]) -> Tensor:
    """What a message of a call of its own brings."""
    traced = begin(place, place.calls + 1, words)
    try:
        received = message()
    except BaseException as error:
        fail(place, error)
        raise
    if traced is not None:
        traced.finish(DONE)
    return received
