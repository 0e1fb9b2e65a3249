"""Running statistics of another dtype than the layer's: float64 on request."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import syncbn
from support import oracle
from support.in_threads import in_threads
from support.layers import saved_and_loaded

HALVES = [torch.float16, torch.bfloat16]


def wide(channels=3, **options):
    return syncbn.SyncBatchNorm2d(channels, statistics_dtype=torch.float64, **options)


def dtypes(layer):
    return [tensor.dtype for tensor in (layer.weight, layer.running_mean, layer.running_var)]


def test_only_the_statistics_have_it():
    layer = wide()
    assert dtypes(layer) == [torch.float32, torch.float64, torch.float64]
    assert layer.num_batches_tracked.dtype == torch.int64
    assert dtypes(wide(dtype=torch.bfloat16)) == [torch.bfloat16, torch.float64, torch.float64]
    assert wide(track_running_stats=False).running_mean is None
    assert repr(layer) == repr(syncbn.SyncBatchNorm2d(3))
    layer.reset_running_stats()
    assert (layer.running_mean == 0).all()
    assert dtypes(layer)[1:] == [torch.float64, torch.float64]
    assert set(dtypes(layer.to(torch.float32))) == {torch.float32}


def test_reverted_layers_compute_as_torchs_do():
    """Which take statistics of the weight's dtype only."""
    layer, x = wide(), torch.randn(2, 3, 4, 4)
    layer(x)
    expected = layer.eval()(x)
    reverted = syncbn.revert(layer)
    assert set(dtypes(reverted)) == {torch.float32}
    torch.testing.assert_close(reverted(x), expected)
    mixed = torch.nn.BatchNorm2d(3).bfloat16()
    mixed.running_var = torch.full((3,), 1.001)
    assert syncbn.revert(syncbn.convert(mixed)).running_var[0] > 1, "as it was"
    assert syncbn.revert(wide(affine=False)).running_var.dtype == torch.float64, "nothing tells"


def test_lazy_layers_take_it():
    layer = syncbn.LazySyncBatchNorm2d(statistics_dtype=torch.float64)
    for lazy in (layer, copy.deepcopy(layer)):
        lazy(torch.randn(2, 3, 4, 4))
        assert type(lazy) is syncbn.SyncBatchNorm2d
        assert dtypes(lazy) == [torch.float32, torch.float64, torch.float64]


@pytest.mark.parametrize("dtype", [torch.int64, "float64", float])
@pytest.mark.parametrize("build", [syncbn.SyncBatchNorm, syncbn.LazySyncBatchNorm])
def test_other_dtypes_are_refused(build, dtype):
    arguments = (3,) if build is syncbn.SyncBatchNorm else ()
    with pytest.raises(TypeError, match="expected statistics_dtype to be a floating-point dtype"):
        build(*arguments, statistics_dtype=dtype)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.usefixtures("implementation")
def test_training_and_eval(dtype, affine, momentum):
    """Outputs and gradients are those of usual statistics, the statistics themselves float64's."""
    layer = wide(affine=affine, momentum=momentum, dtype=dtype)
    usual = syncbn.SyncBatchNorm2d(3, affine=affine, momentum=momentum, dtype=dtype)
    mean, var = torch.zeros(3).double(), torch.ones(3).double()
    for step in range(1, 4):
        x, dy = (
            (torch.randn(4, 3, 5, 2, dtype=torch.float64) + 3).to(dtype),
            torch.randn(4, 3, 5, 2),
        )
        mine, its = x.clone().requires_grad_(), x.clone().requires_grad_()
        y, z = layer(mine), usual(its)
        y.backward(dy.to(dtype)), z.backward(dy.to(dtype))
        oracle.assert_close(y.detach(), z.detach().double(), factor=2)
        oracle.assert_close(mine.grad, its.grad.double(), factor=2)
        rate = 1 / step if momentum is None else momentum
        batch = oracle.batch_norm(x, dy)
        mean = mean + rate * (batch.mean - mean)
        var = var + rate * (batch.unbiased_var - var)
        oracle.assert_close(layer.running_mean, mean, dtype=torch.float32, factor=0.5)
    oracle.assert_close(layer.running_var, var, dtype=torch.float32, factor=0.5)
    assert layer.num_batches_tracked == 3
    assert layer.running_mean.dtype == torch.float64
    layer.eval()
    x = torch.randn(4, 3, 5, 2).to(dtype).requires_grad_()
    column = (1, 3, 1, 1)
    expected = (x.double() - mean.view(column)) * (var.view(column) + 1e-5).rsqrt()
    y = layer(x)
    assert y.dtype == dtype
    oracle.assert_close(y.detach(), expected.detach())
    y.sum().backward()
    assert x.grad.dtype == dtype


