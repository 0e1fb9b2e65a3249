"""Models in DataParallel and alone, and what is the same about them."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

import syncbn
from support.cases import CLOSE
from support.training import assert_same_state

CPUS = ["cpu"] * 3


def images(samples: int, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(samples, 2, 6, 5, generator=generator, dtype=torch.float64) * 2 + 3


def nested() -> nn.Module:
    block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True))
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(inplace=True),
        nn.Sequential(block, nn.Sequential(nn.BatchNorm2d(4, affine=False, momentum=None))),
        nn.Flatten(),
        nn.Linear(48, 3),
        nn.BatchNorm1d(3, track_running_stats=False),
    )


def twins(make: Callable[[], nn.Module], devices=CPUS) -> tuple[nn.Module, nn.Module]:
    """A module in DataParallel, and the same in torch's layers alone."""
    torch.manual_seed(5)
    alone = make().double()
    return syncbn.DataParallel(syncbn.convert(copy.deepcopy(alone)), devices), alone


def assert_same_state_and_gradients(parallel: nn.Module, alone: nn.Module) -> None:
    assert_same_state([parallel.module.state_dict()], alone.state_dict())
    pairs = zip(parallel.module.parameters(), alone.parameters(), strict=True)
    for mine, its in pairs:
        assert (mine.grad is None) == (its.grad is None)
        if its.grad is not None:
            torch.testing.assert_close(mine.grad, its.grad, **CLOSE)


def assert_same_step(parallel: nn.Module, alone: nn.Module, x: torch.Tensor) -> None:
    xs = [x.clone().requires_grad_() for _ in range(2)]
    ys = [model(x) for model, x in zip((parallel, alone), xs, strict=True)]
    torch.testing.assert_close(*ys, **CLOSE)
    for y in ys:
        y.backward(torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape).sin())
    torch.testing.assert_close(xs[0].grad, xs[1].grad, **CLOSE)
    assert_same_state_and_gradients(parallel, alone)
