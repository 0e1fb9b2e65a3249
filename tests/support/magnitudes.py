"""Batches of every size that a dtype has, odd values among them, and what is right of them."""

from __future__ import annotations

import torch

import syncbn
from support import oracle
from support.cases import laid_out

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


def whole(results):
    """What ranks that have parts of the batch found, together."""
    together = [torch.cat(parts) for parts in zip(*(r[:2] for r in results), strict=True)]
    together += [sum(parts) for parts in zip(*(r[2:4] for r in results), strict=True)]
    return *together, *results[0][4:]


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
