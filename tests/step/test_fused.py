"""The usual step, of one process alone or over ranks, with kernels that do more in one operator."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import syncbn
from support.in_threads import in_threads
from support.kernels import needs_native
from syncbn.kernels import native

pytestmark = needs_native


def failing(*arguments, **named):
    raise RuntimeError("no memory is left")


def test_what_the_kernels_raise_of_sound_tensors_is_raised(monkeypatch):
    """Nothing else tries in their place."""
    monkeypatch.setattr(native, "batch_norm", failing)
    layer = syncbn.SyncBatchNorm1d(2)
    with pytest.raises(RuntimeError, match="no memory is left"):
        layer(torch.randn(3, 2))
    assert layer.running_mean.tolist() == [0, 0]


def test_no_gradient_of_an_input_that_wants_none(monkeypatch):
    monkeypatch.setattr(native, "batch_norm_backward", failing)
    x, dy = torch.randn(2, 5, 3)
    mine, theirs = syncbn.SyncBatchNorm1d(3), nn.BatchNorm1d(3)
    for layer in (mine, theirs):
        layer(x).backward(dy)
    for name in ("weight", "bias"):
        found, expected = (getattr(layer, name).grad for layer in (mine, theirs))
        torch.testing.assert_close(found, expected)


def test_no_gradient_over_ranks_of_an_input_that_wants_none(monkeypatch):
    monkeypatch.setattr(native, "input_gradient", failing)
    x, dy = torch.randn(2, 4, 5, 3)

    def step(comm):
        layer, here = syncbn.SyncBatchNorm1d(3, process_group=comm), slice(comm.rank, None, 2)
        layer(x[here].mT).backward(dy[here].mT)
        return layer.weight.grad, layer.bias.grad

    found = [sum(grads) for grads in zip(*in_threads(2, step), strict=True)]
    whole = nn.BatchNorm1d(3)
    whole(x.mT).backward(dy.mT)
    for grad, expected in zip(found, (whole.weight.grad, whole.bias.grad), strict=True):
        torch.testing.assert_close(grad, expected)


def test_ranks_without_gradients_beside_one_that_wants_one():
    def step(comm):
        layer = syncbn.SyncBatchNorm1d(3, process_group=comm, affine=False)
        x = torch.randn(4, 3, requires_grad=comm.rank == 0)
        y = layer(x)
        assert y.requires_grad
        y.sum().backward()
        alone = syncbn.SyncBatchNorm1d(3, process_group=comm, affine=False)
        return alone(x.detach()).requires_grad

    assert in_threads(2, step) == [False, False]


def test_a_freed_weight_is_refused_before_a_message():
    """In backward, too, with the words of the checks."""

    def step(comm):
        layer = syncbn.SyncBatchNorm1d(3, process_group=comm)
        y = layer(torch.randn(4, 3, requires_grad=True))
        layer.weight.untyped_storage().resize_(0)
        calls = comm._frames.number
        with pytest.raises(RuntimeError, match="expected weight with its values in memory"):
            y.sum().backward()
        with pytest.raises(RuntimeError, match="expected weight with its values in memory"):
            layer(torch.randn(4, 3))
        return comm._frames.number - calls

    assert in_threads(2, step) == [0, 0]
