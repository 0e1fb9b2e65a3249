"""Replicas inside each rank of a group equal one process: all of them are one batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from support.cases import CLOSE
from support.in_threads import in_threads
from support.replicas import images, nested

SPLITS = [(6, 4), (1, 5), (0, 7), (2, 0)]  # one replica on a rank, or nothing to scatter


def network() -> nn.Module:
    torch.manual_seed(5)
    return nested().double()


def replicated(devices: int) -> nn.Module:
    return syncbn.DataParallel(syncbn.convert(network()), ["cpu"] * devices)


def weights(y: torch.Tensor, start: int) -> torch.Tensor:
    """Of the loss: other numbers for each sample of the whole batch."""
    numbers = torch.arange(y.numel(), dtype=y.dtype) + start * y[:1].numel()
    return numbers.view(y.shape).sin() + 0.3


def step(model: nn.Module, x: torch.Tensor, start: int, second: bool) -> list[torch.Tensor]:
    """Output, input gradient, parameters' gradients and buffers after one step."""
    x = x.clone().requires_grad_()
    y = model(x)
    loss = (y.sin() * weights(y, start)).sum()
    if second:
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        loss = gradient.square().sum() + loss
    loss.backward()
    module = getattr(model, "module", model)
    return [y.detach(), x.grad, *(p.grad for p in module.parameters()), *module.buffers()]


@pytest.mark.parametrize("second", [False, True], ids=["first", "second"])
@pytest.mark.parametrize("devices", [2, 3])
@pytest.mark.parametrize("split", SPLITS, ids=str)
def test_a_step_equals_one_process(ranks, split, devices, second):
    x = images(sum(split))
    alone = network()
    y, dx, *expected = step(alone, x, 0, second)
    parameters = len(list(alone.parameters()))

    def train(rank):
        return step(replicated(devices), x.split(split)[rank], sum(split[:rank]), second)

    results = ranks(2, train)
    outputs, inputs = (torch.cat([found[i] for found in results]) for i in (0, 1))
    torch.testing.assert_close(outputs, y, **CLOSE)
    torch.testing.assert_close(inputs, dx, **CLOSE)
    for ours, its in zip(zip(*(r[2:] for r in results), strict=True), expected, strict=True):
        if parameters > 0:
            parameters -= 1
            torch.testing.assert_close(sum(ours), its, **CLOSE)
        else:
            for one in ours:
                torch.testing.assert_close(one, its, **CLOSE)


