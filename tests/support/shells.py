"""Commands that are interrupted, and what they leave behind. Reads Linux's /proc."""

from __future__ import annotations

import functools
import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from support.processes import CONTEXT, fork_on
from syncbn import launch
from syncbn.cli import main

TIMEOUT = 120  # seconds, for a loaded machine; each run takes a tenth
needs_proc = pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="reads Linux's /proc")


class Running:
    """A command in a session and a temporary directory of its own: forked, or all of it anew."""

    process: subprocess.Popen[str] | multiprocessing.process.BaseProcess

    def __init__(self, arguments: list[str], folder: Path, *, forked: bool) -> None:
        self.folder = folder
        self.streams = [folder.parent / name for name in ("stdout", "stderr")]
        if forked:
            self.process = CONTEXT.Process(target=_forked, args=(arguments, folder, self.streams))
            self.process.start()
            return
        out, err = (stream.open("w") for stream in self.streams)
        with out, err:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "syncbn", *arguments],
                stdout=out,
                stderr=err,
                start_new_session=True,
                env={**os.environ, "TMPDIR": str(folder)},
                cwd=folder.parent,
            )

    def end(self) -> tuple[int | None, str, str]:
        """Its exit status and what it wrote."""
        if isinstance(self.process, subprocess.Popen):
            self.process.wait(TIMEOUT)
            code = self.process.returncode
        else:
            self.process.join(TIMEOUT)
            code = self.process.exitcode
        return code, *(stream.read_text() for stream in self.streams)

    def session(self) -> dict[int, str]:
        """pid → command of every process of the session that has not ended."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                state, _, _, session = (entry / "stat").read_text().rpartition(")")[2].split()[:4]
                command = (entry / "cmdline").read_text()
            except OSError:  # it ended meanwhile
                continue
            if int(session) == self.process.pid and state != "Z":
                found[int(entry.name)] = command
        return found

    def ranks(self) -> list[int]:
        return [pid for pid, command in self.session().items() if "spawn_main" in command]

    def wait_for(self, condition: Callable[[], bool], what: str) -> None:
        end = time.monotonic() + TIMEOUT
        while not condition():
            assert time.monotonic() < end, f"waited for {what} in vain"
            time.sleep(0.02)

    def wait_until_the_ranks_meet(self) -> None:
        self.wait_for(lambda: any(self.folder.glob("*/rendezvous")), "the ranks to meet")

    def wait_until_training(self) -> None:
        self.wait_for(self.folder.with_name("training").exists, "word of progress")

    def assert_nothing_left(self) -> None:
        self.wait_for(lambda: not self.session(), "every process to end")
        assert list(self.folder.iterdir()) == []


def _forked(arguments: list[str], folder: Path, streams: list[Path]) -> None:
    os.setsid()
    os.chdir(folder.parent)
    tempfile.tempdir = str(folder)
    for descriptor, stream in enumerate(streams, 1):
        with stream.open("w") as opened:
            os.dup2(opened.fileno(), descriptor)
    fork_on()

    def noting(launched: Callable[..., Any], *args: Any, on_message: Any, **options: Any) -> Any:
        def note(message: object) -> None:
            folder.with_name("training").touch()
            on_message(message)

        return launched(*args, on_message=note, **options)

    with mock.patch.object(launch, "launch", functools.partial(noting, launch.launch)):
        sys.exit(main(arguments))


@contextmanager
def running_in(folder: Path) -> Iterator[Callable[..., Running]]:
    """Starts commands, and ends what they leave."""
    (folder / "tmp").mkdir()
    started: list[Running] = []

    def start(arguments: list[str], *, forked: bool = False) -> Running:
        started.append(Running(arguments, folder / "tmp", forked=forked))
        return started[-1]

    yield start
    for running in started:
        for pid in running.session():
            os.kill(pid, signal.SIGKILL)
        running.end()
