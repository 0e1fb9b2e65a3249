"""Arithmetic on one device: four operators, and which implementation serves which device.

A kernel knows nothing of ranks: it sees one tensor, and packed moments of some sets of values.
To add one, write a module with the four functions of :class:`Kernels`, let :func:`serving` return
it where it is the better choice, and add it to the list in tests/test_kernels.py, which holds it
to the specification, :mod:`syncbn.kernels.composite`.
"""

from __future__ import annotations

from typing import Protocol, cast

import torch
from torch import Tensor

from . import composite


class Kernels(Protocol):
    """What a module of kernels provides; formulas and shapes stand in composite.py."""

    NAME: str

    def measure(self, x: Tensor) -> Tensor: ...

    def normalise(
        self,
        x: Tensor,
        sets: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...

    def gradient_sums(self, dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> Tensor: ...

    def input_gradient(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        sums: Tensor,
        count: Tensor,
    ) -> Tensor: ...


def serving(device: torch.device) -> Kernels:
    """The kernels that serve tensors on ``device``: plain torch operations, on every device."""
    return cast(Kernels, composite)
