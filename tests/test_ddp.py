"""Training under DistributedDataParallel equals training on one process."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn

STEPS = 20


def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2),
        nn.BatchNorm2d(8, momentum=None),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
        nn.BatchNorm1d(5),
        nn.Linear(5, 3),
    ).double()


def batches(size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.randn(size, 2, 7, 6, generator=generator, dtype=torch.float64) + step,
            torch.randint(3, (size,), generator=generator),
        )
        for step in range(STEPS)
    ]


def share(rank: int, samples: int, data: list) -> list[tuple[torch.Tensor, torch.Tensor]]:
    mine = slice(rank * samples, (rank + 1) * samples)
    return [(x[mine], target[mine]) for x, target in data]


def train(model: nn.Module, data: list[tuple[torch.Tensor, torch.Tensor]]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for x, target in data:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()


def assert_same_state(states: list[dict[str, torch.Tensor]], expected: dict) -> None:
    for state in states:
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, rtol=1e-9, atol=1e-11, msg=name)


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
