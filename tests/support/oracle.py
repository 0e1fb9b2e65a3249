"""The judge: batch normalisation of one whole batch in NumPy float64, by its formulas.

Independent of torch's batch norm and of this library. Statistics are taken of values centred twice,
so that they are right to rounding at any mean.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

# Rounding of one result, with room for a few operations. Relative to the largest expected value.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.2e-2,
}


@dataclass(frozen=True)
class Result:
    """Outputs, gradients, statistics and new running statistics of one training step."""

    y: Tensor
    dx: Tensor
    dweight: Tensor
    dbias: Tensor
    mean: Tensor
    var: Tensor
    unbiased_var: Tensor

    def running(self, old_mean: float, old_var: float, momentum: float) -> tuple[Tensor, Tensor]:
        """(running_mean, running_var) after one step from constant old values."""
        return (
            (1 - momentum) * old_mean + momentum * self.mean,
            (1 - momentum) * old_var + momentum * self.unbiased_var,
        )


def batch_norm(
    x: Tensor,
    dy: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Result:
    """Forward and backward over the whole batch x (N, C, *) with output gradient dy."""
    values, gradient = (np.asarray(t.detach().double()) for t in (x, dy))
    channels = values.shape[1]
    axes = (0, *range(2, values.ndim))
    n = values.size // channels

    def column(v: np.ndarray) -> np.ndarray:
        return v.reshape(1, channels, *(1,) * (values.ndim - 2))

    w = np.ones(channels) if weight is None else np.asarray(weight.detach().double())
    b = np.zeros(channels) if bias is None else np.asarray(bias.detach().double())
    rough = values.mean(axes)
    rest = (values - column(rough)).mean(axes)
    centred = values - column(rough) - column(rest)
    var = (centred**2).mean(axes)
    invstd = (var + eps) ** -0.5
    normal = centred * column(invstd)
    dbias = gradient.sum(axes)
    dweight = (gradient * normal).sum(axes)
    dx = column(w * invstd) * (gradient - column(dbias / n) - normal * column(dweight / n))
    y = normal * column(w) + column(b)
    arrays = (y, dx, dweight, dbias, rough + rest, var, var * n / max(n - 1, 1))
    return Result(*(torch.from_numpy(np.asarray(a)) for a in arrays))


def assert_close(
    actual: Tensor, expected: Tensor, *, dtype: torch.dtype | None = None, factor: float = 1.0
) -> None:
    """Equal up to ``factor`` roundings of ``dtype`` (``actual``'s own) of the largest value."""
    assert actual.shape == expected.shape, (actual.shape, expected.shape)
    if not expected.numel():
        return
    tolerance = TOLERANCE[dtype or actual.dtype] * factor
    scale = max(0.1, expected.abs().max().item())
    error = (actual.double() - expected).abs().max().item() / scale
    assert error <= tolerance, f"relative error {error:.3g} > {tolerance:.3g}"
