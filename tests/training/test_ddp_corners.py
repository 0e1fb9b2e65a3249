"""DistributedDataParallel's options and corners: training still equals one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import syncbn
from support.training import assert_same_state, batches, network, share, train


def wrapped(model: nn.Module, **options: object) -> DistributedDataParallel:
    return DistributedDataParallel(syncbn.convert(model), **options)


def assert_as_alone(ranks, make, steps=train, **options) -> None:
    """``steps`` of ``make()``, wrapped on two ranks, are those of one process."""

    def run(rank):
        model = wrapped(make(), **options)
        steps(model, share(rank, 3, batches(6)))
        return model.module.state_dict()

    alone = make()
    steps(alone, batches(6))
    assert_same_state(ranks(2, run), alone.state_dict())


@pytest.mark.parametrize("broadcast_buffers", [True, False])
@pytest.mark.parametrize("gradient_as_bucket_view", [True, False])
@pytest.mark.parametrize("graph", ["any", "static_graph", "find_unused_parameters"])
def test_options(ranks, broadcast_buffers, gradient_as_bucket_view, graph):
    options = {
        "broadcast_buffers": broadcast_buffers,
        "gradient_as_bucket_view": gradient_as_bucket_view,
        **({} if graph == "any" else {graph: True}),
    }
    assert_as_alone(ranks, network, **options)


class Forked(nn.Module):
    """A trunk with two heads, of which a step uses one: the other's parameters stay unused."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = network()
        self.heads = nn.ModuleList(
            nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)) for _ in range(2)
        ).double()

    def forward(self, x, head):
        return self.heads[head](self.trunk(x))


def test_layers_left_out_on_all_ranks_alike(ranks):
    def steps(model, data):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for number, (x, target) in enumerate(data):
            optimizer.zero_grad()
            cross_entropy(model(x, number % 3 % 2), target).backward()
            optimizer.step()

    assert_as_alone(ranks, Forked, steps, find_unused_parameters=True)


@pytest.mark.parametrize("broadcast_buffers", [True, False])
def test_two_forwards_before_one_backward(ranks, broadcast_buffers):
    """DDP broadcasts buffers in place between them: nothing saved for backward may be a buffer."""

    def steps(model, data):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for (x, target), (x2, target2) in zip(data[::2], data[1::2], strict=True):
            optimizer.zero_grad()
            first, second = model(x), model(x2)
            (cross_entropy(first, target) + 2 * cross_entropy(second, target2)).backward()
            optimizer.step()

    assert_as_alone(ranks, network, steps, broadcast_buffers=broadcast_buffers)


@pytest.mark.parametrize("gradient_as_bucket_view", [True, False])
def test_accumulation_without_synchronising_gradients(ranks, gradient_as_bucket_view):
    """The layer's statistics are synchronised in no_sync() too, DDP's gradients afterwards."""

    def steps(model, data):
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for (x, target), (x2, target2) in zip(data[::2], data[1::2], strict=True):
            optimizer.zero_grad()
            if isinstance(model, DistributedDataParallel):
                with model.no_sync():
                    cross_entropy(model(x), target).backward()
            else:
                cross_entropy(model(x), target).backward()
            cross_entropy(model(x2), target2).backward()
            optimizer.step()

    assert_as_alone(ranks, network, steps, gradient_as_bucket_view=gradient_as_bucket_view)


class Twice(nn.Module):
    """The same normalisation after two layers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(4)
        self.first, self.second = nn.Conv2d(2, 4, 3), nn.Conv2d(4, 4, 3)
        self.norm, self.last = nn.BatchNorm2d(4), nn.Linear(4 * 3 * 2, 3)

    def forward(self, x):
        x = self.norm(self.first(x)).relu()
        return self.last(self.norm(self.second(x)).flatten(1))


@pytest.mark.parametrize("options", [{}, {"static_graph": True}], ids=["any", "static_graph"])
def test_a_layer_used_twice_in_one_forward(ranks, options):
    assert_as_alone(ranks, lambda: Twice().double(), **options)


def test_two_models_with_different_groups_in_one_process(ranks):
    """One normalises over all four ranks, the other over pairs; steps of both alternate."""

    def run(rank):
        everyone = wrapped(network())
        pairs = syncbn.convert(network(), group_size=2)
        pair = pairs[1].process_group
        pairs = DistributedDataParallel(pairs, process_group=pair)
        for step in zip(share(rank, 3, batches(12)), share(rank, 3, batches(12)), strict=True):
            for model, data in zip((everyone, pairs), step, strict=True):
                train(model, [data])
        return everyone.module.state_dict(), pairs.module.state_dict()

    def alone(data):
        model = network()
        for step in data:
            train(model, [step])
        return model.state_dict()

    states = ranks(4, run)
    assert_same_state([state for state, _ in states], alone(batches(12)))
    for half in (0, 1):
        pair = [state for _, state in states[2 * half : 2 * half + 2]]
        assert_same_state(pair, alone(share(half, 6, batches(12))))


@pytest.mark.parametrize("broadcast_buffers", [True, False])
def test_buffers_of_groups_that_normalise_apart(ranks, broadcast_buffers):
    """DDP's broadcast gives all groups rank 0's running statistics; without it, their own."""

    def run(rank):
        model = syncbn.convert(network(), group_size=2)
        model = DistributedDataParallel(model, broadcast_buffers=broadcast_buffers)
        for x, _ in share(rank, 3, batches(12))[:2]:
            model(x).sum().backward()
        return model.module[1].running_mean

    expected = []
    for half in (0, 1):
        model = network()
        for x, _ in share(half, 6, batches(12))[:2]:
            model(x)
        expected.append(model[1].running_mean)
    found = ranks(4, run)
    torch.testing.assert_close(found[:2], [expected[0]] * 2)
    assert torch.allclose(found[2], expected[1]) is not broadcast_buffers


def forwards(model, x, times):
    for _ in range(times):
        model(x).sum().backward()


def test_join_is_refused_where_ranks_would_wait_for_ever(ranks):
    def run(rank):
        model = wrapped(network())
        x = batches(3)[0][0]
        with pytest.raises(RuntimeError) as caught, model.join():
            forwards(model, x, 1 + rank)
        # In join's mode torch asks who is there before each forward, and eval mode is silent.
        assert model.eval()(x).shape == (3, 3)
        return str(caught.value)

    for rank, text in enumerate(ranks(2, run)):
        assert f"join() around a synchronised layer, got one on rank {rank}: ranks that" in text
        assert "iterate over syncbn.until_all_done(loader) instead" in text


def test_join_that_ends_all_ranks_and_join_of_local_layers(ranks):
    def run(rank):
        x = batches(3)[0][0]
        stopping = wrapped(network())
        with (
            pytest.raises(RuntimeError, match="exhausted"),
            stopping.join(throw_on_early_termination=True),
        ):
            forwards(stopping, x, 2 + rank)
        local = DistributedDataParallel(syncbn.convert(network(), group_size=1))
        with local.join():
            forwards(local, x, 1 + rank)
        dist.barrier()
        layers = stopping.module[1], local.module[1]
        return [int(layer.num_batches_tracked) for layer in layers]

    assert ranks(2, run) == [[2, 2], [2, 2]]
