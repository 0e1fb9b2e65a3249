"""The campaign against hostile input: make hostile, or

python -m hostile [--seed N] [--single N] [--ranked N] [--operators N] [--states N]   (in tests/)

Everything that can be fed to a layer, with the float64 judge where it runs; where it raises,
nothing may crash, hang, move or stay. Each part runs in processes of its own, so that a crash is a
finding: the seed that it died of is printed. Seeds count up from --seed: a case is drawn again by
its seed alone (``python -m hostile.single SEED 1 FILE``).
"""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from support.paths import ROOT

CHUNK = 2500  # cases of a process
PATIENCE = 1800.0  # seconds that a process may take, however busy the machine


def run(part: str, *arguments: str) -> Counter[str]:
    """The counts of one process of a part, whose findings are passed on."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder, "seed")
        command = [sys.executable, "-m", f"hostile.{part}", *arguments]
        if part in ("single", "operators"):
            command.append(str(place))
        try:
            ended = subprocess.run(
                command, capture_output=True, text=True, check=False, timeout=PATIENCE
            )
        except subprocess.TimeoutExpired:
            return found(part, f"hung at seed {last(place)}")
        *lines, counts = ended.stdout.strip().split("\n") or [""]
        print("\n".join(lines), end="\n" if lines else "", flush=True)
        if not counts.startswith("counts "):
            why = ended.stderr.strip()[-3000:]
            return found(part, f"died with {ended.returncode} at seed {last(place)}: {why}")
        return Counter(ast.literal_eval(counts.removeprefix("counts ")))


def last(place: Path) -> str:
    return place.read_text().strip() if place.exists() else "?"


def found(part: str, words: str) -> Counter[str]:
    print(f"{part}: {words}", flush=True)
    return Counter(wrong=1)


def campaign(given: argparse.Namespace) -> int:
    paths = [str(ROOT / "src"), str(ROOT / "tests"), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    wrong = 0
    parts = {"single": given.single, "operators": given.operators}
    parts |= {"states": given.states, "ranked": given.ranked}
    for part, count in parts.items():
        counts, began = Counter[str](), time.monotonic()
        for first in range(given.seed, given.seed + count, CHUNK):
            size = min(CHUNK, given.seed + count - first)
            counts += run(part, str(first), str(size))
        wrong += counts["wrong"]
        report(part, f"seeds {given.seed} to {given.seed + count - 1}", counts, began)
    if not given.no_faults:
        began, counts = time.monotonic(), run("faults")
        wrong += counts["wrong"]
        report("faults", "each once", counts, began)
    return wrong


def report(part: str, which: str, counts: Counter[str], began: float) -> None:
    listed = ", ".join(f"{n} {kind}" for kind, n in sorted(counts.items()) if n) or "none"
    print(f"{part}, {which}: {listed} in {time.monotonic() - began:.0f} s", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="of the first case")
    parser.add_argument("--single", type=int, default=20_000, help="cases of one process")
    parser.add_argument("--ranked", type=int, default=2_000, help="cases of 2 to 4 ranks")
    parser.add_argument("--operators", type=int, default=20_000, help="direct calls of operators")
    parser.add_argument("--states", type=int, default=5_000, help="checkpoints")
    parser.add_argument("--no-faults", action="store_true", help="leave out crashes and links")
    return min(1, campaign(parser.parse_args()))


if __name__ == "__main__":
    sys.exit(main())
