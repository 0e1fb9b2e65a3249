"""One process, a range of seeds: python -m hostile.single FIRST COUNT FILE

Writes each seed to FILE before it runs, so that whoever started this knows of which one it died.
Prints what is wrong, a line each, and at the end how many were right and how many refused.
"""

from __future__ import annotations

import mmap
import sys
import warnings
from collections import Counter
from pathlib import Path

import torch

from hostile import judge
from hostile.cases import draw, spoil
from hostile.library import use_library

SPOILED = 0.25  # of the cases have something wrong


def try_case(seed: int) -> str:
    """ "right" or "refused"; raises :class:`judge.Wrong`."""
    drawn = draw(seed)
    if seed % 100 < SPOILED * 100:
        spoil(drawn, seed)
    before = judge.state_of(drawn)
    try:
        found = judge.run(drawn)
    except Exception as error:
        if not drawn.wrong and not judge.is_single([drawn]):
            raise judge.Wrong(f"refused, {type(error).__name__}: {error}") from error
        judge.check_refusal(drawn, before, error)
        return "refused"
    judge.require(not drawn.wrong, f"took {drawn.wrong}")
    judge.check([drawn], [found])
    return "right"


def main(first: int, count: int, place: str) -> None:
    torch.set_num_threads(1)
    use_library()
    warnings.simplefilter("ignore")
    counts: Counter[str] = Counter()
    Path(place).write_bytes(bytes(16))
    with open(place, "r+b") as file, mmap.mmap(file.fileno(), 16) as seen:
        for seed in range(first, first + count):
            seen[:] = f"{seed:16d}".encode()  # survives a crash
            try:
                counts[try_case(seed)] += 1
            except Exception as error:
                counts["wrong"] += 1
                words = " ".join(f"{type(error).__name__}: {error}".split())
                print(f"seed {seed}: {words[:300]}\n  {draw(seed).words()}", flush=True)
    print("counts", dict(counts), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
