"""DTensor input is the whole batch: results are those of one process that holds it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.tensor import (
    DTensor,
    Partial,
    Replicate,
    Shard,
    distribute_module,
    distribute_tensor,
    init_device_mesh,
)

import syncbn
from support import oracle
from support.compiling import compiled
from support.layers import saved_and_loaded

PLACEMENTS = [Shard(0), Shard(1), Shard(2), Replicate(), Partial()]
everywhere = pytest.mark.parametrize("placement", PLACEMENTS, ids=str)
parameters = pytest.mark.parametrize("distributed", [True, False], ids=["DTensor", "plain"])


def batch(dtype=torch.float32):
    """x, dy (5, 6, 3, 4): uneven over two ranks along its samples."""
    x, dy = torch.randn(2, 5, 6, 3, 4, dtype=torch.float64)
    return (x * 2 + 30).to(dtype), dy.to(dtype)


def placed(x, mesh, *placements):
    if isinstance(placements[0], Partial):
        return DTensor.from_local(x / mesh.size(), mesh, placements)
    return distribute_tensor(x, mesh, placements)


def full(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def step(call, layer, x, dy):
    """Everything that one forward and backward show, of the whole batch."""
    x = x.detach().requires_grad_()
    layer.zero_grad()
    y = call(x)
    y.backward(distribute_tensor(dy, y.device_mesh, y.placements) if type(y) is DTensor else dy)
    gradients = [full(p.grad) for p in layer.parameters()]
    state = {name: full(value).clone() for name, value in layer.state_dict().items()}
    return full(y.detach()), full(x.grad), gradients, state


@everywhere
@parameters
def test_training_equals_one_process(ranks, placement, distributed):
    """Also the running statistics, which torch's own operator loses where channels are sharded."""
    x, dy = batch()

    def run(rank):
        mesh = init_device_mesh("cpu", (2,))
        layer = syncbn.SyncBatchNorm2d(6, momentum=None)
        if distributed:
            distribute_module(layer, mesh)
        seen = [step(layer, layer, placed(x, mesh, placement), dy) for _ in range(2)]
        types = {type(p.grad) for p in layer.parameters()}
        return seen[-1], types == {DTensor if distributed else torch.Tensor}

    expected = oracle.batch_norm(x, dy)
    for (y, dx, (dweight, dbias), state), as_given in ranks(2, run):
        assert as_given
        oracle.assert_close(y, expected.y, factor=2)
        oracle.assert_close(dx, expected.dx, factor=2)
        oracle.assert_close(dweight, expected.dweight, factor=2)
        oracle.assert_close(dbias, expected.dbias, factor=2)
        oracle.assert_close(state["running_mean"], expected.mean)
        oracle.assert_close(state["running_var"], expected.unbiased_var)
        assert state["num_batches_tracked"] == 2


@everywhere
@parameters
@pytest.mark.parametrize("track", [True, False])
def test_eval_mode_is_torchs(ranks, placement, distributed, track):
    x, dy = batch()
    trained = nn.BatchNorm2d(6, track_running_stats=track)
    trained(x + 1)
    nn.init.normal_(trained.weight)

    def run(rank):
        mesh = init_device_mesh("cpu", (2,))
        layer = syncbn.SyncBatchNorm2d(6, track_running_stats=track).eval()
        layer.load_state_dict(saved_and_loaded(trained.state_dict()))
        if distributed:
            distribute_module(layer, mesh)
        return step(layer, layer, placed(x, mesh, placement), dy)

    share = x.clone().requires_grad_()
    y = trained.eval()(share)
    y.backward(dy)
    expected = y.detach(), share.grad, [p.grad for p in trained.parameters()]
    for *seen, _ in ranks(2, run):
        torch.testing.assert_close(tuple(seen), expected, rtol=1e-4, atol=1e-4)


def test_what_is_sharded_stays_sharded(ranks):
    """By samples and channels; only what lies otherwise is gathered."""

    def run(rank):
        mesh, found = init_device_mesh("cpu", (2,)), []
        for training in (True, False):
            layer = syncbn.SyncBatchNorm2d(6).train(training)
            for placement in PLACEMENTS:
                (y,) = layer(placed(batch()[0], mesh, placement)).placements
                found.append(y == (placement if placement in PLACEMENTS[:2] else Replicate()))
        return found

    assert all(all(found) for found in ranks(2, run))


ONE = [((1, 3), 0), ((1, 2, 3, 3), 0), ((2, 5, 1), 2), ((5, 1), 1), ((2, 1, 4), 1), ((1, 3, 4), 0)]


@pytest.mark.parametrize("size", [1, 2, pytest.param(3, marks=pytest.mark.slow)])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("affine", [True, False])
def test_a_sharded_dimension_of_one_element(ranks, size, training, affine):
    """Which DTensor shards, but does not reshape."""
    batches = [torch.randn(2, *shape, dtype=torch.float64) for shape, _ in ONE]

    def run(rank):
        mesh, results = init_device_mesh("cpu", (size,)), []
        for (x, dy), (shape, dim) in zip(batches, ONE, strict=True):
            layer = syncbn.SyncBatchNorm(shape[1], affine=affine, dtype=torch.float64)
            distribute_module(layer.train(training), mesh)
            try:
                results.append(step(layer, layer, placed(x, mesh, Shard(dim)), dy))
            except ValueError as error:
                results.append(str(error))
        return results

    for results in ranks(size, run):
        for (x, dy), found in zip(batches, results, strict=True):
            if training and x.numel() == x.shape[1]:
                assert found.startswith("Expected more than 1 value per channel when training")
                continue
            plain = nn.BatchNorm1d(x.shape[1], affine=affine, dtype=torch.float64).train(training)
            plain._check_input_dim = lambda x: None
            torch.testing.assert_close(found, step(plain, plain, x, dy))


