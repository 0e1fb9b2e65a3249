"""Ctrl-C while the command ``syncbn`` imports torch, for seconds: one line instead of a traceback.

The package imports this first. In every other program it changes nothing.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import NoReturn


def _command() -> str | None:
    """``syncbn demo``, where this process was started as that; None where it was not."""
    words = [*sys.orig_argv[1:], "", ""]
    if words[:2] == ["-m", "syncbn"]:
        words = words[1:]
    elif Path(words[0]).name != "syncbn":
        return None
    return f"syncbn {words[1]}" if words[1].isalpha() else "syncbn"


def _end(number: int, frame: object) -> NoReturn:
    os.write(2, f"{_command()}: interrupted\n".encode())
    os._exit(130)  # there is nothing to clean up yet, and much that would swallow an exception


def raise_again() -> None:
    """From here on Ctrl-C raises KeyboardInterrupt, as it does elsewhere."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


if _command() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _end)
