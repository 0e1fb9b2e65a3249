"""Which library's operators are tried: the one that is installed, or one with sanitizers in it."""

from __future__ import annotations

import os
from pathlib import Path

from syncbn import library


def use_library() -> None:
    """That of HOSTILE_LIBRARY, before the first operator is asked for."""
    if told := os.environ.get("HOSTILE_LIBRARY"):
        library.LIBRARY = Path(told)