@pytest.mark.slow
def test_two_dimensions_of_a_mesh(ranks):
    x, dy = batch()

    def run(rank):
        mesh = init_device_mesh("cpu", (2, 2))
        layer = distribute_module(syncbn.SyncBatchNorm2d(6), mesh)
        return step(layer, layer, placed(x, mesh, Shard(0), Shard(1)), dy)

    expected = oracle.batch_norm(x, dy)
    for y, dx, (dweight, _), state in ranks(4, run):
        oracle.assert_close(y, expected.y, factor=2)
        oracle.assert_close(dx, expected.dx, factor=2)
        oracle.assert_close(dweight, expected.dweight, factor=2)
        oracle.assert_close(state["running_mean"], expected.running(0.0, 1.0, 0.1)[0])


@parameters
def test_other_options(ranks, distributed):
    x, dy = batch()

    def run(rank):
        mesh = init_device_mesh("cpu", (2,))
        layer = syncbn.SyncBatchNorm2d(
            6, statistics_dtype=torch.float64, skip_nonfinite=True, dtype=torch.bfloat16
        )
        if distributed:
            distribute_module(layer, mesh)
        bad = x.clone()
        bad[-1, 2] = torch.inf
        layer(placed(bad, mesh, Shard(0)))
        mine = placed(x.bfloat16(), mesh, Shard(0))
        *_, state = step(layer, layer, mine, dy.bfloat16())
        return state, full(layer.num_batches_skipped)

    expected = oracle.batch_norm(x.bfloat16(), dy).running(0.0, 1.0, 0.1)
    for state, skipped in ranks(2, run):
        assert skipped == 1
        assert state["num_batches_tracked"] == 1
        for name, value in zip(("running_mean", "running_var"), expected, strict=True):
            oracle.assert_close(state[name], value, dtype=torch.float32)


@parameters
def test_one_graph(ranks, distributed):
    x, dy = batch()

    def run(rank):
        mesh = init_device_mesh("cpu", (2,))
        layer = syncbn.SyncBatchNorm2d(6)
        if distributed:
            distribute_module(layer, mesh)
        call, _ = compiled(layer)
        return step(call, layer, placed(x, mesh, Shard(0)), dy)

    expected = oracle.batch_norm(x, dy)
    for y, dx, _, state in ranks(2, run):
        oracle.assert_close(y, expected.y, factor=2)
        oracle.assert_close(dx, expected.dx, factor=2)
        oracle.assert_close(state["running_mean"], expected.running(0.0, 1.0, 0.1)[0])
        assert state["num_batches_tracked"] == 1


@pytest.mark.parametrize("placement", PLACEMENTS[:2], ids=str)
def test_second_derivatives(ranks, placement):
    x, dy = batch(torch.float64)

    def second(layer, x, dy):
        x = x.detach().requires_grad_()
        loss = (layer(x).tanh() * dy).sum()
        (gradient,) = torch.autograd.grad(loss, x, create_graph=True)
        gradient.square().sum().backward()
        return full(x.grad)

    def run(rank):
        mesh = init_device_mesh("cpu", (2,))
        layer = syncbn.SyncBatchNorm2d(6, dtype=torch.float64)
        return second(layer, *(placed(t, mesh, placement) for t in (x, dy)))

    expected = second(nn.BatchNorm2d(6, dtype=torch.float64), x, dy)
    for found in ranks(2, run):
        torch.testing.assert_close(found, expected)


def message(call, *args):
    with pytest.raises((TypeError, ValueError)) as caught:
        call(*args)
    return str(caught.value)


def test_what_is_refused(ranks):
    """A rank's own samples, a batch that the mesh doesn't hold, plain input beside DTensors."""

    def run(rank):
        mesh = init_device_mesh("cpu", (2,))
        alone = init_device_mesh("cpu", (2, 1), mesh_dim_names=("all", "own"))["own"]
        x = placed(batch()[0], mesh, Shard(0))
        layer = syncbn.SyncBatchNorm2d(6)
        sharded = distribute_module(syncbn.SyncBatchNorm2d(6), mesh)
        same = syncbn.SyncBatchNorm2d(6, reproducible=True)
        inside = placed(batch()[0], alone, Replicate())
        return [
            message(layer, x, torch.ones(5, 3, 4, dtype=torch.bool)),
            message(same, x),
            message(layer, inside),
            message(sharded, batch()[0]),
            int(layer.num_batches_tracked),
        ]

    for rank, (mask, same, inside, plain, batches) in enumerate(ranks(2, run)):
        assert "expected mask=None for a DTensor as input" in mask
        assert "expected reproducible=False for a DTensor as input" in same
        assert "over all 2 ranks of the layer's group" in inside
        assert f"got one over a mesh of the ranks [{rank}]" in inside
        assert "as a plain tensor, as the input is, got a DTensor; distribute the input" in plain
        assert batches == 0
