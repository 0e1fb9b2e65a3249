"""Values of every size that a dtype has: right, or infinite or nan, never a plausible number."""

from __future__ import annotations

import oracle
import pytest
import torch
from cases import laid_out
from test_kernels import whole_step

import syncbn
from syncbn.kernels import composite, native

needs_native = pytest.mark.skipif(not native.available(), reason="needs the compiled operators")

# (mean, deviation) of the input, and the size of the output's gradient.
WIDE = [
    *((0.0, 1e12, 1.0), (1e15, 1e12, 1e-9), (0.0, 1e18, 1e-12), (1e19, 1e19, 1.0)),
    *((0.0, 1e20, 1e-10), (-1e21, 1e20, 1e10), (1e25, 1e25, 1.0), (1e31, 1e30, 1e-4)),
    *((0.0, 1e35, 1e-3), (0.0, 3e37, 1.0), (2e38, 4e37, 1e3), (0.0, 1e-12, 1e-12)),
]
GRID = [
    *((dtype, *point) for dtype in (torch.float32, torch.bfloat16) for point in WIDE),
    *((torch.float16, *point) for point in ((0.0, 8e3, 1.0), (3e4, 5e3, 30.0), (0.0, 1e-4, 10.0))),
    *((torch.float64, *point) for point in ((0.0, 1e100, 1e-50), (1e141, 1e140, 1.0))),
]
grid = pytest.mark.parametrize(("dtype", "mean", "deviation", "steepness"), GRID, ids=str)


def batch(dtype, mean, deviation, steepness, shape=(12, 3, 4, 5)):
    """x, dy and weight; a channel in between is ordinary."""
    generator = torch.Generator().manual_seed(1)
    x, dy = torch.randn(2, *shape, generator=generator, dtype=torch.float64).clamp(-3, 3)
    dy += x  # so that the sum of their products is large against its terms
    ordinary = x[:, 1].clone()
    x = x * deviation + mean
    x[:, 1] = ordinary
    weight = torch.rand(shape[1], generator=generator, dtype=torch.float64) + 0.5
    return x.to(dtype), ((dy + 0.5) * steepness).to(dtype), weight.to(wide(dtype))


def wide(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def train(x, dy, weight, layout="contiguous", **options):
    """y, dx, dweight, dbias, running_mean, running_var of one step with momentum 1."""
    layer = syncbn.SyncBatchNorm(x.shape[1], momentum=1.0, dtype=torch.float64, **options)
    layer.register_parameter("weight", torch.nn.Parameter(weight))
    layer.register_parameter("bias", torch.nn.Parameter(torch.zeros_like(weight)))
    layer.running_var.zero_()
    x = laid_out(x, layout).detach().requires_grad_()
    y = layer(x)
    y.backward(dy)
    return (
        *(y.detach(), x.grad, layer.weight.grad, layer.bias.grad),
        *(layer.running_mean, layer.running_var),
    )


def assert_right(results, x, dy, weight):
    """Each channel by itself: an ordinary one beside others, too."""
    expected = oracle.batch_norm(x, dy, weight)
    expected = (
        *(expected.y, expected.dx, expected.dweight, expected.dbias),
        *(expected.mean, expected.unbiased_var),
    )
    for result, right in zip(results, expected, strict=len(results) == 6):
        by_channel = (lambda t: t.movedim(1, 0)) if result.dim() > 1 else (lambda t: t)
        dtype = max(x.dtype, result.dtype, key=oracle.TOLERANCE.__getitem__)
        if result.dtype == torch.float64 and x.dtype != torch.float64:
            dtype = torch.float32
        for got, exact in zip(by_channel(result), by_channel(right), strict=True):
            size = exact.abs().max()
            close = {"rtol": 0.0, "atol": 10 * oracle.TOLERANCE[dtype]}
            torch.testing.assert_close(got.double() / size, exact / size, **close)


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


def whole(results):
    """What ranks that have parts of the batch found, together."""
    together = [torch.cat(parts) for parts in zip(*(r[:2] for r in results), strict=True)]
    together += [sum(parts) for parts in zip(*(r[2:4] for r in results), strict=True)]
    return *together, *results[0][4:]


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


ODD = {
    "infinite": (float("inf"),),
    "minus_infinite": (-float("inf"),),
    "both": (float("inf"), -float("inf")),
    "nan": (float("nan"),),
    "huge": (1e200, -3e200),  # of float32: infinite
    "largest": (1.7e308, 1.7e308, -1.7e308),
}


def odd_batch(name, dtype, where, shape=(12, 3, 4, 5)):
    """x, odd from sample ``where`` on in the first channel, and running statistics."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    rows = x.flatten(2) if x.dim() > 2 else x.unsqueeze(2)
    for k, value in enumerate(ODD[name]):
        rows[where, 0, k % rows.shape[2]] = value
        where = (where + (k + 1) // rows.shape[2]) % shape[0]
    old = (
        torch.linspace(0, 2, shape[1], dtype=torch.float64),
        torch.ones(shape[1], dtype=torch.float64),
    )
    old[0][1] = old[1][1] = float("inf")
    return x.to(dtype), old


def by_the_formula(x, old, momentum):
    """The running statistics in plain operations."""
    values = x.double().movedim(1, 0).flatten(1)
    n = values.shape[1]
    mean = (values / n).sum(1)
    var = ((values - mean.unsqueeze(1)).square() / (n - 1)).sum(1)
    return tuple(
        (1 - momentum) * o + momentum * new for o, new in zip(old, (mean, var), strict=True)
    )


def follow(x, old, momentum, **options):
    """Running statistics after one batch, and y and dx."""
    layer = syncbn.SyncBatchNorm(
        x.shape[1], momentum=momentum, affine=False, dtype=torch.float64, **options
    )
    layer.running_mean.copy_(old[0])
    layer.running_var.copy_(old[1])
    x.requires_grad_()
    y = layer(x)
    y.sum().backward()
    return layer.running_mean, layer.running_var, y.detach(), x.grad


def assert_follows(results, x, old, momentum):
    mean, var, y, dx = results
    expected = by_the_formula(x.detach(), old, momentum)
    torch.testing.assert_close(mean, expected[0], equal_nan=True)
    torch.testing.assert_close(var, expected[1], equal_nan=True)
    for result in (y, dx):
        assert result[:, 0].isnan().all()
        assert result[:, 2].isfinite().all()


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
