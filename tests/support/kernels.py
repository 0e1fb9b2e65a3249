"""The four steps of an implementation of the kernels as one, and what needs the compiled ones."""

from __future__ import annotations

import pytest
import torch

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
