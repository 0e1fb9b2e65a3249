"""Several ranks: python -m hostile.ranked FIRST COUNT

The ranks share a batch unevenly, in layouts of their own, some with extreme values or without a
gradient. In some cases one rank's call has something wrong: it must raise by itself, and all others
must be told, none of them moved.
"""

from __future__ import annotations

import random
import sys
import time
import warnings
from collections import Counter
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist

from hostile import judge
from hostile.cases import VALUES, Drawn, draw, spoil
from support.cases import laid_out, layouts
from support.ranks import Worlds

SPOILED = 0.1  # of the cases have something wrong on one rank
BLOCK = 50  # cases that the ranks are sent at once
PATIENCE = 20.0  # seconds after which a rank that waits hangs


def shares(seed: int, size: int) -> list[Drawn]:
    """Every rank's part of a case: one batch's samples in uneven shares, the layer's tensors, each
    rank its own copies. One rank may hold values that are extreme.
    """
    pick, whole = random.Random(seed), draw(seed, "usual")
    whole.training = True
    samples = torch.arange(len(whole.x))
    bounds = sorted(pick.randint(0, len(samples)) for _ in range(size - 1))
    odd = pick.randrange(size) if pick.random() < 0.3 else -1
    found = []
    for rank, (a, b) in enumerate(zip((0, *bounds), (*bounds, len(samples)), strict=True)):
        values = pick.choice(list(VALUES)) if rank == odd else "usual"
        layout = pick.choice(layouts(whole.x.dim()))
        x = laid_out(VALUES[values](whole.x[a:b].double()).to(whole.x.dtype), layout)
        own = {name: tensor.clone() for name, tensor in whole.tensors().items()}
        mask = None if whole.mask is None else whole.mask[a:b].clone()
        found.append(replace(whole, x=x, dy=whole.dy[a:b], mask=mask, values=values, **own))
    return found


def is_spoiled(seed: int) -> bool:
    return seed % 100 < SPOILED * 100


def run_block(rank: int, seeds: list[int]) -> list[tuple[str, Any]]:
    """On each rank: what became of each case."""
    warnings.simplefilter("ignore")
    size, answers = dist.get_world_size(), []
    for seed in seeds:
        drawn, group = shares(seed, size)[rank], None
        if is_spoiled(seed):
            group = dist.new_group()  # which ends with the case
            if rank == seed % size:
                spoil(drawn, seed)
        before, began = judge.state_of(drawn), time.monotonic()
        try:
            answers.append(("found", (drawn, judge.run(drawn, group))))
        except Exception as error:
            late = time.monotonic() - began > PATIENCE
            try:
                judge.require(not late, f"waited for {time.monotonic() - began:.0f} s")
                judge.check_refusal(drawn, before, error)
                answers.append(("refused", f"{type(error).__name__}: {error}"))
            except judge.Wrong as wrong:
                answers.append(("wrong", str(wrong)))
    return answers


def verdict(seed: int, answers: list[tuple[str, Any]]) -> str:
    """Of one case, from all ranks' answers."""
    kinds = {kind for kind, _ in answers}
    words = "; ".join(f"rank {r}: {a[1]}" for r, a in enumerate(answers) if a[0] != "found")
    judge.require("wrong" not in kinds, words)
    judge.require(len(kinds) == 1, f"not on all ranks alike: {words}")
    parts = shares(seed, len(answers))
    if kinds == {"found"}:
        judge.require(not is_spoiled(seed), "took something wrong on one rank")
        judge.check(*zip(*(answer for _, answer in answers), strict=True))
        return "right"
    judge.require(is_spoiled(seed) or judge.is_single(parts), f"refused: {words}")
    return "refused"


def judged(seed: int, answers: list[tuple[str, Any]]) -> str:
    """The verdict, "wrong" where it is printed, too."""
    try:
        return verdict(seed, answers)
    except Exception as error:
        text = " ".join(f"{type(error).__name__}: {error}".split())
        case = "\n  ".join(part.words() for part in shares(seed, len(answers)))
        print(f"{len(answers)} ranks, seed {seed}: {text[:600]}\n  {case}", flush=True)
        return "wrong"


def main(first: int, count: int) -> None:
    counts: Counter[str] = Counter()
    worlds = Worlds()
    for size in (2, 3, 4):
        mine = [seed for seed in range(first, first + count) if seed % 3 == size - 2]
        for begin in range(0, len(mine), BLOCK):
            seeds = mine[begin : begin + BLOCK]
            try:
                results = list(zip(*worlds(size, run_block, seeds, timeout=600), strict=True))
            except Exception as error:
                counts["wrong"] += len(seeds)
                print(f"{size} ranks, seeds {seeds[0]}…{seeds[-1]}: {error}", flush=True)
                continue
            for seed, answers in zip(seeds, results, strict=True):
                counts[judged(seed, list(answers))] += 1
    worlds.close()
    print("counts", dict(counts), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
