"""What was observed so far."""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

import torch
from torch import Tensor

from .figures import OVERALL, Figures

_KEPT = 1000  # observed steps


class _Step(NamedTuple):
    number: int
    overall: Tensor  # (7, L), where it was computed: a device is not waited for


class Record:
    """The figures of the last observed steps, and how far each rank was from all in all of them."""

    def __init__(self) -> None:
        self._kept: deque[_Step] = deque(maxlen=_KEPT)
        self._totals: Tensor | None = None  # (2, 2, W, L): sums of squares, and of how many steps

    def add(self, step: int, figures: Figures) -> None:
        known = torch.stack((figures.ranks.square().nan_to_num(0), ~figures.ranks.isnan()))
        self._totals = known if self._totals is None else self._totals + known
        self._kept.append(_Step(step, figures.overall))

    @property
    def steps(self) -> list[int]:
        """The numbers of those that are kept, the latest last."""
        return [step.number for step in self._kept]

    def series(self) -> dict[str, Tensor]:
        """Of each of OVERALL, (steps, L) on the CPU."""
        all_of_them = torch.stack([step.overall for step in self._kept]).double().cpu()
        return dict(zip(OVERALL, all_of_them.unbind(1), strict=True))

    def latest(self) -> dict[str, list[float]]:
        """Of each of OVERALL, what it was in the last step: waits for a device."""
        return dict(zip(OVERALL, self._kept[-1].overall.tolist(), strict=True))

    def distances(self) -> Tensor:
        """(2, W, L) on the CPU: root mean square over steps of each rank's mean and variance."""
        assert self._totals is not None
        sums, steps = self._totals
        distances: Tensor = (sums / steps).sqrt().cpu()
        return distances


def rms(values: Tensor) -> float:
    """Root mean square of the values that are there; nan without any."""
    return values[~values.isnan()].square().mean().sqrt().item()


def effective_size_of(noise: Tensor) -> float:
    """How many independent values batches of this noise are worth."""
    return float(rms(noise) ** -2)
