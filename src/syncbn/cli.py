"""The command ``syncbn``: demo and info.

Only what the shell needs is here; what the commands do is in syncbn.demo. click, rich,
scikit-learn and matplotlib come with the extra ``[cli]`` and are imported when a command runs, so
that this module, like all of syncbn, imports with torch alone.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    import click

_EXTRA = {"click", "rich", "sklearn", "matplotlib"}


def main(arguments: list[str] | None = None) -> int:
    """Run the command line ``arguments`` (None: the process's own) and return its exit status.

    0: done. 1: a rank failed, the extra is missing, or a file could not be written. 2: wrong
    usage, in one line. 130: interrupted.
    """
    try:
        return _main(arguments)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if missing not in _EXTRA:
            raise
        _complain("syncbn", f"needs {missing}: pip install 'syncbn[cli]'")
        return 1


def _main(arguments: list[str] | None) -> int:
    import click

    from .demo.launch import RankFailed

    group = _commands()
    given = sys.argv[1:] if arguments is None else arguments
    # Not from the error's context: some of click's errors, and an interruption, have none.
    command = " ".join(["syncbn", *(name for name in given[:1] if name in group.commands)])
    try:
        group.main(arguments, prog_name="syncbn", standalone_mode=False)
    except click.ClickException as error:
        _complain(command, error.format_message())
        return error.exit_code
    except RankFailed as error:
        print(f"{command}: {error}", file=sys.stderr)
        return 1
    except (click.Abort, KeyboardInterrupt):  # click turns the second into the first
        _complain(command, "interrupted")
        return 130
    return 0


def _complain(command: str, message: str) -> None:
    print(f"{command}: {' '.join(message.split())}", file=sys.stderr)


def _commands() -> click.Group:
    import click

    from . import __version__
    from .demo.options import DemoOptions

    default = DemoOptions()

    def number(
        name: str, value: int, text: str, *, min: int, max: int | None = None
    ) -> click.Option:
        kind = click.IntRange(min=min, max=max)
        return click.Option([name], type=kind, default=value, show_default=True, help=text)

    as_json = click.Option(["--json", "as_json"], is_flag=True, help="Print one JSON object.")
    demo = click.Command(
        "demo",
        callback=_demo,
        help="Train a small network on handwritten digits in three ways and compare them.",
        params=[
            number("--ranks", default.ranks, "Number of processes.", min=1),
            number("--batch-per-rank", default.batch_per_rank, "Images per rank, step.", min=1),
            number("--epochs", default.epochs, "Passes over the training images.", min=1),
            number("--seed", default.seed, "Of weights, split and order.", min=0, max=2**32 - 1),
            click.Option(
                ["--out"],
                type=click.Path(path_type=Path, dir_okay=False),
                default=Path("syncbn-demo.png"),
                show_default=True,
                help="Where to write the picture.",
            ),
            click.Option(["--no-plot"], is_flag=True, help="Write no picture."),
            as_json,
        ],
    )
    info = click.Command(
        "info",
        callback=_info,
        help="Show versions, devices, engines of communication and kernels.",
        params=[as_json],
    )
    group = click.Group(
        "syncbn",
        commands=[demo, info],
        help="Synchronised batch normalisation for PyTorch.",
        invoke_without_command=True,
        callback=_help_without_command,
    )
    return click.version_option(__version__)(group)


def _help_without_command() -> None:
    import click

    context = click.get_current_context()
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def _demo(
    *,
    ranks: int,
    batch_per_rank: int,
    epochs: int,
    seed: int,
    out: Path,
    no_plot: bool,
    as_json: bool,
) -> None:
    import click
    from rich.console import Console

    from .demo import data
    from .demo import report as says
    from .demo.options import DemoOptions
    from .demo.progress import bars
    from .demo.run import run

    try:
        options = DemoOptions(ranks=ranks, batch_per_rank=batch_per_rank, epochs=epochs, seed=seed)
    except ValueError as error:
        raise click.UsageError(str(error)) from error
    if not no_plot:
        _check_picture_path(out)
    digits = data.load(options)
    with bars(options) as on_progress:
        report = run(options, digits, on_progress=on_progress)
    if as_json:
        print(says.as_json(report, picture=None if no_plot else str(out)))
    else:
        console = Console(highlight=False)
        console.print(says.table(report))
        console.print(says.sentence(report))
    if not no_plot:
        _draw(report, out)
        if not as_json:
            print(f"Picture: {out}")


def _check_picture_path(path: Path) -> None:
    """Before the training, not after it: can the picture be written?"""
    import click

    from .demo.picture import writable_formats

    formats = writable_formats()
    if path.suffix[1:].lower() not in formats:
        raise click.BadParameter(
            f"{str(path)!r} should end in one of .{', .'.join(sorted(formats))}.",
            param_hint="'--out'",
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise click.BadParameter(
            f"cannot make {path.parent}: {error}", param_hint="'--out'"
        ) from None
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise click.BadParameter(f"{str(path)!r} is not writable.", param_hint="'--out'")


def _draw(report: Any, path: Path) -> None:
    import click

    from .demo.picture import draw

    try:
        draw(report, path)
    except OSError as error:
        raise click.ClickException(f"cannot write the picture: {error}") from error


def _info(*, as_json: bool) -> None:
    from rich.console import Console
    from rich.table import Table

    facts = _facts()
    if as_json:
        print(json.dumps(facts, indent=2))
        return
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for subject, content in facts.items():
        for position, (name, value) in enumerate(content.items()):
            table.add_row(subject if position == 0 else "", f"{name}: {value}")
    Console(highlight=False).print(table)


def _facts() -> dict[str, dict[str, str]]:
    from .demo.run import versions
    from .kernels import describe

    devices = {
        "cpu": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    }
    for index in range(torch.cuda.device_count()):
        devices[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    if torch.backends.mps.is_available():
        devices["mps"] = "available"
    return {
        "versions": versions(),
        "devices": devices,
        "engines": _engines(),
        "kernels": describe(),
    }


def _engines() -> dict[str, str]:
    """The backends of torch.distributed in this build of torch."""
    import torch.distributed as dist

    if not dist.is_available():
        return {"torch.distributed": "missing from this build of torch"}
    checks = {
        "gloo": dist.is_gloo_available,
        "nccl": dist.is_nccl_available,
        "ucc": dist.is_ucc_available,
        "mpi": dist.is_mpi_available,
    }
    return {name: "found" if check() else "not in this torch" for name, check in checks.items()}
