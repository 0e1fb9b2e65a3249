"""Ranks that are threads: what they compute is one process's."""

from __future__ import annotations

import copy
import random
import threading

import pytest
import torch
from torch import nn

import syncbn
from support import oracle
from support.cases import share_of
from support.contract import check_interleaved
from support.in_threads import in_threads, outcomes, watch_arrivals
from support.scripts import execute
from support.training import assert_same_state, batches, network, train_in_shares
from syncbn.comm import threads


def test_a_rank_knows_itself():
    comms = threads(3)
    assert [(comm.rank, comm.size) for comm in comms] == [(0, 3), (1, 3), (2, 3)]
    assert repr(comms[1]) == "Threads(rank=1, size=3)"
    layer = syncbn.SyncBatchNorm2d(3, process_group=comms[0])
    assert "world_size=1, group_size=3" in repr(layer)
    assert copy.deepcopy(layer).process_group is comms[0]


def test_groups_start_no_threads():
    before = threading.active_count()
    comms = threads(3)
    assert threading.active_count() == before
    outcomes(lambda comm: comm.all_reduce(torch.ones(2)), [(comm,) for comm in comms])
    assert threading.active_count() == before


def test_one_rank_is_alone():
    (comm,) = threads(1)
    x = torch.randn(4, 3)
    with comm as entered:
        assert entered is comm
        assert torch.equal(comm.all_gather(x), x.unsqueeze(0))
        assert torch.equal(comm.all_reduce(x), x)


def test_sums_are_taken_in_the_order_of_ranks():
    """float32 addition isn't associative: the order of arrival would show."""

    def term(rank):
        generator = torch.Generator().manual_seed(rank)
        return torch.randn(500, generator=generator) * 10.0 ** (rank - 2)

    comms = threads(5)
    until = watch_arrivals(comms)
    orders = [random.sample(range(5), 5) for _ in range(10)]

    def total(comm):
        mine = term(comm.rank)
        sums = []
        for order in orders:
            until(order.index(comm.rank))
            sums.append(comm.all_reduce(mine))
        return sums

    expected = torch.stack([term(rank) for rank in range(5)]).sum(0)
    for sums in outcomes(total, [(comm,) for comm in comms]):
        assert all(torch.equal(found, expected) for found in sums)


def test_groups_interleave():
    pairs, world = [threads(2), threads(2)], threads(4)

    def interleaved(rank):
        check_interleaved(pairs[rank // 2][rank % 2], world[rank])

    assert outcomes(interleaved, [(rank,) for rank in range(4)]) == [None] * 4


@pytest.mark.parametrize("split", [(2, 2), (3, 1), (4, 0, 1), (1, 1, 1, 1), (0, 5)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_a_step_equals_the_whole_batchs(split, offset):
    x = torch.randn(sum(split), 3, 4, 5, dtype=torch.float64) + offset
    dy = torch.randn_like(x)

    def step(comm):
        layer = syncbn.SyncBatchNorm2d(3, dtype=torch.float64, process_group=comm)
        mine = x[share_of(split, comm.rank)].clone().requires_grad_()
        y = layer(mine)
        y.backward(dy[share_of(split, comm.rank)])
        return y.detach(), mine.grad, layer.weight.grad, layer.running_mean, layer.running_var

    y, dx, dweight, means, variances = zip(*in_threads(len(split), step), strict=True)
    expected = oracle.batch_norm(x, dy)
    room = 1 if offset == 0 else 1e4  # float64's own rounding of x − mean at this offset
    oracle.assert_close(torch.cat(y), expected.y, factor=room)
    oracle.assert_close(torch.cat(dx), expected.dx, factor=room)
    oracle.assert_close(sum(dweight), expected.dweight, factor=room)
    mean, var = expected.running(0.0, 1.0, 0.1)
    oracle.assert_close(means[0], mean)
    oracle.assert_close(variances[0], var, factor=room)
    assert all(torch.equal(means[0], other) for other in means)
    assert all(torch.equal(variances[0], other) for other in variances)


@pytest.mark.parametrize("split", [(3, 2, 1), (4, 0, 2)], ids=str)
def test_training_in_three_threads_equals_one_process(split):
    data = batches(6)[:3]
    model, alone = network(), network()
    train_in_shares(alone, data, 6, lambda gradient: gradient)

    def run(comm):
        mine = [tuple(tensor[share_of(split, comm.rank)] for tensor in batch) for batch in data]
        replica = syncbn.convert(copy.deepcopy(model), comm)
        train_in_shares(replica, mine, 6, comm.all_reduce)
        return replica.state_dict()

    first, *others = in_threads(3, run)
    assert_same_state([first], alone.state_dict())
    for other in others:
        assert all(torch.equal(first[name], value) for name, value in other.items())


def test_layers_of_several_groups_in_one_net():
    """Pairs in the first layer, all four in the second; gradients as one graph has them."""
    x = torch.randn(8, 3, 5, dtype=torch.float64)
    pairs, world = [threads(2), threads(2)], threads(4)
    norm = nn.functional.batch_norm

    def net(x, first, second):
        return second(first(x).tanh()).pow(3)

    def run(rank):
        layers = [
            syncbn.SyncBatchNorm1d(3, dtype=torch.float64, process_group=comm)
            for comm in (pairs[rank // 2][rank % 2], world[rank])
        ]
        mine = x[2 * rank : 2 * rank + 2].clone().requires_grad_()
        net(mine, *layers).sum().backward()
        return mine.grad

    whole = x.clone().requires_grad_()
    halves = torch.cat([norm(half, None, None, training=True) for half in whole.chunk(2)])
    norm(halves.tanh(), None, None, training=True).pow(3).sum().backward()
    results = outcomes(run, [(rank,) for rank in range(4)])
    torch.testing.assert_close(torch.cat(results), whole.grad, rtol=1e-9, atol=1e-10)


def test_first_layers_of_many_threads_load_the_kernels_once():
    """In a fresh process: nothing is loaded there, and a second registration would warn."""
    program = """
import sys, threading, torch, syncbn
sys.setswitchinterval(1e-6)
together, failed = threading.Barrier(8), []
def run():
    together.wait()
    try:
        syncbn.SyncBatchNorm(3)(torch.randn(4, 3))
    except Exception as error:
        failed.append(error)
ranks = [threading.Thread(target=run) for _ in range(8)]
[rank.start() for rank in ranks], [rank.join() for rank in ranks]
assert not failed, failed
"""
    (result,) = execute(program)
    assert result.code == 0, result.stderr
    assert "Overriding" not in result.stderr
