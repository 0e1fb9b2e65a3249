"""The command ``syncbn``, and ``python -m syncbn``: demo, check, bench, info and trace.

Only what the shell needs is here; what the commands do is in syncbn.demo, syncbn.info and
syncbn.diagnose. info and trace take torch alone; what check and bench need comes with the extra
``[cli]``, bench's picture with ``[plot]``, what demo needs with ``[demo]``, and is imported when
they run.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

from . import _interrupts
from ._version import __version__
from .pictures import Unwritable, check_path, write

_COMMANDS = ("demo", "check", "bench", "info", "trace")
_EXTRAS = {"rich": "cli", "matplotlib": "plot", "sklearn": "demo"}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line ``arguments`` (None: the process's own) and return its exit status.

    0: done. 1: a rank failed, the extra is missing, a file could not be written, the ranks in a
    trace differ, or a checked model's do. 2: wrong usage, in one line. 130: interrupted.
    """
    _interrupts.raise_again()
    given = sys.argv[1:] if arguments is None else arguments
    command = " ".join(["syncbn", *(name for name in given[:1] if name in _COMMANDS)])
    try:
        return _run(given)
    except _Failure as failure:
        _complain(command, str(failure))
        return failure.status
    except Unwritable as error:
        _complain(command, str(error))
        return 1
    except KeyboardInterrupt:
        _complain(command, "interrupted")
        return 130
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRAS:
            raise
        extra = "demo" if command == "syncbn demo" else _EXTRAS[missing]
        _complain("syncbn", f"needs {missing}: pip install 'syncbn[{extra}]'")
        return 1


class _Failure(Exception):
    """What ends a command: wrong usage, if not another status."""

    def __init__(self, message: str, *, status: int = 2) -> None:
        super().__init__(message)
        self.status = status


class _Parser(argparse.ArgumentParser):
    """Complains in one line, whatever is wrong."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, **options)

    def error(self, message: str) -> NoReturn:
        raise _Failure(message)


def _complain(command: str, message: str) -> None:
    print(f"{command}: {message}", file=sys.stderr)


def _run(arguments: list[str]) -> int:
    parser = _Parser(prog="syncbn", description="Synchronised batch normalisation for PyTorch.")
    version = f"syncbn, version {__version__}"
    parser.add_argument("--version", action="version", version=version)
    commands = parser.add_subparsers(metavar="command")
    demo = "Train a small network on handwritten digits in three ways and compare them."
    info = "Show versions, devices, engines of communication and kernels."
    trace = "Show what ranks called, from the traces that they left, and where they first differ."
    check = "Train a model over ranks and in one process, and say which layer first departs."
    bench = "Time the layer on this machine beside its peers, and say where its time goes."
    for name, run, text, add_options in (
        ("demo", _demo, demo, _add_demo_options),
        ("check", _check, check, _add_check_options),
        ("bench", _bench, bench, _add_bench_options),
        ("info", _info, info, None),
        ("trace", _trace, trace, _add_trace_options),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.set_defaults(run=run)
        if add_options is not None:
            add_options(command)
        command.add_argument(
            "--json", action="store_true", dest="as_json", help="Print one JSON object."
        )
    try:
        options = vars(parser.parse_args(arguments))
    except SystemExit:  # after --help and --version
        return 0
    if "run" in options:
        return options.pop("run")(**options) or 0
    parser.print_help()
    return 0


def _number(least: int, most: int | None = None) -> Callable[[str], int]:
    bounds = f"of at least {least}" if most is None else f"from {least} to {most}"

    def parse(text: str) -> int:
        if not text.lstrip("-").isdecimal() or not least <= int(text) <= (most or int(text)):
            raise argparse.ArgumentTypeError(f"expected a whole number {bounds}, got {text!r}")
        return int(text)

    return parse


def _add_demo_options(parser: argparse.ArgumentParser) -> None:
    from .demo.options import DemoOptions

    default = DemoOptions()

    def number(name: str, value: int, text: str, kind: Callable[[str], int]) -> None:
        text += " (default: %(default)s)"
        parser.add_argument(name, type=kind, default=value, metavar="N", help=text)

    number("--ranks", default.ranks, "Number of processes.", _number(1))
    number("--batch-per-rank", default.batch_per_rank, "Images per rank, step.", _number(1))
    number("--epochs", default.epochs, "Passes over the training images.", _number(1))
    number("--seed", default.seed, "Of weights, split and order.", _number(0, 2**32 - 1))
    picture = Path("syncbn-demo.png")
    parser.add_argument("--out", type=Path, default=picture, help=f"The picture ({picture}).")
    parser.add_argument("--no-plot", action="store_true", help="Write no picture.")


def _demo(*, out: Path, no_plot: bool, as_json: bool, **asked: int) -> None:
    from rich.console import Console

    from .demo import data
    from .demo import report as says
    from .demo.options import DemoOptions
    from .demo.progress import arm_bars
    from .demo.run import run
    from .launch import RankFailed

    try:
        options = DemoOptions(**asked)
        if not no_plot:
            check_path("--out", out)
    except ValueError as error:
        raise _Failure(str(error)) from error
    digits = data.load(options)
    try:
        with arm_bars(options) as on_progress:
            report = run(options, digits, on_progress=on_progress)
    except RankFailed as error:
        raise _Failure(str(error), status=1) from None
    if as_json:
        print(says.as_json(report, picture=None if no_plot else str(out)))
    else:
        console = Console(highlight=False)
        console.print(says.table(report))
        console.print(says.sentence(report))
    if not no_plot:
        from .demo.picture import draw

        write(draw, report, out)
        if not as_json:
            print(f"Picture: {out}")


def _info(*, as_json: bool) -> None:
    from . import info

    info.show(as_json=as_json)


def _add_trace_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="What SYNCBN_TRACE or syncbn.trace named.")
    text = "Calls to show, up to the first difference (default: %(default)s)"
    parser.add_argument("--last", type=_number(1), default=10, metavar="N", help=text)


def _trace(*, folder: Path, last: int, as_json: bool) -> int:
    from .diagnose import desync

    try:
        return desync.show(folder, last=last, as_json=as_json)
    except desync.NoTraces as error:
        raise _Failure(str(error)) from None


def _add_check_options(parser: argparse.ArgumentParser) -> None:
    from .diagnose.check.command import add_options

    add_options(parser, _number)


def _check(**options: Any) -> int:
    from .diagnose.check.command import run

    return _refusing(run, **options)


def _add_bench_options(parser: argparse.ArgumentParser) -> None:
    from .diagnose.bench.command import add_options

    add_options(parser, _number)


def _bench(**options: Any) -> int:
    from .diagnose.bench.command import run

    return _refusing(run, **options)


def _refusing(run: Callable[..., int], *, traceback: bool, **options: Any) -> int:
    """``run(**options)``; in one line what it refuses, unless the traceback is asked for."""
    import rich  # noqa: F401  # without which nothing that is asked for can be done

    from .diagnose.check.options import Unusable
    from .launch import RankFailed

    try:
        return run(**options)
    except RankFailed as error:
        status = 1
        text, _, trace = str(error).partition("\n")
    except Unusable as error:
        status, trace = 2, error.trace
        text = str(error).removeprefix("check: ").removeprefix("bench: ")
    shown = f"{trace.rstrip()}\n" if traceback and trace else ""
    raise _Failure(shown + text, status=status)
