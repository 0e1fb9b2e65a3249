"""The compiled library: where it lies, or why it does not."""

from __future__ import annotations

from pathlib import Path

LIBRARY = Path(__file__).parent / "libsyncbn.so"
WHY_NOT = LIBRARY.with_suffix(".txt")  # left by setup.py where it could not build the library
COMMAND = "pip install --force-reinstall --no-deps ."  # unless the file knows another
PAGE = "https://syncbn.github.io/syncbn/install.html"


def missing() -> str | None:
    """Why there is no library here, and how to have it; None where there is one."""
    if LIBRARY.exists():
        return None
    why, _, command = WHY_NOT.read_text().strip().partition("\n") if WHY_NOT.exists() else [""] * 3
    return (
        f"{LIBRARY.name} was not built with this installation{': ' if why else ''}{why}; with "
        "torch 2.10 or newer and g++ 11 or clang 14, or newer, installed, run "
        f"'{command or COMMAND}' ({PAGE})"
    )