@pytest.mark.usefixtures("implementation")
def test_small_steps_are_not_rounded_off():
    """At mean 10⁴ a step of 10⁻⁹ towards a batch that is 1 away is below float32's resolution."""
    layer, usual = (build(1, momentum=1e-9) for build in (wide, syncbn.SyncBatchNorm2d))
    x = torch.tensor([10_000.5, 10_001.5]).view(2, 1, 1, 1)
    for norm in (layer, usual):
        norm.running_mean.fill_(10_000.0)
        for _ in range(5):
            norm(x)
    assert usual.running_mean.item() == 10_000.0
    assert layer.running_mean.item() - 10_000.0 == pytest.approx(5e-9, rel=1e-2)


@pytest.mark.usefixtures("implementation")
def test_a_single_value_and_second_derivatives():
    layer = wide(2).double()
    layer.running_mean, layer.running_var = torch.zeros(2), torch.ones(2)  # narrower, as it happens
    with pytest.raises(ValueError, match="Expected more than 1 value per channel"):
        layer(torch.randn(1, 2, 1, 1).double())
    assert layer.num_batches_tracked == 0
    x = torch.randn(3, 2, 2, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


def test_over_ranks():
    x = torch.randn(6, 3, 2, 2)

    def run(comm):
        layer = wide(process_group=comm)
        layer(x[comm.rank * 2 : comm.rank * 2 + 2]).sum().backward()
        layer.eval()(x)
        return layer.state_dict()

    first, second, third = in_threads(3, run)
    mean, var = oracle.batch_norm(x, x).running(0.0, 1.0, 0.1)
    for name, expected in (("running_mean", mean), ("running_var", var)):
        assert first[name].dtype == torch.float64
        oracle.assert_close(first[name], expected, dtype=torch.float32, factor=0.5)
        assert torch.equal(first[name], second[name])
        assert torch.equal(first[name], third[name])


def test_over_processes_under_ddp(ranks):
    x = torch.randn(4, 3, 2, 2)

    def run(rank):
        model = nn.parallel.DistributedDataParallel(nn.Sequential(wide()))
        for _ in range(2):  # the second forward broadcasts the buffers first
            model(x[2 * rank : 2 * rank + 2]).sum().backward()
        return model.module[0].running_mean

    first, second = ranks(2, run)
    assert first.dtype == torch.float64
    assert torch.equal(first, second)
    oracle.assert_close(first, 0.19 * oracle.batch_norm(x, x).mean, dtype=torch.float32)


def test_copies_and_state_dicts():
    layer = wide()
    layer(torch.randn(4, 3, 2, 2))
    copied, loaded = copy.deepcopy(layer), wide()
    loaded.load_state_dict(saved_and_loaded(layer.state_dict()))
    for other in (copied, loaded):
        assert dtypes(other) == dtypes(layer)
        assert torch.equal(other.running_var, layer.running_var)
    torchs = nn.BatchNorm2d(3)
    torchs.load_state_dict(layer.state_dict())
    assert torch.equal(torchs.running_var, layer.running_var.float())
    torchs(torch.randn(4, 3, 2, 2))
    layer.load_state_dict(torchs.state_dict())
    assert dtypes(layer)[1:] == [torch.float64, torch.float64]
    assert torch.equal(layer.running_var.float(), torchs.running_var)


@pytest.mark.parametrize("training", [False, True])
def test_under_torch_compile(training):
    layer = wide().train(training)
    layer.running_mean.fill_(0.25)
    plain = copy.deepcopy(layer)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(4, 3, 2, 2)
    mine, its = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, z = compiled(mine), plain(its)
    y.square().sum().backward(), z.square().sum().backward()
    torch.testing.assert_close(y, z, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.grad, its.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(layer.state_dict(), plain.state_dict(), rtol=1e-6, atol=1e-6)
