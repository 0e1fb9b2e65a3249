"""The four steps in plain torch operations: every device, every dtype. The specification.

Every faster implementation is tested against this file. Nothing here is in place except the
running statistics, so autograd can differentiate each step any number of times.

Elements are computed in float32 (float64 for float64 input) on values centred at a per-channel
shift close to their mean. The subtraction of such a shift is exact or nearly so, however large the
mean is against the deviation. Everything per channel, sums and what the shift's own rounding leaves
over (mean − shift) among it, is float64.

The four steps together are a batch normalisation to read, and to hold others to:

    >>> from syncbn.kernels import composite
    >>> (x, dy), (weight, bias) = torch.randn(2, 4, 3, 5), torch.randn(2, 3)
    >>> sets = composite.measure(x).unsqueeze(0)  # one row for each part of the batch
    >>> affine, running = composite.Affine(weight, bias), composite.Running()
    >>> y, statistics = composite.normalise(x, sets, affine=affine, running=running, eps=1e-5)
    >>> dbias, dweight = sums = composite.gradient_sums(dy, x, statistics)
    >>> dx = composite.input_gradient(dy, x, weight=weight, statistics=statistics, sums=sums)
    >>> expected = torch.nn.functional.batch_norm(x, None, None, weight, bias, training=True)
    >>> torch.allclose(y, expected, atol=1e-5)
    True
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..numerics import reproducible
from ..numerics.moments import Moments, inverse_deviation, merge, unpack, wide_dtype
from ..tensors.layout import check_samples
from .channels import (
    arithmetic,
    coefficients,
    has_a_value,
    measure_in_one_pass,
    per_channel,
    sum_per_channel,
)
from .interface import NO_AFFINE, NO_RUNNING, Affine, Running, Statistics

NAME = "composite"
DEVICES: tuple[str, ...] = ()  # for all that no other is made for


def supports(x: Tensor) -> bool:
    return True


def unavailable() -> str | None:
    return None


def describe() -> str:
    return "plain torch operations"


def measure(x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Packed moments (1 + 2C,) of x (N, C, *): see :mod:`syncbn.numerics.moments`.

    mask: (N, *) bool, or None; only values where it is True count, the others are zero.
    """
    wide = wide_dtype(x.device)
    if mask is None and torch.compiler.is_compiling() and has_a_value(x):
        return measure_in_one_pass(x, wide)
    whole = x.new_full((), x.numel() // x.shape[1], dtype=wide)
    count = whole if mask is None else mask.sum(dtype=wide)
    divisor = count.clamp_min(1)
    values = arithmetic(x)
    shift = (sum_per_channel(values.detach(), wide) / divisor).to(values.dtype)
    shift = shift.nan_to_num(0, 0, 0)  # of ∞ the differences would be no numbers, of anything ∞
    centred = values - per_channel(shift, x)
    if mask is not None:
        centred = torch.where(mask.unsqueeze(1), centred, 0.0)
    delta = sum_per_channel(centred, wide) / divisor
    # delta is small against the deviation: where its square is infinite, the sum is more so.
    lacking = (count * delta.square()).clamp_max(torch.finfo(wide).max)
    m2 = sum_per_channel(centred.square(), wide) - lacking
    return Moments(count, shift.to(wide) + delta, m2.clamp_min(0)).pack()


def normalise(
    x: Tensor,
    sets: Tensor,
    *,
    affine: Affine = NO_AFFINE,
    running: Running = NO_RUNNING,
    eps: float,
) -> tuple[Tensor, Statistics]:
    """y = (x − mean)·invstd·weight + bias with the moments of all sets together.

    x: (N, C, *); sets: (k, 1 + 2C) packed moments of k sets, x among them. The running statistics,
    where given, become (1 − momentum)·old + momentum·new (None: 1 / batches), where new are the
    mean and the unbiased variance; without a single value in any set they stay. The counter of
    batches counts this one, in its own dtype. Returns y like x.
    """
    weight, bias = affine
    merged = merge(unpack(sets))
    count, mean, _ = merged
    invstd = inverse_deviation(merged, eps)
    values = arithmetic(x)
    shift = mean.to(values.dtype)
    scale = invstd if weight is None else invstd * weight.to(invstd.dtype)
    offset = (shift.to(mean.dtype) - mean) * scale
    if bias is not None:
        offset = offset + bias.to(offset.dtype)
    shift, scale, offset = coefficients(x, shift, scale, offset)
    y = torch.addcmul(offset, values - shift, scale).to(x.dtype)
    _move_all(running, merged)  # once there is memory for y
    return y, Statistics(mean, invstd, count)


def gradient_sums(dy: Tensor, x: Tensor, statistics: Statistics) -> Tensor:
    """(Σdy, Σdy·x̂) per channel, (2, C), where x̂ = (x − mean)·invstd. dy, x: (N, C, *)."""
    mean, invstd, _ = statistics
    gradients, values = arithmetic(dy), arithmetic(x)
    shift = mean.to(values.dtype)
    total = sum_per_channel(gradients, mean.dtype)
    dot = sum_per_channel(gradients * (values - coefficients(x, shift)[0]), mean.dtype)
    return torch.stack((total, (dot + (shift.to(mean.dtype) - mean) * total) * invstd))


def input_gradient(
    dy: Tensor, x: Tensor, *, weight: Tensor | None, statistics: Statistics, sums: Tensor
) -> Tensor:
    """dx = weight·invstd·(dy − Σdy/n − x̂·Σ(dy·x̂)/n), like x.

    sums: (2, C) the gradient sums of all sets together, as n, their count, is.
    """
    mean, invstd, count = statistics
    values = arithmetic(x)
    shift = mean.to(values.dtype)
    scale = invstd if weight is None else invstd * weight.to(invstd.dtype)
    average, projection = sums / count.clamp_min(1)
    slope = -projection * invstd
    offset = ((shift.to(mean.dtype) - mean) * slope - average) * scale
    shift, slope, scale, offset = coefficients(x, shift, slope, scale, offset)
    centred = values - shift
    # The scale comes last: its product with the slope has the square of invstd, which underflows.
    if dy.stride() == x.stride():
        projected = torch.addcmul(arithmetic(dy), centred, slope)
    else:  # the same, but for the order of dimensions: addcmul's is that of its first operand
        projected = centred * slope + arithmetic(dy)
    dx = torch.addcmul(offset, projected, scale)
    return dx.to(x.dtype)


def measure_samples(x: Tensor, lengths: Tensor | None) -> Tensor:
    """The representation (1 + 12C,) of x's moments, each sample measured by itself.

    See :mod:`syncbn.numerics.reproducible`. A sample is an element of dimension 0, or lengths (N,)
    of them. Raises ValueError unless samples lie one after the other without gaps; the bits
    depend on the order in memory of the dimensions within a sample.
    """
    check_samples("measure_samples", x)
    packed = [measure(sample) for sample in _samples(x, lengths)]
    return reproducible.moments_to_accumulator(torch.stack(packed))


def merge_samples(received: Tensor) -> Tensor:
    """Packed moments (1, 1 + 2C) of all that W ranks' measure_samples gave (W, 1 + 12C)."""
    return reproducible.merge_moments(received).unsqueeze(0)


def gradient_sums_samples(
    dy: Tensor, x: Tensor, statistics: Statistics, lengths: Tensor | None
) -> Tensor:
    """The representation (6, 2C) of the gradient sums, each sample's summed by itself.

    What :func:`measure_samples` demands of x, it demands of dy too.
    """
    check_samples("gradient_sums_samples", dy, x)
    pairs = zip(_samples(dy, lengths), _samples(x, lengths), strict=True)
    sums = [gradient_sums(*pair, statistics).flatten() for pair in pairs]
    return reproducible.to_accumulator(torch.stack(sums))


def total_samples(received: Tensor) -> Tensor:
    """(Σdy, Σdy·x̂) per channel (2, C) of what W ranks' gradient_sums_samples gave (W, 6, 2C)."""
    return reproducible.finalise(received)[0].view(2, -1)


def _samples(x: Tensor, lengths: Tensor | None) -> Sequence[Tensor]:
    """Also without samples one of no values, so that what is sent in backward depends on dy:

    torch.compile moves into forward what does not, out of step with the other ranks.
    """
    if not len(x):
        return (x,)
    sizes = 1 if lengths is None else lengths.tolist()
    samples: Sequence[Tensor] = x.split(sizes)  # type: ignore[no-untyped-call]
    return samples


@torch.no_grad()
def _move_all(running: Running, merged: Moments) -> None:
    """Count a batch, and move the running statistics towards its own."""
    count, mean, m2 = merged
    if running.batches is not None:
        running.batches.add_(1)
    if running.momentum is None:
        rate = 0.0 if running.batches is None else 1 / running.batches.to(count.dtype)
    else:
        rate = running.momentum
    step = rate * (count > 0).to(count.dtype)
    if running.momentum != 0:  # 0·∞ would be no number
        _move(running.mean, mean, step)
        _move(running.var, m2 / (count - 1).clamp_min(1), step)


def _move(running: Tensor | None, target: Tensor, step: Tensor) -> None:
    if running is not None:
        target = target.detach()  # forward mode works without gradients, too
        running.copy_((1 - step) * running.to(target.dtype) + step * target)
