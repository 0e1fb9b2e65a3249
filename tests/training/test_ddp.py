"""Training under DistributedDataParallel equals training on one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from support.training import assert_same_state, batches, network, share, train


@pytest.mark.parametrize(("world", "samples"), [(2, 3), (3, 2), (4, 1)])
@pytest.mark.parametrize("convert_first", [True, False])
def test_twenty_steps_equal_one_process(ranks, world, samples, convert_first):
    def run(rank):
        model = network()
        if convert_first:
            model = DistributedDataParallel(syncbn.convert(model))
        else:
            model = syncbn.convert(DistributedDataParallel(model))
        train(model, share(rank, samples, batches(world * samples)))
        return model.module.state_dict()

    alone = network()
    train(alone, batches(world * samples))
    assert_same_state(ranks(world, run), alone.state_dict())


def test_a_lazily_built_model_converts_and_trains(ranks):
    def lazy() -> nn.Module:
        torch.manual_seed(3)
        model = nn.Sequential(
            nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(3)
        )
        return model.double()

    def run(rank):
        model = syncbn.convert(lazy())
        torch.manual_seed(5)
        with torch.no_grad():
            model.eval()(torch.zeros(1, 2, 7, 6, dtype=torch.float64))
        assert type(model[1]) is syncbn.SyncBatchNorm2d
        model = DistributedDataParallel(model.train())
        train(model, share(rank, 2, batches(4)))
        return model.module.state_dict()

    alone = lazy()
    torch.manual_seed(5)
    with torch.no_grad():
        alone.eval()(torch.zeros(1, 2, 7, 6, dtype=torch.float64))
    train(alone.train(), batches(4))
    assert_same_state(ranks(2, run), alone.state_dict())


def test_two_models_with_groups_of_their_own(ranks):
    """Ranks 0, 1 and ranks 2, 3 train independently."""

    def run(rank):
        group = [dist.new_group([0, 1]), dist.new_group([2, 3])][rank // 2]
        model = DistributedDataParallel(syncbn.convert(network(), group), process_group=group)
        train(model, share(rank, 3, batches(12)))
        return model.module.state_dict()

    states = ranks(4, run)
    for half in (0, 2):
        alone = network()
        train(alone, share(half // 2, 6, batches(12)))
        assert_same_state(states[half : half + 2], alone.state_dict())
