"""What travels together through one training step of one layer. Affine and Running: kernels."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch.nn as nn
from torch import Tensor

from ..comm import Communicator
from ..kernels import Affine, Implementation, Running, Statistics, composite, select_kernels
from .accumulation import Accumulator
from .mode import Mode


class Options(NamedTuple):
    """What a layer is told, beside its tensors. layer: itself, where there is one."""

    training: bool
    eps: float
    group: Any = None
    reproducible: bool = False
    layer: nn.Module | None = None


class Call(NamedTuple):
    """One call of a layer, as the paths of dispatch.py take it.

    lengths: (N,) where dimension 0 of input is no longer samples but their values that a mask left:
    how many belong to each sample. mask: (N, *) where all positions are there, but only those where
    it is True count; the others are zero. accumulator: what is to hear the moments, if they wait.
    """

    input: Tensor
    affine: Affine
    running: Running
    options: Options
    mode: Mode
    comm: Communicator
    lengths: Tensor | None = None
    mask: Tensor | None = None
    accumulator: Accumulator | None = None


class Part(NamedTuple):
    """A local part of a batch: x (N, C, *), the parameters on its device, and what serves it.

    A process has one, or one for each replica of a DataParallel. mask: as in a call.
    """

    kernels: Implementation
    x: Tensor
    affine: Affine
    mask: Tensor | None = None

    def measure(self) -> Tensor:
        """Packed moments (1 + 2C,) of what counts."""
        if self.mask is None:
            return self.kernels.steps.measure(self.x)
        return composite.measure(self.x, self.mask)


class Normalised(NamedTuple):
    """What backward needs of a part; statistics: those of all parts of all ranks."""

    kernels: Implementation
    x: Tensor
    weight: Tensor | None
    statistics: Statistics


def part_of(x: Tensor, affine: Affine, mask: Tensor | None) -> Part:
    return Part(select_kernels(x), x, affine, mask)
