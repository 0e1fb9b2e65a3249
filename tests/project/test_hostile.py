"""The first cases of make hostile: docs/reliability.md has the counts of all."""

from __future__ import annotations

from collections import Counter

import pytest

from hostile import operators, ranked, single, states
from support.kernels import needs_native


@needs_native  # torch's own operator has other magnitudes
@pytest.mark.filterwarnings("ignore")
def test_one_process():
    counts = Counter(single.try_case(seed) for seed in range(200))
    assert counts["refused"] > 20
    assert counts["right"] > 100


def test_checkpoints():
    counts = Counter(states.try_case(seed) for seed in range(100))
    assert min(counts["right"], counts["refused"]) > 20


@needs_native
def test_direct_calls_of_operators():
    counts = Counter(operators.try_call(seed) for seed in range(200))
    assert min(counts["ran"], counts["refused"]) > 20


@pytest.mark.filterwarnings("ignore")
def test_several_ranks(ranks):
    seeds = [0, *range(10, 30)]
    results = ranks(2, ranked.run_block, seeds)
    answers = zip(seeds, zip(*results, strict=True), strict=True)
    counts = Counter(ranked.verdict(seed, list(each)) for seed, each in answers)
    assert counts["refused"] >= 1
    assert counts["right"] >= 15
