"""Mixed precision: autocast, scaled losses, half parameters, ranks of different types."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy
from torch.nn.parallel import DistributedDataParallel

import syncbn
from support import oracle
from support.layers import assert_normalised_together, watch
from support.training import assert_same_state, batches, network, share

HALVES = (torch.bfloat16, torch.float16)
halves = pytest.mark.parametrize("half", HALVES, ids=str)
worlds = pytest.mark.parametrize("world", [1, 2])


def convolutional() -> nn.Module:
    torch.manual_seed(3)
    model = nn.Sequential(nn.Conv2d(2, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.Conv2d(6, 3, 3))
    nn.init.normal_(model[1].weight, 1.0)
    nn.init.normal_(model[1].bias)
    return model


def data(samples: int = 6) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(samples, 2, 9, 8, generator=generator) * 2 + 1


def dtypes(model: nn.Module, step) -> list[torch.dtype]:
    """Of every layer's output, then of every parameter's gradient."""
    found = []
    handles = [
        layer.register_forward_hook(lambda layer, args, y: found.append(y.dtype)) for layer in model
    ]
    step(model)
    for handle in handles:
        handle.remove()
    return found + [parameter.grad.dtype for parameter in model.parameters()]


@halves
@worlds
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_autocast(ranks, half, world, scale):
    """The layer computes in float32 or wider what it is handed in half, and answers in half."""

    def step(model, rank=0, world=1):
        x = data()[rank * 6 // world : (rank + 1) * 6 // world]
        with torch.autocast("cpu", dtype=half):
            loss = model(x).float().square().mean()
        (loss * scale).backward()

    def run(rank):
        model = syncbn.convert(convolutional())
        seen = watch(model[1])
        types = dtypes(model, lambda model: step(model, rank, world))
        return seen, types, model[1].state_dict(), model[1].weight.grad

    results = ranks(world, run)
    plain = convolutional()
    expected_types = dtypes(plain, step)
    assert half in expected_types
    for _, types, _, _ in results:
        assert types == expected_types
    layer = plain[1]
    expected = assert_normalised_together(
        [seen for seen, *_ in results], layer.weight, layer.bias, half
    )
    total = sum(gradient.double() for *_, gradient in results)
    oracle.assert_close(total, expected.dweight, dtype=torch.float32, factor=4)
    for name, value in zip(("mean", "var"), expected.running(0.0, 1.0, 0.1), strict=True):
        for _, _, state, _ in results:
            assert state["running_" + name].dtype == torch.float32
            oracle.assert_close(state["running_" + name], value)


@pytest.mark.parametrize(
    ("input", "parameter"),
    [(torch.float32, torch.float32), *((h, p) for h in HALVES for p in (h, torch.float32))],
    ids=str,
)
@pytest.mark.parametrize("training", [True, False])
@halves
def test_types_under_autocast_are_those_of_torch(ranks, input, parameter, training, half):
    """Every mixture that torch takes: one rank and two answer in its type."""

    def types(layer):
        layer = layer.to(parameter).train(training)
        x = torch.randn(4, 3, 5, 5).to(input).requires_grad_()
        with torch.autocast("cpu", dtype=half):
            y = layer(x)
        y.sum().backward()
        return y.dtype, x.grad.dtype, layer.weight.grad.dtype, layer.running_mean.dtype

    expected = types(nn.BatchNorm2d(3))
    assert types(syncbn.SyncBatchNorm2d(3)) == expected
    assert ranks(2, lambda rank: types(syncbn.SyncBatchNorm2d(3))) == [expected] * 2


@halves
@worlds
@pytest.mark.parametrize("offset", [0.0, 30.0])
def test_half_parameters(ranks, half, world, offset):
    """Batch statistics in half would miss the mean by its rounding, 0.1 for bfloat16 at 30."""

    def run(rank):
        model = syncbn.convert(convolutional()).to(half)
        with torch.no_grad():
            model[0].bias += offset
        seen = watch(model[1])
        x = data()[rank * 6 // world : (rank + 1) * 6 // world].to(half)
        model(x).float().square().mean().backward()
        assert model[1].weight.grad.dtype == half
        return seen, model[1].state_dict()

    results = ranks(world, run)
    layer = convolutional()[1].to(half)
    expected = assert_normalised_together([seen for seen, _ in results], layer.weight, layer.bias)
    for name, value in zip(("mean", "var"), expected.running(0.0, 1.0, 0.1), strict=True):
        for _, state in results:  # the running statistics are half's, rounded once
            assert state["running_" + name].dtype == half
            oracle.assert_close(state["running_" + name], value)


@pytest.mark.parametrize(
    "inputs",
    [
        (torch.float32, torch.bfloat16),
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.float64, torch.bfloat16, torch.float32),
    ],
    ids=str,
)
def test_ranks_of_different_types(ranks, inputs):
    """Each rank answers in its input's type; all have the same statistics, to the bit."""

    def run(rank):
        torch.manual_seed(rank)
        layer = syncbn.SyncBatchNorm2d(3)
        seen = watch(layer)
        x = (torch.randn(2 + rank, 3, 4, 5) * 2 + 7).to(inputs[rank]).requires_grad_()
        y = layer(x)
        y.backward(torch.randn(y.shape).to(y.dtype))
        return seen, layer.state_dict()

    results = ranks(len(inputs), run)
    expected = assert_normalised_together([seen for seen, _ in results])
    running = expected.running(0.0, 1.0, 0.1)
    for _, state in results:
        for name, value in zip(("running_mean", "running_var"), running, strict=True):
            assert torch.equal(state[name], results[0][1][name])
            oracle.assert_close(state[name], value)


def scaled_steps(model, steps, rank=0, overflow=None):
    """Scales after each step. In step ``overflow`` the gradients of rank 1 overflow."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=2)
    scales = []
    for number, (x, target) in enumerate(steps):
        optimizer.zero_grad()
        loss = cross_entropy(model(x), target)
        if number == overflow and rank == 1:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


def test_scaled_losses_train_like_one_process(ranks):
    def run(rank):
        model = DistributedDataParallel(syncbn.convert(network()))
        scales = scaled_steps(model, share(rank, 3, batches(6)))
        return scales, model.module.state_dict()

    results = ranks(2, run)
    alone = network()
    scales = scaled_steps(alone, batches(6))
    assert scales[-1] > 2.0**10
    assert all(mine == scales for mine, _ in results)
    assert_same_state([state for _, state in results], alone.state_dict())


def test_an_overflow_on_one_rank_skips_the_step_on_all(ranks):
    def run(rank):
        model = DistributedDataParallel(syncbn.convert(network()))
        before = [p.detach().clone() for p in model.parameters()]
        scales = scaled_steps(model, share(rank, 3, batches(6))[:1], rank, overflow=0)
        after = [p.detach().clone() for p in model.parameters()]
        return scales, all(map(torch.equal, before, after))

    assert ranks(2, run) == [([2.0**9], True)] * 2
