"""How per-channel numbers become those of all ranks, in one collective each way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..comm import Communicator
from ..kernels import Running, SampleKernels, composite
from ..numerics.moments import merge, stacked, unpack, wide_dtype
from ..tensors.layout import samplewise_contiguous
from ..tensors.storages import held_in_graph
from .records import Normalised, Part


class Gathered(NamedTuple):
    """sets: packed moments (k, 1 + 2C); wanting: (W,), which ranks want a gradient."""

    sets: Tensor
    wanting: Tensor


class Sums(NamedTuple):
    """(Σdy, Σdy·x̂) per channel (2, C): each local part's, and those of all ranks together."""

    parts: Sequence[Tensor]
    total: Tensor


class Exchange:
    """A rank sends the moments and the sums of its whole share of the batch.

    Its share is one local part or several, each on a device of its own, with the kernels that serve
    it. The result is right to rounding, and the same bits on every rank.
    """

    reproducible = False

    def __init__(self, comm: Communicator) -> None:
        self.comm = comm

    def gather(self, parts: Sequence[Part], wants_gradient: bool, running: Running) -> Gathered:
        """What all ranks measured. parts: this rank's; running: what is to move afterwards."""
        # One number before the payload: whether this rank wants a gradient.
        if torch.compiler.is_compiling():
            header = _header_in_graph(parts[0], wants_gradient, running)
            sent = torch.cat((header, self._measure(parts)))
        else:
            sent = pad(self._measure(parts), (1, 0), value=float(wants_gradient))
        received = self.comm.all_gather(sent)
        return Gathered(self._merged(parts, received[:, 1:]), received[:, 0])

    def reduce(self, parts: Sequence[Normalised], dys: Sequence[Tensor]) -> Sums:
        """The sums of all ranks. dys (N, C, *): the gradients of this rank's parts."""
        sums = [
            part.kernels.steps.gradient_sums(dy, part.x, part.statistics)
            for part, dy in zip(parts, dys, strict=True)
        ]
        own = sums[0] if len(sums) == 1 else stacked(sums).sum(0)
        return Sums(sums, self.comm.all_reduce(own))

    def _measure(self, parts: Sequence[Part]) -> Tensor:
        """What this rank has to tell of its parts: a tensor of one dimension."""
        packed = [part.kernels.steps.measure(part.x) for part in parts]
        return packed[0] if len(packed) == 1 else merge(unpack(stacked(packed))).pack()

    def _merged(self, parts: Sequence[Part], received: Tensor) -> Tensor:
        """Packed moments (k, 1 + 2C) of what all ranks told (W, *)."""
        return received


def _header_in_graph(part: Part, wants_gradient: bool, running: Running) -> Tensor:
    """The header, before which all is seen to be held that is read after the message."""
    x, (weight, bias) = part.x, part.affine
    header = x.new_full((1,), float(wants_gradient), dtype=wide_dtype(x.device))
    read = {"input": x, "weight": weight, "bias": bias}
    moved = {"running_mean": running.mean, "running_var": running.var}
    return held_in_graph({"header": header}, read | moved)[0]


class ReproducibleExchange(Exchange):
    """A rank sends what makes the result a function of the samples, however they are split.

    Each sample of the one local part is measured by itself, and :mod:`syncbn.numerics.reproducible`
    adds the samples up. lengths: see :class:`~syncbn.step.records.Call`.
    """

    reproducible = True

    def __init__(self, comm: Communicator, lengths: Tensor | None) -> None:
        super().__init__(comm)
        self.lengths = lengths

    def reduce(self, parts: Sequence[Normalised], dys: Sequence[Tensor]) -> Sums:
        (part,), dy, samples = parts, samplewise_contiguous(dys[0]), _samples(parts)
        sent = samples.gradient_sums_samples(dy, part.x, part.statistics, self.lengths)
        own = samples.total_samples(sent.unsqueeze(0))
        return Sums((own,), samples.total_samples(self.comm.all_gather(sent)))

    def _measure(self, parts: Sequence[Part]) -> Tensor:
        (part,) = parts
        return _samples(parts).measure_samples(part.x, self.lengths)

    def _merged(self, parts: Sequence[Part], received: Tensor) -> Tensor:
        return _samples(parts).merge_samples(received)


def _samples(parts: Sequence[Part | Normalised]) -> SampleKernels:
    """Those of the one part's kernels, or of the specification, which has them for all tensors."""
    return parts[0].kernels.samples or composite
