"""From the messages of all ranks to the figures of each layer: pure mathematics, no waiting.

Per channel, with nᵣ, mᵣ and vᵣ = M2ᵣ/nᵣ of rank r and n, m and v of all ranks' values together
(merged by Chan, Golub & LeVeque 1979, see :mod:`syncbn.numerics.moments`), all of them free of the
input's scale and unit:

- the distance of rank r's mean is |mᵣ − m| / √v, that of its variance |vᵣ/v − 1|;
- the noise of the mean of one batch is its standard error relative to √v. Values of one sample are
  not independent, so 1/√nᵣ would be far too small. Let the batches' halves on all ranks be p parts
  of nⱼ values with means mⱼ: T = Σ nⱼ·(mⱼ − m)² / (p − 1), the mean square between parts, is v for
  independent values, and deff = T/v is Kish's design effect (L. Kish, "Survey Sampling", 1965,
  chapter 5: a mean of clusters of s values has variance deff·v/n, deff = 1 + (s − 1)·ρ, ρ the
  correlation within a cluster). So a batch is worth nᵣ/deff independent values, and the noise is
  (nᵣ/deff)^(−1/2). It is worth no less than its samples and no more than its values.

A layer's figures are root mean squares over its live channels: those whose moments are finite on
all ranks and whose deviation is more than a millionth of their mean, which is float32's rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...numerics.moments import wide_dtype
from .measuring import HEAD, PARTS

_ROUNDING = 1e-12  # of a variance, relative to the squared mean


class Figures(NamedTuple):
    """What was observed of L layers on W ranks in one step, in rows of :data:`OVERALL`.

    overall: (7, L). ranks: (2, W, L), distances of each rank's mean and variance; nan where it had
    no values.
    """

    overall: Tensor
    ranks: Tensor


# Root mean square distances over ranks; noise of one batch's mean; how many independent values a
# batch is worth; channels whose variance is below eps; channels that were not finite on some rank;
# ranks on which the layer got no values.
OVERALL = (
    "mean_distance",
    "var_distance",
    "noise",
    "effective_size",
    "dead",
    "nonfinite",
    "skipped",
)


class Places(NamedTuple):
    """Where things are: of each layer's count (L,), of each channel's mean and M2 (ΣC,) in packed
    moments of all layers; each channel's layer and its eps (ΣC,).
    """

    counts: Tensor
    mean: Tensor
    m2: Tensor
    layer: Tensor
    eps: Tensor


class Layout:
    """How the layers' channels lie in a message."""

    def __init__(self, channels: Sequence[int], eps: Sequence[float]) -> None:
        self.channels, self._eps = list(channels), list(eps)
        self._kept: dict[torch.device, Places] = {}

    def on(self, device: torch.device) -> Places:
        if device not in self._kept:
            sizes = torch.tensor(self.channels, device="cpu")
            layer = torch.arange(len(sizes), device="cpu").repeat_interleave(sizes)
            begin = torch.cat((sizes.new_zeros(1), (1 + 2 * sizes).cumsum(0)[:-1]))
            within = torch.cat([torch.arange(size, device="cpu") for size in self.channels])
            mean = begin[layer] + 1 + within
            eps = torch.tensor(self._eps, dtype=torch.float64, device="cpu")[layer]
            wide = eps.to(wide_dtype(device))
            places = begin, mean, mean + sizes[layer], layer, wide
            self._kept[device] = Places(*(each.to(device) for each in places))
        return self._kept[device]

    def per_layer(self, values: Tensor) -> Tensor:
        """Sums (k, L) of values (k, ΣC) over each layer's channels, in a fixed order."""
        return torch.stack([part.sum(-1) for part in torch.split(values, self.channels, -1)], -1)


def figures_of(rows: Tensor, layout: Layout) -> Figures:
    """The figures of all ranks' messages (W, n)."""
    ranks, layers = len(rows), len(layout.channels)
    places = layout.on(rows.device)
    samples, calls = rows[:, : HEAD * layers].view(ranks, HEAD, layers).unbind(1)
    parts = rows[:, HEAD * layers :].view(ranks, PARTS, -1)
    count = parts[..., places.counts]
    halves = Sets(count[..., places.layer], parts[..., places.mean], parts[..., places.m2])
    own, between = united(halves, 1)  # of each rank
    whole, among = united(own, 0)  # of all
    variance = whole.m2 / whole.count.clamp_min(1)
    square = (own.mean - whole.mean).square()
    finite = (own.mean.isfinite() & own.m2.isfinite()).all(0)
    live = finite & variance.isfinite() & (variance > _ROUNDING * whole.mean.square())
    have, had = count.sum(1) > 0, own.count > 0
    freedom = (count > 0).sum((0, 1)) - 1
    mean_square = (between.sum(0) + among) / freedom.clamp_min(1)[places.layer]
    apart = (own.m2 / own.count.clamp_min(1) / variance - 1).square()
    kept = torch.cat((square / variance, apart, (mean_square / variance).unsqueeze(0)))
    any_had = had.any(0)
    kept = torch.where(live & torch.cat((had, had, any_had.unsqueeze(0))), kept, 0)
    dead = finite & (variance < places.eps) & any_had
    marks = torch.stack((live & any_had, dead, ~finite)).to(kept)
    sums = layout.per_layer(torch.cat((kept, marks)))
    mean_squares = sums[: 2 * ranks + 1] / sums[-3]  # nan where no channel is live
    distances = mean_squares[:-1].view(2, ranks, layers)
    overall = torch.where(have, distances, 0).sum(1) / have.sum(0)  # nan without any
    effective = _effective_size(count.sum((0, 1)), samples, calls, mean_squares[-1], freedom)
    counts = (*sums[-2:], (~have).sum(0).to(sums))
    return Figures(
        torch.stack((*overall.sqrt(), effective.rsqrt(), effective, *counts)),
        torch.where(have, distances, torch.nan).sqrt(),
    )


class Sets(NamedTuple):
    """Moments of several sets, whose counts differ from channel to channel: (…, ΣC) each."""

    count: Tensor  # type: ignore[assignment]  # it hides tuple.count
    mean: Tensor
    m2: Tensor


def united(sets: Sets, dim: int) -> tuple[Sets, Tensor]:
    """The union of the sets along a dimension, and the part of its M2 that is between them."""
    count = sets.count.sum(dim)
    mean = (sets.count * sets.mean).sum(dim) / count.clamp_min(1)
    distance = sets.mean - mean.unsqueeze(dim)
    between = (sets.count * distance * distance).sum(dim)
    return Sets(count, mean, sets.m2.sum(dim) + between), between


def _effective_size(
    count: Tensor, samples: Tensor, calls: Tensor, effect: Tensor, freedom: Tensor
) -> Tensor:
    """How many independent values one batch is worth (L,); nan where there was none.

    Where there is a single part nobody knows how samples differ: then as many as samples.
    """
    batches = calls.sum(0)
    values, least = count / batches, samples.sum(0) / batches
    least = torch.minimum(least, values)
    effective = torch.where(freedom > 0, values / effect, least)
    return torch.minimum(torch.maximum(effective, least), values)
