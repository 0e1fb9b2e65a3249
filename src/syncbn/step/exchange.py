"""How per-channel numbers become those of all ranks, in one collective each way.

Many ranks (comm/sums.py) take two in forward, sums, however little each has to tell.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from torch import Tensor

from ..comm import WANTS, Begun, Communicator, Received, are_many
from ..kernels import Running, SampleKernels, composite
from ..numerics.moments import merge, merge_by_sums, stacked, unpack
from ..numerics.reproducible import union_by_sums, union_of_moments
from ..tensors.graphs import after
from ..tensors.layout import samplewise_contiguous
from ..tensors.storages import held_in_graph
from .accumulation import Accumulator
from .records import Normalised, Part
from .speaker import Speaker, towards


class Gathered(NamedTuple):
    """sets: packed moments (k, 1 + 2C); flags: see :class:`~syncbn.comm.Received`."""

    sets: Tensor
    flags: Sequence[int] | Tensor

    def is_gradient_wanted(self) -> bool:
        """By any rank; on a device, which nobody waits for, yes."""
        if isinstance(self.flags, Tensor):
            return not self.flags.is_cpu or bool(self.flags.any())
        return any(flag & WANTS for flag in self.flags)


def tell_moments(speaker: Speaker, own: Tensor, flags: int, begun: Begun | None = None) -> Received:
    """Packed moments of all ranks, each a row, from a rank's own (1 + 2C,); of many ranks one row.

    begun: see :meth:`Speaker.tell`; many ranks have begun nothing.
    """
    if not are_many(speaker.size):
        return speaker.tell(own, flags, begun)
    return _tell_many(lambda add: merge_by_sums(unpack(own), add).pack(), speaker, flags)


def _tell_many(
    union: Callable[[Callable[[Tensor], Tensor]], Tensor], speaker: Speaker, flags: int
) -> Received:
    """What ``union`` makes of sums over ranks, with the first of which each says what it does."""
    said: list[Sequence[int] | Tensor] = []

    def add(tensor: Tensor) -> Tensor:
        if said:
            return speaker.all_reduce(tensor)
        total, flags_of_all = speaker.add(tensor, flags)
        said.append(flags_of_all)
        return total

    return Received(union(add).unsqueeze(0), said[0])


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

    def __init__(self, comm: Communicator, accumulator: Accumulator | None = None) -> None:
        self.comm, self.accumulator = comm, accumulator

    def gather(
        self, parts: Sequence[Part], flags: int, running: Running, compiling: bool
    ) -> Gathered:
        """What all ranks measured. parts: this rank's; flags: what it says beside them;
        running: what is to move afterwards.
        """
        comm, own = self.comm, self._measure(parts)
        if compiling:
            own = _held_in_graph(own, parts[0], running)
        if not isinstance(comm, Speaker):
            gathered = Gathered(self._merged(parts, own.unsqueeze(0)), (flags,))
        else:
            rows, said = self._tell(comm, own, flags)
            gathered = Gathered(self._merged(parts, rows), said)
        if self.accumulator is not None:
            self.accumulator.hear(gathered.sets)
        return gathered

    def reduce(self, parts: Sequence[Normalised], dys: Sequence[Tensor], compiling: bool) -> Sums:
        """The sums of all ranks. dys (N, C, *): the gradients of this rank's parts."""
        sums = [
            part.kernels.steps.gradient_sums(dy, part.x, part.statistics)
            for part, dy in zip(parts, dys, strict=True)
        ]
        own = sums[0] if len(sums) == 1 else stacked(sums).sum(0)
        total = towards("backward", self.comm, compiling).all_reduce(own)
        return Sums(after(total, sums) if compiling else sums, total)

    def _measure(self, parts: Sequence[Part]) -> Tensor:
        """What this rank has to tell of its parts: a tensor of one dimension."""
        packed = [part.measure() for part in parts]
        return packed[0] if len(packed) == 1 else merge(unpack(stacked(packed))).pack()

    def _tell(self, speaker: Speaker, own: Tensor, flags: int) -> Received:
        """What all ranks have to tell: a row of each, or one of many together."""
        return tell_moments(speaker, own, flags)

    def _merged(self, parts: Sequence[Part], received: Tensor) -> Tensor:
        """Packed moments (k, 1 + 2C) of what all ranks told (W, *)."""
        return received


def _held_in_graph(own: Tensor, part: Part, running: Running) -> Tensor:
    """What a rank is about to send, once all is seen to be held that is read after the message."""
    x, (weight, bias) = part.x, part.affine
    read = {"input": x, "weight": weight, "bias": bias}
    moved = {"running_mean": running.mean, "running_var": running.var}
    return held_in_graph({"moments": own}, read | moved)[0]


class ReproducibleExchange(Exchange):
    """A rank sends what makes the result a function of the samples, however they are split.

    Each sample of the one local part is measured by itself, and :mod:`syncbn.numerics.reproducible`
    adds the samples up. lengths: see :class:`~syncbn.step.records.Call`.
    """

    reproducible = True

    def __init__(
        self, comm: Communicator, lengths: Tensor | None, accumulator: Accumulator | None = None
    ) -> None:
        super().__init__(comm, accumulator)
        self.lengths = lengths

    def reduce(self, parts: Sequence[Normalised], dys: Sequence[Tensor], compiling: bool) -> Sums:
        (part,), dy, samples = parts, samplewise_contiguous(dys[0]), _samples(parts)
        sent = samples.gradient_sums_samples(dy, part.x, part.statistics, self.lengths)
        own = samples.total_samples(sent.unsqueeze(0))
        comm = towards("backward", self.comm, compiling)
        if are_many(comm.size):
            received = union_by_sums(sent, comm.all_reduce).unsqueeze(0)
        else:
            received = comm.all_gather(sent)
        total = samples.total_samples(received)
        return Sums(after(total, (own,)) if compiling else (own,), total)

    def _measure(self, parts: Sequence[Part]) -> Tensor:
        (part,) = parts
        return _samples(parts).measure_samples(part.x, self.lengths)

    def _tell(self, speaker: Speaker, own: Tensor, flags: int) -> Received:
        if not are_many(speaker.size):
            return speaker.tell(own, flags)
        return _tell_many(lambda add: union_of_moments(own, add), speaker, flags)

    def _merged(self, parts: Sequence[Part], received: Tensor) -> Tensor:
        return _samples(parts).merge_samples(received)


def _samples(parts: Sequence[Part | Normalised]) -> SampleKernels:
    """Those of the one part's kernels, or of the specification, which has them for all tensors."""
    return parts[0].kernels.samples or composite
