"""A rank without memory in the middle of a step: its state stays, the others are told."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist

import syncbn
from syncbn import kernels
from syncbn.kernels import composite

MOST = torch.OutOfMemoryError("CUDA out of memory")


def plain_operations():
    """As on devices that no kernels are for."""
    return mock.patch.object(kernels, "_usable", frozenset((composite.NAME,)))


def state_of(layer):
    return {name: value.clone() for name, value in layer.state_dict().items()}


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("operation", ["addcmul", "cat"])
def test_state_is_untouched(operation, momentum):
    layer, x = syncbn.SyncBatchNorm(3, momentum=momentum, dtype=torch.float64), torch.randn(4, 3)
    before = state_of(layer)
    failing = mock.patch.object(torch, operation, side_effect=MOST)
    with plain_operations(), failing, pytest.raises(torch.OutOfMemoryError):
        layer(x)
    torch.testing.assert_close(state_of(layer), before, rtol=0, atol=0)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_others_are_told(ranks, where):
    def run(rank):
        layer = syncbn.SyncBatchNorm(3, process_group=dist.new_group([0, 1]))
        x = torch.randn(4, 3, requires_grad=True)
        step = "normalise" if where == "forward" else "gradient_sums"
        failing = mock.patch.object(composite, step, side_effect=MOST)
        with plain_operations():
            before = state_of(layer)
            if rank == 1:
                with failing, pytest.raises(torch.OutOfMemoryError):
                    layer(x).sum().backward()
                if where == "forward":
                    torch.testing.assert_close(state_of(layer), before, rtol=0, atol=0)
                return ""
            with pytest.raises(RuntimeError) as caught:
                layer(x).sum().backward()
            return str(caught.value)

    told, _ = ranks(2, run)
    assert "rank 1" in told
    assert "out of memory" in told
