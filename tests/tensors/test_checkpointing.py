"""Activation checkpointing: gradients as without it, running statistics move once per step."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    checkpoint_sequential,
    create_selective_checkpoint_contexts,
)

import syncbn
from support.cases import CLOSE
from support.compiling import Network, step
from support.training import assert_same_state

MOMENTA = [{"momentum": momentum} for momentum in (0.1, None, 1.0)]


def network(reentrant: bool | None = None) -> nn.Module:
    return Network(4, reentrant, MOMENTA)


def train(model, data):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for x in data:
        optimizer.zero_grad()
        x = x.clone().requires_grad_()  # the reentrant form looks for an input that wants it
        model(x).pow(3).mean().backward()
        optimizer.step()
    return model.state_dict()


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_training_equals_the_uncheckpointed_run(ranks, reentrant, world):
    data = torch.randn(4, 2 * world, 4, dtype=torch.float64) + 1

    def run(rank):
        model = syncbn.convert(network(reentrant))
        if world > 1:
            ddp = DistributedDataParallel(model, static_graph=reentrant)
            train(ddp, [x[2 * rank : 2 * rank + 2] for x in data])
            return model.state_dict()
        return train(model, data)

    states = ranks(world, run) if world > 1 else [run(0)]
    assert_same_state(states, train(network(), data))


def test_a_whole_sequence_of_segments(ranks):
    def run(rank):
        model = syncbn.convert(network())
        x = torch.randn(2, 4, dtype=torch.float64).requires_grad_()
        checkpoint_sequential(model.blocks, 2, x, use_reentrant=False).sum().backward()
        return [int(block[1].num_batches_tracked) for block in model.blocks]

    assert ranks(2, run) == [[1, 1, 1]] * 2


def test_a_forward_after_backward_counts_again():
    layer = syncbn.SyncBatchNorm(3)
    for batches in (1, 2):
        layer(torch.randn(4, 3)).sum().backward()
        assert layer.num_batches_tracked == batches


def save_products(context, operator, *args, **kwargs):
    save = "addmm" in str(operator)
    return CheckpointPolicy.MUST_SAVE if save else CheckpointPolicy.PREFER_RECOMPUTE


@pytest.mark.parametrize("width", [4, 100])
@pytest.mark.parametrize("world", [1, 2])
def test_selective_checkpointing(ranks, world, width):
    """The second forward runs the first one's operations, some of whose results are kept.

    A wide layer's first exchange takes two messages, its second one.
    """

    def run(rank):
        group = dist.new_group() if world > 1 else None
        block = nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width), nn.Tanh()).double()
        model, plain = (syncbn.convert(copy.deepcopy(block), group) for _ in range(2))
        contexts = functools.partial(create_selective_checkpoint_contexts, save_products)

        def kept(x):
            return checkpoint(model, x, use_reentrant=False, context_fn=contexts)

        x = torch.randn(3 + rank, width, dtype=torch.float64, requires_grad=True)
        for _ in range(2):
            torch.testing.assert_close(step(kept, model, x), step(plain, plain, x), **CLOSE)

    _ = ranks(world, run) if world > 1 else run(0)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_counter_without_statistics_moves_once(compiled):
    """As a layer has whose running_mean and running_var were set to None."""
    layer = syncbn.SyncBatchNorm1d(4)
    layer.running_mean = layer.running_var = None
    call = torch.compile(layer, backend="aot_eager") if compiled else layer
    checkpoint(call, torch.randn(3, 4), use_reentrant=False).sum().backward()
    assert layer.num_batches_tracked == 1
