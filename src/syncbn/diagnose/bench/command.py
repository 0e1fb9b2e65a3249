"""The command `syncbn bench`: its options and its output."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ...pictures import check_path, write
from ..check.command import sizes
from ..check.options import DTYPES, Unusable
from .options import SAMPLES, SHAPES, Options

_RANKS = 2


def add_options(parser: argparse.ArgumentParser, number: Callable[[int], Any]) -> None:
    """number: of the least value, what parses a whole number."""
    what = "Shape of a layer's input on each rank, such as 4,64,56,56; may be given several times "
    what += f"(default: {', '.join(','.join(map(str, shape)) for shape in SHAPES)})."
    parser.add_argument(
        "--shape",
        type=partial(sizes, example="4,64,56,56"),
        action="append",
        metavar="SIZES",
        help=what,
    )
    what = "Instead: the layers of the model that module:function or file.py:function makes."
    parser.add_argument("--model", metavar="NAME", help=what)
    what = "With --model: shape of one sample, such as 3,64,64."
    parser.add_argument("--input", type=sizes, metavar="SIZES", help=what)
    what = "Or: module:function of the number of samples, gives the model's input."
    parser.add_argument("--data", metavar="NAME", help=what)
    what = f"With --model: samples on each rank (default: {SAMPLES})."
    parser.add_argument("--batch-per-rank", type=number(1), metavar="N", help=what)
    for name, default, text in (
        ("--rounds", Options.rounds, "How often everything is timed"),
        ("--threads", Options.threads, "Of each rank, on the CPU"),
    ):
        least, text = 1 + (name == "--rounds"), f"{text} (default: %(default)s)."
        parser.add_argument(name, type=number(least), default=default, metavar="N", help=text)
    what = f"Number of processes (default: {_RANKS}; on cuda at most the number of GPUs)."
    parser.add_argument("--ranks", type=number(1), metavar="N", help=what)
    what = "Of the data (default: %(default)s)."
    parser.add_argument("--dtype", choices=DTYPES, default=Options.dtype, help=what)
    parser.add_argument("--channels-last", action="store_true", help="The data's layout.")
    what = "Default: cuda where torch sees a GPU. Each rank has one to itself."
    parser.add_argument("--device", choices=("cpu", "cuda"), help=what)
    parser.add_argument("--out", type=Path, metavar="FILE", help="Draw a picture, too.")
    what = "Show the traceback where the factory, what it made, or a rank raises."
    parser.add_argument("--traceback", action="store_true", help=what)


def options_of(
    *, shape: list[tuple[int, ...]] | None, ranks: int | None, device: str | None, **others: Any
) -> Options:
    """What was asked for, and what this machine has where nothing was said."""
    gpus = torch.cuda.device_count()
    device = device or ("cuda" if gpus else "cpu")
    ranks = ranks or (min(_RANKS, max(1, gpus)) if device == "cuda" else _RANKS)
    return Options(shapes=tuple(shape or ()), ranks=ranks, device=device, **others)


def run(*, as_json: bool, out: Path | None, **asked: Any) -> int:
    """Measure, print, draw; the exit status."""
    from rich.console import Console

    from ...progress import phase_bar
    from . import report as says
    from .run import run as measured

    options = options_of(**asked)
    if out is not None:
        _check_path(out)
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())  # as python -m has it: the user's own modules
    with phase_bar("rounds", everywhere=False) as on_progress:
        report = measured(options, on_progress)
    if as_json:
        print(says.as_json(report, picture=None if out is None else str(out)))
    else:
        console = Console(highlight=False)
        for table in says.tables(report):
            console.print(table)
        for line in (says.sentence(report), *(f"Note: {note}." for note in report.notes)):
            console.print(line)
    if out is not None:
        from .picture import draw

        write(draw, report, out)
        if not as_json:
            print(f"Picture: {out}")
    return 0


def _check_path(out: Path) -> None:
    try:
        check_path("--out", out)
    except ValueError as error:
        raise Unusable(f"bench: {error}") from None
