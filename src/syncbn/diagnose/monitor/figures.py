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

from .measuring import HEAD, PER_CHANNEL

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


class Layout:
    """How the layers' channels lie in a message."""

    def __init__(self, channels: Sequence[int], eps: Sequence[float]) -> None:
        self.channels = list(channels)
        self._host = torch.tensor(eps, dtype=torch.float64, device="cpu")
        self._kept: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Of every channel, its layer's number and eps."""
        if device not in self._kept:
            sizes = torch.tensor(self.channels, device="cpu")
            numbers = torch.arange(len(sizes), device="cpu").repeat_interleave(sizes)
            eps = self._host[numbers]
            wide = eps.float() if device.type == "mps" else eps
            self._kept[device] = numbers.to(device), wide.to(device)
        return self._kept[device]

    def per_layer(self, values: Tensor) -> Tensor:
        """Sums (k, L) of values (k, ΣC) over each layer's channels, in a fixed order."""
        return torch.stack([part.sum(-1) for part in torch.split(values, self.channels, -1)], -1)


def figures_of(rows: Tensor, layout: Layout) -> Figures:
    """The figures of all ranks' messages (W, n)."""
    ranks, layers = len(rows), len(layout.channels)
    of_channel, eps = layout.on(rows.device)
    heads = rows[:, : HEAD * layers].view(ranks, HEAD, layers)
    mean, m2, between = rows[:, HEAD * layers :].view(ranks, PER_CHANNEL, -1).unbind(1)
    count, samples, calls, degrees = heads.unbind(1)
    have = count > 0
    n, had = count[:, of_channel], have[:, of_channel]
    total = n.sum(0).clamp_min(1)
    centre = (n / total * mean).sum(0)
    square = (mean - centre).square()
    among = (n * square).sum(0)
    variance = (m2.sum(0) + among) / total
    finite = (mean.isfinite() & m2.isfinite()).all(0)
    live = finite & variance.isfinite() & (variance > _ROUNDING * centre.square())
    freedom = degrees.sum(0) + have.sum(0) - 1
    effect = (between.sum(0) + among) / freedom.clamp_min(1)[of_channel] / variance
    apart = (m2 / n.clamp_min(1) / variance - 1).square()
    dead = finite & (variance < eps) & (n.sum(0) > 0)
    kept = torch.cat((square / variance, apart, effect.unsqueeze(0)))
    kept = torch.where(live & torch.cat((had, had, had.any(0, keepdim=True))), kept, 0)
    marks = torch.stack((live & had.any(0), dead, ~finite)).to(kept)
    sums = layout.per_layer(torch.cat((kept, marks)))
    alive, dead_channels, nonfinite = sums[-3:]
    mean_squares = sums[: 2 * ranks + 1] / alive  # nan where there are none
    distances = mean_squares[:-1].view(2, ranks, layers)
    overall = torch.where(have, distances, 0).sum(1) / have.sum(0)  # nan without any
    effective = _effective_size(count, samples, calls, mean_squares[-1], freedom)
    return Figures(
        torch.stack(
            (
                *overall.sqrt(),
                *(effective.rsqrt(), effective, dead_channels, nonfinite),
                (~have).sum(0).to(effective),
            )
        ),
        torch.where(have, distances, torch.nan).sqrt(),
    )


def _effective_size(
    count: Tensor, samples: Tensor, calls: Tensor, effect: Tensor, freedom: Tensor
) -> Tensor:
    """How many independent values one batch is worth (L,); nan where there was none.

    Where there is a single part nobody knows how samples differ: then as many as samples.
    """
    several = calls.sum(0)
    values, least = count.sum(0) / several, samples.sum(0) / several
    least = torch.minimum(least, values)
    effective = torch.where(freedom > 0, values / effect, least)
    return torch.minimum(torch.maximum(effective, least), values)
