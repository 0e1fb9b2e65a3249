"""Values of every size that a dtype has: right, or infinite or nan, never a plausible number."""

from __future__ import annotations

import pytest
import torch

import syncbn
from support import oracle
from support.kernels import needs_native, whole_step
from support.magnitudes import (
    GRID,
    ODD,
    assert_follows,
    assert_right,
    batch,
    follow,
    odd_batch,
    train,
    whole,
    wide,
)
from syncbn.kernels import composite, native

grid = pytest.mark.parametrize(("dtype", "mean", "deviation", "steepness"), GRID, ids=str)


@needs_native
@grid
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "transposed"])
def test_one_process(dtype, mean, deviation, steepness, layout):
    x, dy, weight = batch(dtype, mean, deviation, steepness)
    assert_right(train(x, dy, weight, layout), x, dy, weight)


@needs_native
@grid
@pytest.mark.parametrize("shape", [(40, 20), (200, 3), (64, 3, 2, 2), (9, 3, 70)], ids=str)
def test_rows_and_planes(dtype, mean, deviation, steepness, shape):
    x, dy, weight = batch(dtype, mean, deviation, steepness, shape)
    assert_right(train(x, dy, weight), x, dy, weight)


SPLIT = (5, 0, 7)


@needs_native
@pytest.mark.parametrize("reproducible", [False, True])
@pytest.mark.parametrize("shape", [(12, 3, 4, 5), (12, 20)], ids=str)
def test_ranks(ranks, shape, reproducible):
    def steps(rank):
        results = []
        for point in GRID:
            x, dy, weight = (
                t.split(SPLIT)[rank] if t.dim() > 1 else t for t in batch(*point, shape)
            )
            results.append(train(x, dy, weight, reproducible=reproducible))
        return results

    for point, *results in zip(GRID, *ranks(3, steps), strict=True):
        assert_right(whole(results), *batch(*point, shape))


@needs_native
@grid
@pytest.mark.parametrize("shape", [(12, 3, 4, 5), (12, 20)], ids=str)
def test_reproducible_on_one_process(dtype, mean, deviation, steepness, shape):
    x, dy, weight = batch(dtype, mean, deviation, steepness, shape)
    assert_right(train(x, dy, weight, reproducible=True), x, dy, weight)


@needs_native
@grid
def test_masked(dtype, mean, deviation, steepness):
    """What doesn't count is of another size."""
    x, dy, _ = batch(dtype, mean, deviation, steepness)
    mask = torch.ones(12, 4, 5, dtype=torch.bool)
    mask[:, -1] = False
    padded = torch.where(mask.unsqueeze(1), x, torch.inf)
    layer = syncbn.SyncBatchNorm(3, affine=False, track_running_stats=False)
    padded.requires_grad_()
    y = layer(padded, mask=mask)
    y.backward(dy)
    counted, gradient = x[:, :, :-1], dy[:, :, :-1]
    expected = oracle.batch_norm(counted, gradient)
    oracle.assert_close(y[:, :, :-1], expected.y)
    got = padded.grad[:, :, :-1].double()
    for c in range(3):
        size = expected.dx[:, c].abs().max()
        oracle.assert_close(got[:, c] / size, expected.dx[:, c] / size, dtype=dtype, factor=10)


@needs_native
@grid
def test_replicas(dtype, mean, deviation, steepness):
    x, dy, weight = batch(dtype, mean, deviation, steepness)
    layer = syncbn.SyncBatchNorm(3, dtype=wide(dtype))
    with torch.no_grad():
        layer.weight.copy_(weight)
    model = syncbn.DataParallel(torch.nn.Sequential(layer), ["cpu"] * 3)
    x.requires_grad_()
    y = model(x)
    y.backward(dy)
    found = (y.detach(), x.grad, layer.weight.grad, layer.bias.grad)
    assert_right(found, x.detach(), dy, weight)


@grid
@pytest.mark.parametrize("pieces", [1, 3])
def test_plain_operations_are_right_or_say_nothing(dtype, mean, deviation, steepness, pieces):
    x, dy, weight = batch(dtype, mean, deviation, steepness)
    y, dx, sums, *_ = whole_step(composite, x, dy, weight, None, pieces)
    expected = oracle.batch_norm(x, dy, weight)
    factor = 10 * oracle.TOLERANCE[dtype]
    exact = (expected.y, expected.dx, expected.dbias, expected.dweight)
    for result, right in zip((y, dx, *sums), exact, strict=True):
        for c in range(x.shape[1]):
            got, value = (t[:, c] if t.dim() > 1 else t[c] for t in (result, right))
            close = (got.double() - value).abs() <= factor * value.abs().max()
            assert close.all() or (deviation > 1e17 and not got.isfinite().any())


odd = pytest.mark.parametrize("name", ODD)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
momenta = pytest.mark.parametrize("momentum", [0.25, 1.0])


@odd
@both_dtypes
@momenta
@pytest.mark.parametrize("shape", [(12, 3, 4, 5), (120, 3), (64, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("where", [0, 11])
def test_infinite_statistics_follow_the_formula(name, dtype, momentum, shape, where):
    x, old = odd_batch(name, dtype, where, shape)
    assert_follows(follow(x, old, momentum), x, old, momentum)
    x, old = odd_batch(name, dtype, where, shape)
    assert_follows(follow(x, old, momentum, reproducible=True), x, old, momentum)


@momenta
@pytest.mark.parametrize("reproducible", [False, True])
def test_infinite_statistics_over_ranks(ranks, momentum, reproducible):
    cases = [
        (name, dtype, where)
        for name in ODD
        for dtype in (torch.float32, torch.float64)
        for where in (0, 5)
    ]

    def steps(rank):
        results = []
        for case in cases:
            x, old = odd_batch(*case)
            mine = x.split(SPLIT)[rank].clone()
            results.append(follow(mine, old, momentum, reproducible=reproducible))
        return results

    for case, *results in zip(cases, *ranks(3, steps), strict=True):
        x, old = odd_batch(*case)
        parts = [torch.cat(found) for found in zip(*(r[2:] for r in results), strict=True)]
        for mean, var, *_ in results:
            assert_follows((mean, var, *parts), x, old, momentum)


@odd
@both_dtypes
@momenta
@pytest.mark.parametrize(
    "k", [composite, *([native] if native.available() else [])], ids=lambda k: k.NAME
)
@pytest.mark.parametrize("pieces", [1, 3, 12])
def test_infinite_sets_follow_the_formula(k, name, dtype, momentum, pieces):
    if k is composite and name == "largest":
        pytest.skip("sums past the largest number")
    x, old = odd_batch(name, dtype, 0)
    sets = [k.measure(piece) for piece in (*x.tensor_split(pieces), x[:0])]
    mean, var = (o.clone() for o in old)
    running = composite.Running(mean, var, None, momentum)
    y, found = k.normalise(x, torch.stack(sets), running=running, eps=1e-5)
    assert found.invstd[0].isnan()
    assert_follows((mean, var, y, y), x, old, momentum)
