"""Where a picture can be written, and writing it there."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Drawn = TypeVar("Drawn")


class Unwritable(Exception):
    """What was found out could not be written down: a picture, a page."""


def writable_formats() -> frozenset[str]:
    """The file name extensions, without the dot, that a picture can have."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    return frozenset(FigureCanvasAgg.get_supported_filetypes())


def check_path(option: str, path: Path) -> None:
    """Before the work, not after it: can the picture be written? Makes its folder.

    Raises:
        ValueError: it cannot, and why.
    """
    formats = writable_formats()
    if path.suffix[1:].lower() not in formats:
        known = ", .".join(sorted(formats))
        raise ValueError(f"{option}: {str(path)!r} should end in one of .{known}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"{option}: cannot make {path.parent}: {error}") from None
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
        raise ValueError(f"{option}: {str(path)!r} is not writable")


def write(draw: Callable[[Drawn, Path], None], report: Drawn, path: Path) -> None:
    """``draw(report, path)``, after the work.

    Raises:
        Unwritable: the file could not be written, for all that :func:`check_path` saw.
    """
    try:
        draw(report, path)
    except OSError as error:
        raise Unwritable(f"cannot write the picture: {error}") from None
