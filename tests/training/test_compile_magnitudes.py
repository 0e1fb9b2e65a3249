"""Values of every size in compiled graphs: as test_magnitudes.py has them in eager mode."""

from __future__ import annotations

import pytest
import torch

import syncbn
from support.compiling import BACKENDS, compiled
from support.kernels import needs_native
from support.magnitudes import (
    GRID,
    ODD,
    assert_follows,
    assert_right,
    batch,
    odd_batch,
    whole,
    wide,
)
from syncbn.kernels import native

SPLIT = (5, 7)


class Layers:
    """One layer for each dtype of input, so that its graph serves every case."""

    def __init__(self, backend, **options):
        self._backend, self._options, self._calls = backend, options, {}

    def layer(self, dtype, momentum, affine):
        """The layer as it was made, and its compiled form."""
        key = dtype, momentum, affine
        if key not in self._calls:
            layer = syncbn.SyncBatchNorm(
                3,
                momentum=momentum,
                affine=affine,
                dtype=wide(dtype),
                statistics_dtype=torch.float64,
                **self._options,
            )
            self._calls[key] = layer, compiled(layer, self._backend)[0]
        layer, call = self._calls[key]
        layer.zero_grad()
        layer.reset_parameters()
        return layer, call

    def train(self, x, dy, weight):
        """As support.magnitudes.train()."""
        layer, call = self.layer(x.dtype, 1.0, affine=True)
        with torch.no_grad():
            layer.weight.copy_(weight)
        layer.running_var.zero_()
        x = x.clone().requires_grad_()
        y = call(x)
        y.backward(dy)
        state = layer.running_mean.clone(), layer.running_var.clone()
        return y.detach(), x.grad, layer.weight.grad, layer.bias.grad, *state

    def follow(self, x, old, momentum):
        """As support.magnitudes.follow()."""
        layer, call = self.layer(x.dtype, momentum, affine=False)
        layer.running_mean.copy_(old[0])
        layer.running_var.copy_(old[1])
        x = x.clone().requires_grad_()
        y = call(x)
        y.sum().backward()
        return layer.running_mean.clone(), layer.running_var.clone(), y.detach(), x.grad


def infinite(dtypes):
    """(name, dtype, place) of the odd batches."""
    return [(name, dtype, where) for name in ODD for dtype in dtypes for where in (0, 5)]


def shares(tensor, rank):
    return tensor.split(SPLIT)[rank] if tensor.dim() > 1 else tensor


@needs_native
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("reproducible", "half"),
    [
        (False, False),
        pytest.param(False, True, marks=pytest.mark.slow),
        pytest.param(True, False, marks=pytest.mark.slow),
        pytest.param(True, True, marks=pytest.mark.slow),
    ],
)
def test_ranks(ranks, backend, reproducible, half):
    grid = [point for point in GRID if (point[0].itemsize == 2) == half]
    cases = [] if half else infinite((torch.float32, torch.float64))

    def run(rank):
        assert native.available()
        layers = Layers(backend, reproducible=reproducible)
        steps = [layers.train(*(shares(t, rank) for t in batch(*point))) for point in grid]
        follows = []
        for case in cases:
            x, old = odd_batch(*case)
            follows.append(layers.follow(shares(x, rank), old, 0.25))
        return steps, follows

    steps, follows = zip(*ranks(2, run, timeout=300), strict=True)
    for point, *results in zip(grid, *steps, strict=True):
        assert_right(whole(results), *batch(*point))
    for case, *results in zip(cases, *follows, strict=True):
        x, old = odd_batch(*case)
        parts = [torch.cat(found) for found in zip(*(r[2:] for r in results), strict=True)]
        for mean, var, *_ in results:
            assert_follows((mean, var, *parts), x, old, 0.25)


@needs_native
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_process_with_wider_statistics(backend):
    """Which torch's operator does not take."""
    layers = Layers(backend)
    for point in GRID:
        assert_right(layers.train(*batch(*point)), *batch(*point))
    for case in infinite((torch.float32,)):
        x, old = odd_batch(*case)
        assert_follows(layers.follow(x, old, 0.25), x, old, 0.25)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("dtype", "deviation"), [(torch.float32, 1e12), (torch.float32, 1e25), (torch.float64, 1e200)]
)
def test_one_process_with_torchs_operator_is_as_torchs(backend, dtype, deviation):
    """Also where that leaves the range, as docs/guides/amp.md says: the bias."""
    x = (torch.randn(6, 3, 4, dtype=torch.float64) * deviation).to(dtype)
    layer, plain = (kind(3, dtype=dtype) for kind in (syncbn.SyncBatchNorm, torch.nn.BatchNorm1d))
    call, _ = compiled(layer, backend)
    found = []
    for module in (call, plain):
        given = x.clone().requires_grad_()
        y = module(given)
        y.sin().sum().backward()
        found.append((y.detach(), given.grad * deviation))
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(layer.state_dict(), plain.state_dict(), rtol=1e-4, atol=0.0)
