"""The harness itself: a hang, an error and a death each fail with every rank's traceback."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from support.ranks import RankFailure


def test_results_come_in_the_order_of_ranks(ranks):
    def total(rank, offset):
        tensor = torch.tensor(float(rank + offset))
        dist.all_reduce(tensor)
        return rank, tensor.item()

    assert ranks(2, total, 10) == [(0, 21.0), (1, 21.0)]


def test_one_rank_raising_shows_where_the_others_wait(ranks):
    def raise_on_one(rank):
        if rank == 1:
            raise KeyError("first failure")
        dist.barrier()

    with pytest.raises(RankFailure) as failure:
        ranks(2, raise_on_one)
    assert "first failure" in str(failure.value)
    assert "barrier" in str(failure.value)
    assert ranks(2, lambda rank: rank) == [0, 1], "a fresh world replaces the broken one"


def test_a_hang_fails_within_its_timeout(ranks):
    with pytest.raises(
        RankFailure, match=r"rank 0: finished(.|\n)*rank 1: no answer(.|\n)*slumber"
    ):
        ranks(2, slumber, timeout=2)


def test_a_dead_rank_is_named(ranks):
    with pytest.raises(RankFailure, match="rank 1: died with exit code 7"):
        ranks(2, lambda rank: os._exit(7) if rank == 1 else None)


def slumber(rank):
    if rank == 1:
        time.sleep(1000)