def test_masks_and_the_function(ranks):
    """A mask that is another on each replica; no layer, but the function in each."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(8, 2, 5, generator=generator, dtype=torch.float64)
    mask = torch.rand(8, 5, generator=generator) > 0.4

    class Function(nn.Module):
        def forward(self, x, mask):
            return syncbn.sync_batch_norm(x, None, None, mask=mask)

    def normalise(rank):
        layer = syncbn.DataParallel(syncbn.SyncBatchNorm1d(2).double(), ["cpu"] * 2)
        function = syncbn.DataParallel(Function(), ["cpu"] * 2)
        share = slice(0, 5) if rank == 0 else slice(5, 8)
        return [run(x[share], mask[share]).detach() for run in (layer, function)]

    expected = syncbn.sync_batch_norm(x, None, None, mask=mask)
    for parts in zip(*ranks(2, normalise), strict=True):
        torch.testing.assert_close(torch.cat(parts), expected, **CLOSE)


def test_inside_distributed_data_parallel(ranks):
    """Whose gradients are means over ranks, of replicas in each."""
    x = images(8)
    alone = network()
    step(alone, x, 0, False)

    def train(rank):
        model = DistributedDataParallel(replicated(2))
        share = x.split(4)[rank]
        y = model(share)
        (y.sin() * weights(y, 4 * rank)).sum().backward()
        return [p.grad for p in model.parameters()]

    for results in ranks(2, train):
        for mine, its in zip(results, alone.parameters(), strict=True):
            torch.testing.assert_close(2 * mine, its.grad, **CLOSE)


def test_ranks_that_are_threads():
    x = images(6)
    y, dx, *_ = step(network(), x, 0, False)

    networks = [network() for _ in range(2)]  # whose seed is the process's

    def train(comm):
        rank = comm.rank
        model = syncbn.DataParallel(syncbn.convert(networks[rank], comm), ["cpu"] * 2)
        return step(model, x.split(3)[rank], 3 * rank, False)

    results = in_threads(2, train)
    torch.testing.assert_close(torch.cat([found[0] for found in results]), y, **CLOSE)
    torch.testing.assert_close(torch.cat([found[1] for found in results]), dx, **CLOSE)


def test_the_function_with_a_group(ranks):
    """Given in words or found: the replicas of all its ranks."""
    x = images(7).flatten(2)
    expected = nn.functional.batch_norm(x, None, None, training=True)

    class Function(nn.Module):
        def forward(self, x):
            return syncbn.sync_batch_norm(x, None, None, group=torch.distributed.group.WORLD)

    def normalise(rank):
        return syncbn.DataParallel(Function(), ["cpu"] * 2)(x.split((4, 3))[rank])

    torch.testing.assert_close(torch.cat(ranks(2, normalise)), expected, **CLOSE)


def test_what_is_refused_is_refused_on_every_rank(ranks):
    """Also on a rank whose batch is enough for one replica only."""

    class Checkpointed(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = syncbn.SyncBatchNorm1d(2)

        def forward(self, x):
            return torch.utils.checkpoint.checkpoint(self.norm, x, use_reentrant=False)

    def refused(rank):
        x = torch.randn(1 + 3 * rank, 2, requires_grad=True)
        reproducible = syncbn.SyncBatchNorm1d(2, reproducible=True)
        with pytest.raises(ValueError, match="reproducible=True is for ranks"):
            syncbn.DataParallel(reproducible, ["cpu"] * 2)(x)
        with pytest.raises(RuntimeError, match="put the checkpoint around the whole"):
            syncbn.DataParallel(Checkpointed(), ["cpu"] * 2)(x)

    ranks(2, refused)


class LeavesOut(nn.Module):
    """The layer's output is not used where the batch begins with a large number."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = syncbn.SyncBatchNorm1d(2).double()

    def forward(self, x):
        y = self.norm(x)
        return x if x[0, 0] > 100 else y


def test_batched_gradients_where_a_replica_is_not_used(ranks):
    def gradients(rank):
        model = syncbn.DataParallel(LeavesOut(), ["cpu"] * 2)
        x = images(4)[:, :, 0, 0].clone()
        x[0, 0] += 1000 * (1 - rank)  # of rank 0 the first replica
        y = model(x.requires_grad_())
        dys = torch.eye(y.numel(), dtype=y.dtype)[-2:].view(2, *y.shape)
        (batched,) = torch.autograd.grad(y, x, dys, is_grads_batched=True, retain_graph=True)
        single = [torch.autograd.grad(y, x, dy, retain_graph=True)[0] for dy in dys]
        torch.testing.assert_close(batched, torch.stack(single), **CLOSE)

    ranks(2, gradients)


def test_a_world_of_one_sends_nothing(ranks):
    def train(rank):
        model = syncbn.DataParallel(syncbn.SyncBatchNorm1d(2), ["cpu"] * 2)
        other = syncbn.SyncBatchNorm1d(2, reproducible=True)
        with torch.profiler.profile() as profile:
            for module in (model, other):
                module(torch.randn(4, 2)).sum().backward()
        sent = {event.name for event in profile.events()}
        assert not [name for name in sent if "c10d" in name or "gloo" in name]

    ranks(1, train)


def test_children_of_any_name():
    model = nn.Module()
    model._modules["a.b"] = syncbn.SyncBatchNorm1d(2)
    model.forward = lambda x: x
    wrapper = syncbn.DataParallel(model, ["cpu"] * 2)
    assert wrapper(torch.ones(4, 2)).shape == (4, 2)


def test_join_is_refused_where_ranks_would_wait_for_ever(ranks):
    def run(rank):
        model = DistributedDataParallel(replicated(2))
        with pytest.raises(RuntimeError) as caught, model.join():
            model(images(4))
        return str(caught.value)

    for text in ranks(2, run):
        assert "join() around a synchronised layer" in text


def test_a_single_value_is_refused_on_every_rank(ranks):
    def refused(rank):
        model = syncbn.DataParallel(syncbn.SyncBatchNorm1d(2), ["cpu"] * 2)
        with pytest.raises(ValueError, match=r"more than 1 value per channel when training, got"):
            model(torch.ones(1 - rank, 2))
        return copy.copy(model.module.num_batches_tracked)

    assert ranks(2, refused) == [0, 0]
