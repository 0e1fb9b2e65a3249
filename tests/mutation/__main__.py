"""Mutation run: small faults put into the source one at a time; a test must notice each.

First every test runs once on a sound copy of src/, to see which functions it calls, on ranks and in
threads too, and how long it takes. Then each line that is drawn from the rooms under test gets one
fault, of the kinds in faults.py, and the tests that call its function run on it, the quickest
first, until one fails.

What survives is a test to write, or no fault: then equivalents.txt says why.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from support.paths import ROOT

from .bench import Bench, preload
from .choice import MEASURED, Tests, files_to_measure
from .faults import Mutant, draw, files_of

EQUIVALENTS = Path(__file__).with_name("equivalents.txt")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m mutation", description=__doc__)
    parser.formatter_class = argparse.RawTextHelpFormatter
    parser.add_argument("files", nargs="*", help="under src/syncbn; by default all of the rooms")
    parser.add_argument("-n", "--number", type=int, default=200, help="mutants to draw; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", default="", help="those whose description holds this text")
    parser.add_argument("--budget", type=float, default=30, help="seconds of tests for a mutant")
    parser.add_argument("--limit", type=float, default=200, help="seconds that they may take")
    parser.add_argument("--measure", action="store_true", help="anew what tests call")
    parser.add_argument("--list", action="store_true", help="only say which mutants are drawn")
    options = parser.parse_args()
    drawn = draw(options.files or files_of(), options.number, options.seed)
    drawn = [mutant for mutant in drawn if options.only in str(mutant)]
    if options.list:
        print(*drawn, sep="\n")
        return 0
    os.chdir(ROOT)
    preload()
    with tempfile.TemporaryDirectory(prefix="mut-") as folder:
        bench = Bench(Path(folder), options.limit)
        if options.measure or not MEASURED.exists():
            print("# no fault:", bench.measure(files_to_measure(), MEASURED), flush=True)
        return _report(bench, drawn, Tests(options.budget))


def _report(bench: Bench, drawn: Sequence[Mutant], tests: Tests) -> int:
    known, counts = _equivalents(), Counter()
    for mutant in drawn:
        began = time.monotonic()
        if why := known.get(mutant.key):
            verdict, by = "equivalent", why
        else:
            for chosen in tests.rounds(mutant):
                verdict, by = bench.run(mutant, chosen)
                if verdict != "survived":
                    break
        counts[mutant.room, verdict] += 1
        print(f"{verdict}\t{mutant}\t{by}\t{time.monotonic() - began:.0f} s", flush=True)
    for (room, verdict), number in sorted(counts.items()):
        print(f"# {room}: {number} {verdict}")
    return 1 if any(verdict == "survived" for _, verdict in counts) else 0


def _equivalents() -> dict[tuple[str, ...], str]:
    """Why a mutant is no fault, by its key: lines of "file ¦ line ¦ old ¦ new ¦ why"."""
    found = {}
    for line in EQUIVALENTS.read_text().splitlines():
        *key, why = line.split(" ¦ ")
        found[tuple(key)] = why
    return found


if __name__ == "__main__":
    sys.exit(main())
