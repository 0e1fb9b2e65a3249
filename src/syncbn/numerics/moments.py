"""(count, mean, M2) of a set of values per channel, and how sets merge: pure mathematics.

M2 is the sum of squared deviations from the mean, so the biased variance is M2 / count. Sets merge
by the formula of Chan, Golub & LeVeque, "Updating Formulae and a Pairwise Algorithm for Computing
Sample Variances" (1979), here for k sets at once:

    n = Σ nᵢ        mean = Σ nᵢ·meanᵢ / n        M2 = Σ M2ᵢ + Σ nᵢ·(meanᵢ − mean)²

E[x²] − E[x]² appears nowhere: it cancels as soon as the mean is large against the deviation.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Moments(NamedTuple):
    """Moments of a set of values, or of several sets along leading dimensions ``*``.

    count: (*,) number of values per channel; mean, m2: (*, C). All of one floating dtype
    (float64 wherever the device has it, so that counts are exact up to 2⁵³).
    """

    count: Tensor  # type: ignore[assignment]  # it hides tuple.count
    mean: Tensor
    m2: Tensor

    def pack(self) -> Tensor:
        """One tensor (*, 1 + 2C): count, mean, M2. What a rank sends."""
        return torch.cat((self.count.unsqueeze(-1), self.mean, self.m2), dim=-1)


def wide_dtype(device: torch.device) -> torch.dtype:
    """The dtype of per-channel statistics: float64, or float32 where the device has no float64."""
    return torch.float32 if device.type == "mps" else torch.float64


def unpack(packed: Tensor) -> Moments:
    """The views of a packed tensor (*, 1 + 2C), the inverse of :meth:`Moments.pack`."""
    channels = packed.shape[-1] // 2
    return Moments(packed[..., 0], packed[..., 1 : 1 + channels], packed[..., 1 + channels :])


def merge(sets: Moments) -> Moments:
    """Moments of the union of k sets: count (k,), mean and M2 (k, C) → count (), mean and M2 (C,).

    Empty sets weigh nothing; the union of empty sets has count, mean and M2 zero.
    """
    count = sets.count.sum()
    divisor = count.clamp_min(1)
    weight = sets.count.unsqueeze(-1)
    mean = (weight / divisor * sets.mean).sum(0)
    distance = sets.mean - mean
    m2 = sets.m2.sum(0) + (weight * distance * distance).sum(0)  # n·δ first: zero stays zero
    return Moments(count, mean, m2)


def merge_by_sums(own: Moments, add: Callable[[Tensor], Tensor]) -> Moments:
    """The same of one set per rank, of which nobody sees the others': count (), mean and M2 (C,).

    add: the sum over ranks of their tensors (*,), called twice. The first sum's mean is rounded by
    as many additions as there are ranks; of the distances to it, which are small, the second finds
    what it lacks.
    """
    sums = add(torch.cat((own.count.unsqueeze(0), own.count * own.mean)))
    count, divisor = sums[0], sums[0].clamp_min(1)
    near = sums[1:] / divisor
    distance = own.mean - near
    weighted = own.count * distance  # n·δ first: zero stays zero
    lacking, m2 = add(torch.stack((weighted, torch.addcmul(own.m2, weighted, distance))))
    rest = (lacking / divisor).nan_to_num(0.0, 0.0, 0.0)  # an infinite mean lacks nothing
    return Moments(count, near + rest, m2)


class Merged:
    """The union of sets that come one after the other: packed (1 + 2C,); None without any."""

    def __init__(self) -> None:
        self.packed: Tensor | None = None
        self._adding = threading.Lock()  # of replicas, which are threads

    def add(self, packed: Tensor) -> None:
        with self._adding:
            if self.packed is not None:
                both = torch.stack((self.packed, packed.to(self.packed.device)))
                packed = merge(unpack(both)).pack()
            self.packed = packed


def inverse_deviation(moments: Moments, eps: float) -> Tensor:
    """(M2 / n + eps)^(−1/2) per channel (C,), of one set.

    NaN where M2 is infinite: values whose squares are past what it can hold have a deviation, which
    nobody knows; 1/∞ would make the output a plausible ``bias``.
    """
    variance = moments.m2 / moments.count.clamp_min(1)
    return (variance + eps).nan_to_num(torch.nan, torch.nan).rsqrt()


def stacked(tensors: Sequence[Tensor]) -> Tensor:
    """(k, *): tensors of one shape, on the device of the first."""
    return torch.stack([tensor.to(tensors[0].device) for tensor in tensors])
