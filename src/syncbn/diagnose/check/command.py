"""The command `syncbn check`: its options, its output and its exit status."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ...pictures import Unwritable
from .options import DTYPES, Task, Unusable

EQUAL, DIFFERENT = 0, 1  # the exit status


def add_options(parser: argparse.ArgumentParser, number: Callable[[int], Any]) -> None:
    """number: of the least value, what parses a whole number."""
    parser.add_argument("factory", help="What makes the model: package.module:function.")
    what = "Shape of one sample, such as 3,64,64."
    parser.add_argument("--input", type=sizes, metavar="SIZES", help=what)
    what = "Instead of --input: module:function of the number of samples, gives the model's input."
    parser.add_argument("--data", metavar="NAME", help=what)
    what = "module:function of output and target, a mean; --data then gives (input, target)."
    parser.add_argument("--loss", metavar="NAME", help=what)
    for name, default, least, text in (
        ("--ranks", Task.ranks, 1, "Number of processes"),
        ("--batch", Task.batch, 1, "Samples of a step, over all of them"),
        ("--steps", Task.steps, 1, "Steps of training"),
        ("--seed", Task.seed, 0, "Of weights, data and dropout"),
    ):
        text = f"{text} (default: %(default)s)."
        parser.add_argument(name, type=number(least), default=default, metavar="N", help=text)
    what = "Of parameters and data (default: %(default)s)."
    parser.add_argument("--dtype", choices=DTYPES, default=Task.dtype, help=what)
    what = "Learning rate (default: %(default)s)."
    parser.add_argument("--lr", type=float, default=Task.lr, metavar="RATE", help=what)
    what = "Seconds after which the ranks are ended (default: %(default)g)."
    parser.add_argument("--timeout", type=float, default=Task.timeout, metavar="S", help=what)
    parser.add_argument("--convert", action="store_true", help="Convert the model before.")
    parser.add_argument("--html", type=Path, metavar="FILE", help="Write a page, too.")
    what = "Show the traceback where the factory, or what it made, raises."
    parser.add_argument("--traceback", action="store_true", help=what)


def sizes(text: str, example: str = "3,64,64") -> tuple[int, ...]:
    """A shape, as options spell it."""
    parts = text.replace("x", ",").split(",")
    if not all(part.strip().isdecimal() and int(part) > 0 for part in parts):
        raise argparse.ArgumentTypeError(f"expected sizes such as {example}, got {text!r}")
    return tuple(map(int, parts))


def run(*, as_json: bool, html: Path | None, **options: Any) -> int:
    """Check, print, write; the exit status."""
    from ...progress import phase_bar
    from .supervise import supervised

    task = Task(**options)
    if html is not None:
        _check_writable(html)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as python -m has it: the user's own modules
    with phase_bar("steps") as on_progress:
        report = supervised(task, on_progress)
    print(report.as_json() if as_json else report)
    if html is not None:
        from .page import page

        try:
            html.write_text(page(report), encoding="utf-8")
        except OSError as error:
            raise Unwritable(f"cannot write the page: {error}") from None
        if not as_json:
            print(f"Page: {html}")
    return EQUAL if report.ok else DIFFERENT


def _check_writable(path: Path) -> None:
    """Before the training, not after it."""
    folder = path.parent
    if not folder.is_dir():
        raise Unusable(f"check: --html: expected a file in a folder that exists, got {str(path)!r}")
    if path.is_dir() or not os.access(path if path.exists() else folder, os.W_OK):
        raise Unusable(f"check: --html: {str(path)!r} is not writable")
