"""One process alone, with kernels that do all steps in one."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import syncbn
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
