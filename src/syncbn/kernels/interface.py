"""What a kernel takes, gives and owes: the four steps, and two kinds of kernel that it may have.

A kernel knows nothing of ranks: it sees one tensor, and packed moments of some sets of values. Its
functions live in a module; :mod:`syncbn.kernels.composite` is the specification of all of them.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ..tensors.prefix import NO_PREFIX, Prefix

FLOATING = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
COUNTING = FLOATING | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}


class Affine(NamedTuple):
    """The parameters of a layer, (C,) each, or None."""

    weight: Tensor | None = None
    bias: Tensor | None = None


class Running(NamedTuple):
    """What a batch in training moves, in place: (C,), (C,) and (), each or None.

    momentum: the weight of the new batch; None for 1 / batches, the cumulative average.
    """

    mean: Tensor | None = None
    var: Tensor | None = None
    batches: Tensor | None = None
    momentum: float | None = 0.1


NO_AFFINE, NO_RUNNING = Affine(), Running()


class Statistics(NamedTuple):
    """Of all sets together: mean and invstd = (M2/count + eps)^(−1/2), (C,) each, and count ()."""

    mean: Tensor
    invstd: Tensor
    count: Tensor  # type: ignore[assignment]  # it hides tuple.count


class Kernels(Protocol):
    """The four steps of one layer's training step, on one device."""

    NAME: str
    DEVICES: tuple[str, ...]  # the types of those for which it is made

    def supports(self, x: Tensor) -> bool:
        """Whether it takes a tensor of x's kind; whether it is installed is another question."""

    def unavailable(self) -> str | None:
        """Why it cannot be used here, in words; None where it can. The first call may load it."""

    def describe(self) -> str:
        """How it runs here, in a word or two; asked where it is available."""

    def measure(self, x: Tensor) -> Tensor:
        """(count, mean, M2) of x (N, C, *), packed: (1 + 2C,)."""

    def normalise(
        self,
        x: Tensor,
        sets: Tensor,
        *,
        affine: Affine = NO_AFFINE,
        running: Running = NO_RUNNING,
        eps: float,
    ) -> tuple[Tensor, Statistics]:
        """y = (x − mean)·invstd·weight + bias like x, with the moments of all sets (k, 1 + 2C)."""

    def gradient_sums(self, dy: Tensor, x: Tensor, statistics: Statistics) -> Tensor:
        """(Σdy, Σdy·x̂) per channel, (2, C), where x̂ = (x − mean)·invstd."""

    def input_gradient(
        self, dy: Tensor, x: Tensor, *, weight: Tensor | None, statistics: Statistics, sums: Tensor
    ) -> Tensor:
        """dx = weight·invstd·(dy − Σdy/count − x̂·Σ(dy·x̂)/count), like x."""


class SampleKernels(Protocol):
    """measure and gradient_sums, and how they add up, where no split of the batch may show.

    Where a kernel has none, composite's serve. Methods: :mod:`syncbn.numerics.reproducible`.
    """

    def measure_samples(self, x: Tensor, lengths: Tensor | None) -> Tensor:
        """The representation (1 + 12C,) of x's moments, each sample measured by itself."""

    def merge_samples(self, received: Tensor) -> Tensor:
        """Packed moments (1, 1 + 2C) of what W ranks' measure_samples gave (W, 1 + 12C)."""

    def gradient_sums_samples(
        self, dy: Tensor, x: Tensor, statistics: Statistics, lengths: Tensor | None
    ) -> Tensor:
        """The representation (6, 2C) of the gradient sums, each sample's summed by itself."""

    def total_samples(self, received: Tensor) -> Tensor:
        """(Σdy, Σdy·x̂) per channel (2, C) of W ranks' gradient_sums_samples (W, 6, 2C)."""


class Fused(Protocol):
    """All steps of one process alone in two operators, and fewer operators over ranks. Optional."""

    def supports_others(self, affine: Affine, running: Running) -> bool:
        """Whether it takes these beside a tensor that it supports: by where they are."""

    def batch_norm(
        self, x: Tensor, *, affine: Affine, running: Running, eps: float
    ) -> tuple[Tensor, Tensor]:
        """measure and normalise in one, for one set: y, and saved (2, C): mean and invstd."""

    def batch_norm_backward(
        self, dy: Tensor, x: Tensor, *, affine: Affine, saved: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """gradient_sums and input_gradient in one: dx, dweight, dbias, of their owners' dtypes.

        Of the bias only the dtype counts.
        """

    def measure_checked(
        self, x: Tensor, *, affine: Affine, running: Running, prefix: Prefix = NO_PREFIX
    ) -> Tensor:
        """measure, once all is seen to be fit for normalise: a message (prefix.room + 1 + 2C,)."""

    def gradient_sums_checked(
        self,
        dy: Tensor,
        x: Tensor,
        *,
        affine: Affine,
        statistics: Statistics,
        prefix: Prefix = NO_PREFIX,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """gradient_sums, once all is seen to be fit for input_gradient: a message
        (prefix.room + 2C,), or (2, C) without prefix; and dweight, dbias as above, of x's own sums.
        """


class Implementation(NamedTuple):
    """One way to do the arithmetic, in the order in which selection asks."""

    steps: Kernels
    missed: str  # what a warning says where it would serve, but is unavailable
    samples: SampleKernels | None = None
    fused: Fused | None = None
