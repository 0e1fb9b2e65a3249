"""How per-channel numbers become those of all ranks, in one collective each way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from . import reproducible
from .comm import Communicator
from .kernels import Kernels


class Share:
    """A rank sends the moments and the sums of its whole share of the batch.

    The result is right to rounding, and the same bits on every rank.
    """

    def __init__(self, comm: Communicator, kernels: Kernels) -> None:
        self.comm = comm
        self.kernels = kernels

    def moments(self, x: Tensor) -> Tensor:
        """What this rank has to tell of x (N, C, *): a tensor of one dimension."""
        return self.kernels.measure(x)

    def merge_moments(self, gathered: Tensor) -> Tensor:
        """Packed moments (k, 1 + 2C) of what all ranks told (W, *)."""
        return gathered

    def gradient_sums(
        self, dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor
    ) -> tuple[Tensor, Tensor]:
        """(Σdy, Σdy·x̂) per channel (2, C): this rank's, and all ranks' together."""
        local = self.kernels.gradient_sums(dy, x, mean, invstd)
        return local, self.comm.all_reduce(local)


class ReproducibleShare(Share):
    """A rank sends what makes the result a function of the samples, however they are split.

    Each sample is measured by itself, and :mod:`syncbn.reproducible` adds the samples up.
    lengths: (N,) where dimension 0 of x is no longer samples but their values (after a mask): how
    many belong to each sample.
    """

    def __init__(self, comm: Communicator, kernels: Kernels, lengths: Tensor | None = None) -> None:
        super().__init__(comm, kernels)
        self._lengths = 1 if lengths is None else lengths.tolist()

    def moments(self, x: Tensor) -> Tensor:
        packed = [self.kernels.measure(sample) for sample in self._samples(x)]
        return reproducible.represent_moments(_stack(packed, 1 + 2 * x.shape[1], x))

    def merge_moments(self, gathered: Tensor) -> Tensor:
        return reproducible.merge_moments(gathered).unsqueeze(0)

    def gradient_sums(
        self, dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor
    ) -> tuple[Tensor, Tensor]:
        pairs = zip(self._samples(dy), self._samples(x), strict=True)
        sums = [self.kernels.gradient_sums(*pair, mean, invstd).flatten() for pair in pairs]
        mine = reproducible.represent(_stack(sums, 2 * x.shape[1], x))
        shape = (2, x.shape[1])
        local, _ = reproducible.total(mine.unsqueeze(0))
        total, _ = reproducible.total(self.comm.all_gather(mine))
        return local.view(shape), total.view(shape)

    def _samples(self, x: Tensor) -> Sequence[Tensor]:
        samples: Sequence[Tensor] = x.split(self._lengths) if len(x) else ()  # type: ignore[no-untyped-call]
        return samples


def _stack(rows: Sequence[Tensor], width: int, x: Tensor) -> Tensor:
    """Rows (N, width), also where N is 0."""
    return torch.stack(list(rows)) if rows else x.new_zeros(0, width, dtype=torch.float64)
