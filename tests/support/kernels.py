"""The four steps of an implementation of the kernels as one, and what needs the compiled ones."""

from __future__ import annotations

import os
from functools import partial

import pytest
import torch
from torch.utils._pytree import tree_leaves, tree_map_only

from syncbn.kernels import Affine, native

needs_native = pytest.mark.skipif(not native.available(), reason=str(native.unavailable()))


def whole_step(k, x, dy, weight, bias, pieces=1, eps=1e-5):
    """Forward and backward over ``pieces`` sets that are together the batch."""
    xs, dys = x.tensor_split(pieces), dy.tensor_split(pieces)
    sets = torch.stack([k.measure(piece) for piece in xs])
    forward = [k.normalise(piece, sets, affine=Affine(weight, bias), eps=eps) for piece in xs]
    found = forward[0][1]
    sums = sum(k.gradient_sums(d, p, found) for d, p in zip(dys, xs, strict=True))
    dxs = [
        k.input_gradient(d, p, weight=weight, statistics=found, sums=sums)
        for d, p in zip(dys, xs, strict=True)
    ]
    return torch.cat([y for y, _ in forward]), torch.cat(dxs), sums, found.mean, found.invstd


DEVICE = os.environ.get("SYNCBN_TEST_DEVICE")  # where kernels get the tests' tensors; see on_device


class OnDevice:
    """The functions of a kernel for tensors that the test has on the CPU.

    They get copies on a device, with the same strides, and what they write in place comes back.
    """

    def __init__(self, steps, device):
        self.steps, self.device, self.NAME = steps, torch.device(device), steps.NAME

    def __getattr__(self, name):
        function = getattr(self.steps, name)

        def call(*args, **options):
            given = options.get("running")
            move = partial(tree_map_only, torch.Tensor, partial(moved, device=self.device))
            args, options = move((args, options))
            result = function(*args, **options)
            pairs = zip(tree_leaves(given), tree_leaves(options.get("running")), strict=True)
            for mine, theirs in pairs:
                if isinstance(mine, torch.Tensor):
                    mine.copy_(theirs)
            return tree_map_only(torch.Tensor, partial(moved, device="cpu"), result)

        return call


def moved(tensor, device):
    """A copy with the same strides, in memory that is as large."""
    values = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    values.set_(tensor.untyped_storage())
    return values.to(device, copy=True).as_strided(
        tensor.shape, tensor.stride(), tensor.storage_offset()
    )


def on_device(steps):
    """The kernel, for tests; on another device than the CPU where SYNCBN_TEST_DEVICE says so."""
    return OnDevice(steps, DEVICE) if DEVICE else steps
