"""How per-channel numbers become those of all ranks, in one collective each way."""

from __future__ import annotations

from torch import Tensor

from ..comm import Communicator
from ..kernels import Kernels
from ..tensors.layout import samples_apart


class Share:
    """A rank sends the moments and the sums of its whole share of the batch.

    The result is right to rounding, and the same bits on every rank.
    """

    reproducible = False

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

    Each sample is measured by itself, and :mod:`syncbn.numerics.reproducible` adds the samples up.
    lengths: (N,) where dimension 0 of x is no longer samples but their values (after a mask): how
    many belong to each sample.
    """

    reproducible = True

    def __init__(self, comm: Communicator, kernels: Kernels, lengths: Tensor | None = None) -> None:
        super().__init__(comm, kernels)
        self.lengths = lengths

    def moments(self, x: Tensor) -> Tensor:
        return self.kernels.measure_samples(x, self.lengths)

    def merge_moments(self, gathered: Tensor) -> Tensor:
        return self.kernels.merge_samples(gathered)

    def gradient_sums(
        self, dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor
    ) -> tuple[Tensor, Tensor]:
        mine = self.kernels.gradient_sums_samples(samples_apart(dy), x, mean, invstd, self.lengths)
        local = self.kernels.total_samples(mine.unsqueeze(0))
        return local, self.kernels.total_samples(self.comm.all_gather(mine))


def parameter_gradients(
    sums: Tensor, weight: Tensor | None, bias: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """(dweight, dbias), each of its parameter's dtype and in memory of its own; None for None.

    sums: (Σdy, Σdy·x̂) per channel (2, C) of a rank's own samples.
    """
    dbias, dweight = (
        None if parameter is None else row.to(parameter.dtype, copy=True)
        for row, parameter in zip(sums, (bias, weight), strict=True)
    )
    return dweight, dbias
