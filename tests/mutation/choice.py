"""Which tests run on a fault."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator

from support.paths import ROOT

from .bench import file_of
from .faults import Mutant

MEASURED = ROOT / "build/mutation.json"
# Faults that tests see where no call of a Python function in a fork shows it: by what the file,
# the function or its text says.
ELSEWHERE = (
    (re.compile("^comm/mpi"), "mpi mpi_failures"),  # jobs of mpiexec
    (re.compile("compiling|exporting|graph|register_fake"), "compile compile_corners compile_with"),
)
# Tests of other things than these rooms, or too long to run thousands of times.
WITHOUT = "benchmark* cli compile* demo docs* export house long mpi_failures packaging ranks"


def files_to_measure() -> list[str]:
    return sorted({*_files("*")} - {*_files(WITHOUT)})


class Tests:
    """Which tests notice faults, perhaps."""

    def __init__(self, budget: float) -> None:
        self.budget = budget
        self.measured = json.loads(MEASURED.read_text())

    def rounds(self, mutant: Mutant) -> Iterator[list[str]]:
        """First those of a few files that test its function most closely, since to collect all
        takes as long; then others that call it, others of its file, or of its room.
        """
        near, far, closeness = [], [], Counter()
        function = f"{mutant.file}:{mutant.function}"
        for test, (seconds, called) in self.measured.items():
            if function in called:
                near.append((seconds, test))
                closeness[file_of(test)] += 1 / len(called)
            elif any(name.startswith(f"{mutant.room}/") for name in called):
                same = any(name.startswith(f"{mutant.file}:") for name in called)
                far.append((not same, seconds, test))
        closest = {file for file, _ in closeness.most_common(4)}
        first = self._chosen([(s, test) for s, test in sorted(near) if file_of(test) in closest])
        elsewhere = []
        for pattern, names in ELSEWHERE:
            if pattern.search(f"{function}\n{mutant.text}"):
                elsewhere += _files(names)
        yield first or elsewhere
        others = [(seconds, test) for _, seconds, test in sorted(far)]
        seen = {*first}
        rest = self._chosen([(s, t) for s, t in (*sorted(near), *others) if t not in seen])
        yield [*rest, *elsewhere] if first else rest

    def _chosen(self, tests: list[tuple[float, str]]) -> list[str]:
        chosen, left = [], self.budget / 2
        for seconds, test in tests:
            left -= seconds
            if left > 0:
                chosen.append(test)
        return chosen


def _files(names: str) -> list[str]:
    paths = (path for name in names.split() for path in ROOT.glob(f"tests/**/test_{name}.py"))
    return [str(path.relative_to(ROOT)) for path in paths]
