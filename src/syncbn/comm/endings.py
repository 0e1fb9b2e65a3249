"""When a process ends, or is asked by a signal: what is to be written first."""

from __future__ import annotations

import atexit
import ctypes
import multiprocessing
import os
import signal
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.util import Finalize
from types import FrameType
from typing import Any

_SIGNALS = ("SIGUSR1", "SIGTERM")  # the latter from torchrun, to the ranks that others leave behind


class Endings:
    """Calls ``write(why)`` at exit and on signals, whose earlier handlers then have their turn."""

    def __init__(self, write: Callable[[str], object]) -> None:
        self._write = write
        self._handled = False
        self._before: dict[int, Any] = {}
        self._child: Finalize | None = None

    def at_exit(self) -> None:
        self._write("exit")

    def take(self) -> None:
        """From now on; signals from the first call in the main thread on, which alone has them."""
        if self._handled:
            return
        self._take_exit()
        if threading.current_thread() is not threading.main_thread():
            return
        self._handled = True
        for name in _SIGNALS:
            number = getattr(signal, name, None)
            if number is None:  # Windows
                continue
            before = signal.getsignal(number)
            if before is None or (before == signal.SIG_DFL and _is_caught(number)):
                with suppress(Warning):
                    warnings.warn(
                        f"syncbn.trace: {name} has a handler that is not Python's (faulthandler's, "
                        "for example), which stays: it writes no trace",
                        stacklevel=2,
                    )
            elif before != signal.SIG_IGN or name == "SIGUSR1":
                self._before[number] = before
                signal.signal(number, self._on_signal)

    def give_back(self) -> None:
        """From now on no more."""
        self._give_exit_back()
        if threading.current_thread() is threading.main_thread():
            for number, before in self._before.items():
                if signal.getsignal(number) == self._on_signal:
                    signal.signal(number, before)
            self._before.clear()
            self._handled = False

    def _take_exit(self) -> None:
        self._give_exit_back()
        if multiprocessing.parent_process() is None:
            atexit.register(self.at_exit)
        else:  # a process of multiprocessing, torch's too, ends without atexit
            self._child = Finalize(None, self.at_exit, exitpriority=0)

    def _give_exit_back(self) -> None:
        atexit.unregister(self.at_exit)
        if self._child is not None:
            self._child.cancel()
            self._child = None

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self._write(signal.Signals(number).name)
        before = self._before.get(number)
        if callable(before):
            before(number, frame)
        elif number == signal.SIGTERM:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)


def _is_caught(number: int) -> bool:
    """Whether something catches a signal that Python does not. Linux says it."""
    with suppress(OSError, ValueError), open("/proc/self/status") as status:
        for line in status:
            name, _, value = line.partition(":")
            if name == "SigCgt":
                return bool(int(value, 16) >> (number - 1) & 1)
    return False


def outlive(thing: object) -> None:
    """Never free an object, not even at the interpreter's end, whose freeing would wait."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))
