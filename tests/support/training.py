"""A network, its data, and how it is trained: on one process, or in shares of each batch."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn

from support.cases import CLOSE

STEPS = 20


def network() -> nn.Module:
    """Of many of torch's layers: until_all_done() shows that each takes a batch without samples."""
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1, bias=False),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.Conv2d(6, 8, 3, stride=2, groups=2),
        nn.BatchNorm2d(8, momentum=None),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Upsample(scale_factor=2, mode="bilinear"),
        nn.AvgPool2d(2),
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


def train_in_shares(
    model: nn.Module,
    data: list[tuple[torch.Tensor, torch.Tensor]],
    whole: int,
    total: Callable[[torch.Tensor], torch.Tensor],
) -> None:
    """The same on shares of ``whole`` samples together; ``total`` sums a gradient over ranks.

    Not by torch.optim, which imports as much again as torch.
    """
    parameters = list(model.parameters())
    velocities = [torch.zeros_like(parameter) for parameter in parameters]
    for x, target in data:
        loss = nn.functional.cross_entropy(model(x), target, reduction="sum") / whole
        gradients = torch.autograd.grad(loss, parameters)
        with torch.no_grad():
            for parameter, velocity, mine in zip(parameters, velocities, gradients, strict=True):
                velocity.mul_(0.9).add_(total(mine))
                parameter.sub_(0.1 * velocity)


def assert_same_state(states: list[dict[str, torch.Tensor]], expected: dict) -> None:
    for state in states:
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(state[name], value, **CLOSE, msg=name)
