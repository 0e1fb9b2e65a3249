"""Runs programs in processes of their own, without an import of torch for each."""

from __future__ import annotations

import faulthandler
import os
import runpy
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from support.processes import CONTEXT, fork_on

# What programs leave, up to the end of their process, which frees nothing: to free a group of
# gloo's may wait for its thread, which may wait for the interpreter's lock.
_kept: list[dict[str, Any]] = []


@dataclass(frozen=True)
class Ended:
    """How a process ended, and what it said."""

    code: int | None
    stdout: str
    stderr: str


def execute(
    program: str | Path, *arguments: str, ranks: int = 1, timeout: float = 120, **environment: str
) -> list[Ended]:
    """Run a file, in its folder, or a text, with torchrun's variables where there are more ranks.

    A process that is still there after ``timeout`` seconds is killed.
    """
    if ranks > 1:
        with socket.socket() as free:
            free.bind(("localhost", 0))
            environment |= {"MASTER_ADDR": "localhost", "MASTER_PORT": str(free.getsockname()[1])}
    with tempfile.TemporaryDirectory(prefix="syncbn-said-") as name:
        said = [[Path(name, f"{stream}-{rank}") for stream in (1, 2)] for rank in range(ranks)]
        running = []
        try:
            for rank, files in enumerate(said):
                own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
                variables = environment | own if ranks > 1 else environment
                task = (program, arguments, variables, files, timeout)
                running.append(CONTEXT.Process(target=_run, args=task))
                running[-1].start()
            deadline = time.monotonic() + timeout
            for process in running:
                process.join(max(0.0, deadline - time.monotonic()))
        finally:
            for process in running:
                process.kill()
                process.join()
        return [
            Ended(process.exitcode, *(file.read_text() if file.exists() else "" for file in files))
            for process, files in zip(running, said, strict=True)
        ]


def execute_anew(path: Path, *arguments: str, timeout: float, **environment: str) -> Ended:
    """Run a file in a process that has imported nothing: what is read at imports can be told it."""
    ended = subprocess.run(
        [sys.executable, path, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    return Ended(ended.returncode, ended.stdout, ended.stderr)


def run_script(path: Path, ranks: int = 1) -> None:
    """A file that must end well on every rank. Fails with what they wrote."""
    ended = execute(path, ranks=ranks)
    said = "\n".join(rank.stdout + rank.stderr for rank in ended)
    assert [rank.code for rank in ended] == [0] * ranks, said


def _run(
    program: str | Path,
    arguments: tuple[str, ...],
    variables: dict[str, str],
    files: list[Path],
    timeout: float,
) -> None:
    for descriptor, file in enumerate(files, 1):
        with file.open("w") as opened:
            os.dup2(opened.fileno(), descriptor)
    # Where it hangs, before it is killed.
    faulthandler.dump_traceback_later(0.9 * timeout, file=sys.stderr)
    os.environ.update(variables)
    fork_on()
    sys.argv = [str(program), *arguments]
    if isinstance(program, str):
        _kept.append({"__name__": "__main__"})
        exec(compile(program, "<program>", "exec"), _kept[-1])
        return
    os.chdir(program.parent)
    sys.path.insert(0, str(program.parent))
    if "RANK" not in variables:
        warnings.simplefilter("error", UserWarning)
    _kept.append(runpy.run_path(str(program), run_name="__main__"))
