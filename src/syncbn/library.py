"""The compiled library: where it lies, or why it does not."""

from __future__ import annotations

from pathlib import Path

LIBRARY = Path(__file__).parent / "libsyncbn.so"
WHY_NOT = LIBRARY.with_suffix(".txt")  # left by setup.py where it could not build the library
REMEDY = (
    "with g++ 11 or newer, or clang 14 or newer, and torch 2.10 or newer, install syncbn again "
    'with --no-build-isolation (README.md, "Install")'
)


def missing() -> str | None:
    """Why there is no library here; None where there is one."""
    if LIBRARY.exists():
        return None
    why = f": {WHY_NOT.read_text().strip()}" if WHY_NOT.exists() else ""
    return f"{LIBRARY.name} was not built with this installation{why}; {REMEDY}"
