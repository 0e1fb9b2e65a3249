"""Which functions of the source each test calls, and how long it takes."""

from __future__ import annotations

import json
import mmap
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

import pytest

from .faults import files_of, functions_by_line


class Meter:
    """Notes which functions of the source each test calls, in this process and its forks."""

    def __init__(self, source: Path, result: Path) -> None:
        self.result = result
        self.functions: list[str] = []
        self.owners: dict[str, list[int]] = {}  # by file, the number of each line's function
        for file in files_of():
            names, numbers = functions_by_line(file), {}
            for name in names:
                if name not in numbers:
                    numbers[name] = len(self.functions)
                    self.functions.append(f"{file}:{name}")
            self.owners[str(source / "syncbn" / file)] = [numbers[name] for name in names]
        self.called = mmap.mmap(-1, len(self.functions))  # shared with forks
        self.tests: dict[str, tuple[float, list[str]]] = {}

    def trace(self, frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        owners = self.owners.get(code.co_filename)
        if owners is not None:
            self.called[owners[code.co_firstlineno - 1]] = 1

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        self.called[:] = bytes(len(self.called))
        began, self.passed = time.monotonic(), False
        yield
        if self.passed:
            flags = zip(self.functions, bytes(self.called), strict=True)
            called = [name for name, flag in flags if flag]
            self.tests[item.nodeid] = time.monotonic() - began, called
        return True

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call":
            self.passed = report.passed

    def pytest_sessionfinish(self) -> None:
        self.result.parent.mkdir(exist_ok=True)
        self.result.write_text(json.dumps(self.tests))
