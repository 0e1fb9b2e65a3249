"""A network, its compiled form, and how they are compared: for the tests of torch.compile."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

import syncbn
from support.cases import CLOSE

BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]


# Of BatchNorm: the kinds that differ most as graphs, and every kind of momentum and statistics.
FEW = {"momentum": None}, {"track_running_stats": False}
EVERY = {}, *FEW, {"affine": False}


class Network(nn.Module):
    """A block for each of some options of BatchNorm, checkpointed if ``reentrant`` says how.

    To compile a block takes half a second.
    """

    def __init__(
        self,
        width: int = 5,
        reentrant: bool | None = None,
        options: Sequence[dict[str, Any]] = FEW,
    ) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.reentrant = reentrant
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width, **some), nn.Tanh())
            for some in options
        )
        self.double()

    def forward(self, x):
        for block in self.blocks:
            if self.reentrant is None:
                x = block(x)
            else:
                x = checkpoint(block, x, use_reentrant=self.reentrant)
        return x


def compiled(model, backend="aot_eager", **options):
    """The compiled model, and a counter of the graphs that the backend is given."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, **{"fullgraph": True, **options}), counter


def one_graph_only():
    """Within it, a graph that needs a second form is an error."""
    return torch._dynamo.config.patch(error_on_recompile=True)


def step(call, model, x, *args):
    """Everything that one forward and, where there is one, backward show."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_(x.requires_grad)
    y = call(x, *args)
    if y.requires_grad:
        y.sin().sum().backward()
    seen = [y.detach(), x.grad, y.requires_grad, *(p.grad for p in model.parameters())]
    return seen, {name: value.clone() for name, value in model.state_dict().items()}


def assert_as_eager(call, model, batches, **tolerance):
    """``call``, a compiled ``model``, does what a copy of ``model`` does, batch by batch."""
    plain = copy.deepcopy(model)
    for batch in batches:
        actual, expected = step(call, model, *batch), step(plain, plain, *batch)
        torch.testing.assert_close(actual, expected, **{**CLOSE, **tolerance})


def layer(rank, requires_grad=True, **options):
    return syncbn.SyncBatchNorm(3, dtype=torch.float64, **options).requires_grad_(requires_grad)


def batch(size, requires_grad=True):
    return (torch.randn(size, dtype=torch.float64, requires_grad=requires_grad),)


def masked(rank):
    return *batch((2, 3, 5)), torch.rand(2, 5) > (0.3 if rank else 1)
