"""Every name of Synchronized-BatchNorm-PyTorch, and what does its work here.

Its layers, replication and conversion: https://github.com/vacancy/Synchronized-BatchNorm-PyTorch
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import syncbn
from support.cases import CLOSE
from support.replicas import CPUS, assert_same_step, images, nested, twins
from syncbn.kernels import composite


def layers_agree(ours, theirs, shape):
    """Over three replicas and on one device, in training and eval mode."""
    for devices in (CPUS, ["cpu"]):
        torch.manual_seed(1)
        layer, alone = ours(10).double(), theirs(10).double()
        parallel = syncbn.DataParallel(layer, devices)
        for _ in range(2):
            assert_same_step(parallel, alone, torch.randn(shape, dtype=torch.float64) * 3 + 1)
        x = torch.randn(shape, dtype=torch.float64)
        torch.testing.assert_close(parallel.eval()(x), alone.eval()(x), **CLOSE)


def test_SynchronizedBatchNorm1d():
    layers_agree(syncbn.SyncBatchNorm1d, nn.BatchNorm1d, (16, 10))
    layers_agree(syncbn.SyncBatchNorm1d, nn.BatchNorm1d, (16, 10, 5))


def test_SynchronizedBatchNorm2d():
    layers_agree(syncbn.SyncBatchNorm2d, nn.BatchNorm2d, (16, 10, 6, 5))


def test_SynchronizedBatchNorm3d():
    layers_agree(syncbn.SyncBatchNorm3d, nn.BatchNorm3d, (4, 10, 3, 4, 2))


def test_DataParallelWithCallback():
    """Replicas know each other without a callback: the model needs no say in it."""
    parallel, alone = twins(nested)
    assert isinstance(parallel, nn.DataParallel)
    for step, samples in enumerate((4, 2, 7)):
        assert_same_step(parallel, alone, images(samples, step))


def as_on_three_devices(module):
    """What torch.nn.DataParallel is on a machine that has them; without, it only calls module."""
    wrapper = nn.DataParallel(module)
    wrapper.device_ids, wrapper.dim = [torch.device("cpu")] * 3, 0
    wrapper.output_device = wrapper.src_device_obj = torch.device("cpu")
    return wrapper


def test_patch_replication_callback():
    """A torch.nn.DataParallel that exists, and whose layers are syncbn's already."""
    _, alone = twins(nested)
    wrapper = as_on_three_devices(syncbn.convert(copy.deepcopy(alone)))
    state, keys = dict(vars(wrapper)), list(wrapper.state_dict())
    assert syncbn.convert(wrapper) is wrapper
    assert type(wrapper) is syncbn.DataParallel
    assert list(wrapper.state_dict()) == keys
    assert all(vars(wrapper)[name] is value for name, value in state.items())
    assert wrapper.devices == [torch.device("cpu")] * 3
    assert_same_step(wrapper, alone, images(4))


def test_convert_model():
    """Layers and the torch.nn.DataParallel around them, at any depth."""
    _, alone = twins(nested)
    for outer in (lambda model: model, nn.Sequential):
        wrapper = as_on_three_devices(copy.deepcopy(alone))
        model = syncbn.convert(outer(wrapper))
        assert type(wrapper) is syncbn.DataParallel
        assert type(wrapper.module[1]) is syncbn.SyncBatchNorm2d
        x = images(5)
        torch.testing.assert_close(model(x), copy.deepcopy(alone)(x), **CLOSE)
        syncbn.revert(model)
        assert type(wrapper) is nn.DataParallel
        assert type(wrapper.module[1]) is nn.BatchNorm2d
        assert not hasattr(wrapper, "_origin")


def test_convert_model_leaves_other_wrappers_alone():
    class Mine(nn.DataParallel):
        def scatter(self, *args):
            return super().scatter(*args)

    without = nn.DataParallel(nn.Linear(2, 2))
    assert type(syncbn.convert(without)) is nn.DataParallel
    assert type(syncbn.convert(Mine(nn.BatchNorm1d(2)))) is Mine
    ours = syncbn.convert(syncbn.DataParallel(nn.BatchNorm1d(2), CPUS))
    assert type(syncbn.revert(ours)) is syncbn.DataParallel
    kept = syncbn.convert(nn.DataParallel(nn.BatchNorm1d(2)), where=lambda *_: False)
    assert type(kept) is nn.DataParallel


def test_converted_without_devices_calls_its_module():
    if torch.cuda.is_available():
        pytest.skip("torch.nn.DataParallel has devices here")
    _, alone = twins(nested)
    wrapper = syncbn.convert(nn.DataParallel(copy.deepcopy(alone)))
    assert wrapper.devices == []
    assert_same_step(wrapper, alone, images(4))


class Reimplemented(nn.BatchNorm2d):
    """Batch normalisation of the specification's steps; autograd finds the gradients."""

    def forward(self, x):
        sets = composite.measure(x).unsqueeze(0)
        affine = composite.Affine(self.weight, self.bias)
        running = composite.Running(
            *(self.running_mean, self.running_var, self.num_batches_tracked, self.momentum)
        )
        return composite.normalise(x, sets, affine=affine, running=running, eps=self.eps)[0]


@pytest.mark.parametrize(
    "options", [{}, {"eps": 1e-2, "momentum": None}, {"affine": False}, {"momentum": 0.7}], ids=str
)
def test_batchnorm_reimpl(options):
    mine, theirs = Reimplemented(3, **options).double(), nn.BatchNorm2d(3, **options).double()
    assert syncbn.kernels.composite is composite
    for step in range(3):
        x = torch.randn(5, 3, 4, 2, dtype=torch.float64) * 2 + step
        found = []
        for layer in (mine, theirs):
            inputs = [x.clone().requires_grad_(), *layer.parameters()]
            y = layer(inputs[0])
            first = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
            second = torch.autograd.grad(sum(g.square().sum() for g in first), inputs)
            found.append([y, *first, *second, *layer.buffers()])
        for ours, its in zip(*found, strict=True):
            torch.testing.assert_close(ours, its, rtol=1e-9, atol=1e-9)


def test_batchnorm_reimpl_backward():
    """The steps of the specification's backward are the gradients of torch's layer."""
    layer = nn.BatchNorm2d(3).double()
    nn.init.normal_(layer.weight, 1.0)
    x, dy = torch.randn(2, 5, 3, 4, 2, dtype=torch.float64)
    layer(x.requires_grad_()).backward(dy)
    sets = composite.measure(x.detach()).unsqueeze(0)
    x_, weight = x.detach(), layer.weight.detach()
    _, found = composite.normalise(x_, sets, eps=layer.eps)
    sums = composite.gradient_sums(dy, x_, found)
    dx = composite.input_gradient(dy, x_, weight=weight, statistics=found, sums=sums)
    torch.testing.assert_close(dx, x.grad, **CLOSE)
    torch.testing.assert_close(sums[1], layer.weight.grad, **CLOSE)
    torch.testing.assert_close(sums[0], layer.bias.grad, **CLOSE)
