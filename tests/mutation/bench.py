"""pytest in forks of a process that has imported torch, on a copy of src/ that may have a fault."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import pytest

from support.paths import ROOT
from support.processes import PRELOADED

from .faults import Mutant
from .meter import Meter

PLUGINS = ("pytest_timeout",)
OPTIONS = ("-p", "no:cacheprovider", *(part for name in PLUGINS for part in ("-p", name)))


def preload() -> None:
    """Import what tests take, but not what they test."""
    for name in (*PLUGINS, "hypothesis.internal.conjecture.engine", "numpy", *PRELOADED):
        if name != "syncbn":
            importlib.import_module(name)
    gc.freeze()  # a collection in each fork would take as long as the tests


def file_of(test: str) -> str:
    return test.partition("::")[0]


class Recorder:
    """Keeps these tests and files, in this order; writes the first test that fails."""

    def __init__(self, failed: Path, tests: Sequence[str]) -> None:
        self.failed = failed
        self.places = {test: place for place, test in enumerate(tests)}

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        kept = {item: place for item in items if (place := self._place(item)) is not None}
        items[:] = sorted(kept, key=lambda item: kept[item])

    def _place(self, item: pytest.Item) -> int | None:
        return self.places.get(item.nodeid, self.places.get(file_of(item.nodeid)))

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:  # the process has no more to do, not even to end in good order
            self.failed.write_text(report.nodeid)
            os._exit(pytest.ExitCode.TESTS_FAILED)

    pytest_collectreport = pytest_runtest_logreport

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, exitstatus: int) -> None:
        os._exit(exitstatus)


class Bench:
    """A copy of src/, where faults come and go, and the tests that run on it."""

    def __init__(self, folder: Path, limit: float) -> None:
        self.folder, self.limit = folder, limit
        self.source = folder / "src"
        self._stamp = 0
        shutil.copytree(ROOT / "src", self.source, ignore=shutil.ignore_patterns("__pycache__"))

    def run(self, mutant: Mutant, tests: Sequence[str]) -> tuple[str, str]:
        """Whether it was killed, survived, or took too long; by which test."""
        if not tests:
            return "survived", "no test calls it"
        path = self.source / "syncbn" / mutant.file
        data = path.read_bytes()
        failed = self.folder / "failed"
        failed.unlink(missing_ok=True)
        files = list(dict.fromkeys(file_of(test) for test in tests))
        try:
            self._write(path, data[: mutant.start] + mutant.new.encode() + data[mutant.end :])
            options = ["--timeout=60", *files]
            status = self.fork(options, Recorder(failed, tests), self.limit)
        finally:
            self._write(path, data)
        if status is None:
            return "timeout", ""
        by = failed.read_text() if failed.exists() else f"exit status {status}" if status else ""
        return "killed" if by else "survived", by

    def measure(self, files: Sequence[str], result: Path) -> str:
        """Write what tests call; what pytest says of them in the end."""
        self.fork(files, Meter(self.source, result), 3600)
        said = (self.folder / "t/said").read_text()
        if not result.exists():
            sys.exit(said)
        return said.splitlines()[-1]

    def _write(self, path: Path, data: bytes) -> None:
        path.write_bytes(data)
        self._stamp += 1  # compiled files are told apart by whole seconds
        os.utime(path, (self._stamp, self._stamp))

    def fork(self, options: Sequence[str], plugin: Recorder | Meter, limit: float) -> int | None:
        """pytest's exit status in a child process; None where it took longer than ``limit``."""
        scratch = self.folder / "t"
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir()
        began = time.monotonic()
        child = os.fork()
        if child == 0:
            _serve(self.source, scratch, options, plugin)
        ended, status = 0, 0
        while not ended and time.monotonic() - began < limit:
            time.sleep(0.02)
            ended, status = os.waitpid(child, os.WNOHANG)
        _kill_group(child, scratch)
        if ended:
            return os.waitstatus_to_exitcode(status)
        os.waitpid(child, 0)
        return None


def _kill_group(child: int, scratch: Path) -> None:
    """The process and all that it forked; and what mpiexec started for it, in groups of its own,
    which is known by its folder for temporary files.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    mark = f"TMPDIR={scratch}\0".encode()
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (process / "environ").read_bytes():
                os.kill(int(process.name), signal.SIGKILL)


def _serve(source: Path, scratch: Path, options: Sequence[str], plugin: Recorder | Meter) -> None:
    """In a child process: pytest. Doesn't return."""
    code = 70
    try:
        os.setsid()
        said = os.open(scratch / "said", os.O_WRONLY | os.O_CREAT)
        for stream in (1, 2):
            os.dup2(said, stream)
        os.environ |= {"PYTHONPATH": str(source), "TMPDIR": str(scratch)}
        os.environ["PYTEST_DISABLE_PLUGIN_AUTOLOAD"] = "1"
        tempfile.tempdir = str(scratch)
        sys.path.insert(0, str(source))
        if isinstance(plugin, Meter):
            sys.settrace(plugin.trace)
            threading.settrace(plugin.trace)
        _fork_server()
        code = pytest.main([*OPTIONS, *options], plugins=[plugin])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _fork_server() -> None:
    """The server that tests fork their ranks from, as a fork of this process: no second import."""
    from multiprocessing import forkserver, resource_tracker, util

    def spawn(path: object, arguments: list[str], kept: Sequence[int]) -> int:
        child = os.fork()
        if child == 0:
            try:
                exec(arguments[-1], {})
            finally:
                os._exit(0)
        return child

    resource_tracker.ensure_running()
    spawned, util.spawnv_passfds = util.spawnv_passfds, spawn
    forkserver.ensure_running()
    util.spawnv_passfds = spawned
