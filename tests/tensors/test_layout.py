"""Outputs and input gradients keep the order of the input's dimensions in memory, on every path."""

from __future__ import annotations

import copy
import itertools

import pytest
import torch

import syncbn
from support.cases import strides
from support.layers import Pair
from syncbn import kernels
from syncbn.kernels import composite

SHAPE = (4, 3, 5, 2)


def laid_out(order, gaps):
    """A tensor whose dimensions are in this order in memory."""
    x = torch.randn(SHAPE).permute(order).contiguous()
    x = torch.stack((x, x), -1)[..., 0] if gaps else x
    return x.permute([order.index(d) for d in range(4)])


INPUTS = [laid_out(*case) for case in itertools.product(itertools.permutations(range(4)), (0, 1))]


def masked(layer):
    return lambda x: layer(x, torch.ones(4, 5, 2, dtype=torch.bool))


def wide():
    return syncbn.SyncBatchNorm(3, statistics_dtype=torch.float64)


PATHS = {
    "training": lambda: syncbn.SyncBatchNorm(3),
    "cumulative": lambda: syncbn.SyncBatchNorm(3, momentum=None),
    "eval": lambda: syncbn.SyncBatchNorm(3).eval(),
    "wide": wide,
    "wide eval": lambda: wide().eval(),
    "ranks": lambda: syncbn.SyncBatchNorm(3, process_group=Pair()),
    "masked": lambda: masked(syncbn.SyncBatchNorm(3)),
    "masked ranks": lambda: masked(syncbn.SyncBatchNorm(3, process_group=Pair())),
    "masked eval": lambda: masked(syncbn.SyncBatchNorm(3).eval()),
    "reproducible": lambda: syncbn.SyncBatchNorm(3, reproducible=True),
    "reproducible ranks": lambda: syncbn.SyncBatchNorm(3, reproducible=True, process_group=Pair()),
}


@pytest.fixture(params=["composite", "default"])
def chosen(request, monkeypatch):
    if request.param == "composite":
        monkeypatch.setattr(kernels, "_usable", {composite.NAME})


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("keep_graph", [False, True])
def test_every_order_is_kept(path, keep_graph):
    for like in INPUTS:
        x = like.detach().requires_grad_()
        y = PATHS[path]()(x)
        (dx,) = torch.autograd.grad(y, x, torch.randn(SHAPE), create_graph=keep_graph)
        assert strides(y) == strides(dx) == strides(torch.empty_like(x)), x.stride()


@pytest.mark.parametrize("training", [True, False])
def test_values_of_torchs_operator_to_the_bit(training, monkeypatch):
    """Where it serves, its results are moved, not computed in another order."""
    monkeypatch.setattr(kernels, "_usable", {composite.NAME})
    dy = torch.randn(SHAPE)
    for like in INPUTS:
        ours, torchs = syncbn.SyncBatchNorm2d(3), torch.nn.BatchNorm2d(3)
        results = []
        for layer in (ours.train(training), torchs.train(training)):
            x = like.detach().requires_grad_()
            y = layer(x)
            (dx,) = torch.autograd.grad(y, x, dy, create_graph=True)
            results.append((y, dx, layer.running_mean, layer.running_var))
            second = torch.autograd.grad(dx.square().sum(), (x, layer.weight), allow_unused=True)
            results[-1] += tuple(gradient for gradient in second if gradient is not None)
        pairs = list(zip(*results, strict=True))
        assert all(torch.equal(*pair) for pair in pairs[:4])
        for pair in pairs[4:]:
            torch.testing.assert_close(*pair)


def test_usual_layouts_cost_no_copy(monkeypatch):
    """Neither is moved, nor looked at in backward."""

    def moved(*args):
        raise AssertionError("moved")

    monkeypatch.setattr("syncbn.tensors.layout.laid", moved)
    for room in ("tensors.layout", "step.dispatch"):
        monkeypatch.setattr(f"syncbn.{room}.with_gradient_like", moved)
    monkeypatch.setattr(kernels, "_usable", {composite.NAME})
    for x in (torch.randn(SHAPE), torch.randn(SHAPE).to(memory_format=torch.channels_last)):
        for layer in (PATHS["training"](), PATHS["eval"](), PATHS["reproducible ranks"]()):
            assert layer(x).stride() == x.stride()


SINGLE = [
    (torch.randn(1, 3, 4, 2), (0, 1, 2, 3)),
    (torch.randn(1, 4, 2, 3), (0, 3, 1, 2)),  # channels_last
    (torch.randn(4, 2, 3)[None], (0, 3, 1, 2)),  # one image as it is read, with other strides
    (torch.randn(2, 3, 4, 1), (0, 1, 2, 3)),
    (torch.randn(1, 2, 4, 2, 3), (0, 4, 1, 2, 3)),
]


@pytest.mark.usefixtures("chosen")
@pytest.mark.parametrize("path", ["training", "eval", "masked eval"])
@pytest.mark.parametrize("case", range(len(SINGLE)))
@pytest.mark.parametrize("turned", [False, True])
def test_gradients_where_a_stride_means_nothing(path, case, turned):
    """torch's own operator takes one layout for another there, in x and in dy."""
    values, order = SINGLE[case]
    x = values.permute(order).detach()
    if order == (0, 3, 1, 2) and case == 2:
        x = values[0].permute(2, 0, 1)[None]
    dy = torch.randn(x.shape)
    if turned and x.dim() == 4:
        dy = torch.randn(x.shape[2], x.shape[3], x.shape[1]).permute(2, 0, 1)[None].expand(x.shape)
    mask = torch.ones(x.shape[0], *x.shape[2:], dtype=torch.bool)
    layer = syncbn.SyncBatchNorm(3).train(path == "training")
    plain = copy.deepcopy(layer).double()
    results = []
    for each, x_, dy_ in ((layer, x, dy), (plain, x.double().contiguous(), dy.double())):
        x_ = x_.detach().requires_grad_()
        if each is layer:
            y = layer(x_, mask if path == "masked eval" else None)
        else:  # the formula
            dims = (0, *range(2, x.dim()))
            mean, var = x_.new_zeros(1), x_.new_ones(1)
            if path == "training":
                mean, var = x_.mean(dims, keepdim=True), x_.var(dims, False, keepdim=True)
            y = (x_ - mean) / (var + each.eps).sqrt() * each.weight.view(-1, *[1] * (x.dim() - 2))
        y.backward(dy_)
        results.append([x_.grad.double(), each.weight.grad.double()])
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)
