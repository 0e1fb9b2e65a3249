"""Between two moves of a layer's running statistics: the moments of its batches, merged."""

from __future__ import annotations

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch

from ..comm import Communicator, Replica
from ..kernels import Running, select_kernels
from ..numerics.moments import Merged, merge, unpack
from ..tensors.storages import is_dtensor
from .mode import Mode


class Accumulator(Merged):
    """What a layer's calls in training have measured since its running statistics moved.

    mean, var: the running statistics that wait. skipped: what counts the calls that are left out,
    where some may be. kept: how many others there are then, else None.
    """

    def __init__(self, mean: Tensor, var: Tensor, skipped: Tensor | None) -> None:
        super().__init__()
        self.mean, self._var, self._skipped = mean, var, skipped
        self.kept = None if skipped is None else torch.zeros_like(skipped)
        self._heard: list[Tensor] = []  # of the call that runs

    def hear(self, sets: Tensor) -> None:
        """Take the packed moments (k, 1 + 2C) of all that a call normalises together."""
        self._heard = [sets.detach()]

    def measure(self, x: Tensor) -> None:
        """The same of one process's input alone."""
        with torch.no_grad(), no_dispatch():  # see keep()
            x = x.detach()
            self.hear(select_kernels(x).steps.measure(x).unsqueeze(0))

    def keep(self) -> None:
        """Add what was heard: the call has succeeded. Of replicas, which are one call, the first.

        Where calls may be skipped, those are that are not finite as running statistics.
        A selective checkpoint counts operations, and its second forward has none of these.
        """
        with suppress(IndexError), torch.no_grad(), no_dispatch():
            packed = merge(unpack(self._heard.pop())).pack()
            if self._skipped is not None and self.kept is not None:
                finite = self._holds(packed)
                packed = torch.where(finite, packed, 0.0)
                self._skipped.add_(~finite)
                self.kept.add_(finite)
            self.add(packed)

    def _holds(self, packed: Tensor) -> Tensor:
        """Whether a batch's mean and unbiased variance are finite as what running ones are."""
        count, mean, m2 = unpack(packed)
        mean, var = mean.to(self.mean.dtype), (m2 / (count - 1).clamp_min(1)).to(self._var.dtype)
        return mean.isfinite().all() & var.isfinite().all()


def find_accumulator(
    layer: Any, running: Running, comm: Communicator, mode: Mode, input: Tensor
) -> Accumulator | None:
    """Where a call in training of a layer goes instead of into these running statistics, if so.

    Others than the layer's own (torch.func.functional_call's) move as ever.
    """
    found: Accumulator | None = None if layer is None else layer._accumulator
    if found is None or running.mean is None:
        return None
    if running.mean is not found.mean and not isinstance(comm, Replica):
        return None
    for refused, what in (
        (mode.compiling, "torch.compile's or torch.export's graph"),
        (mode.tracing, "torch.jit.trace"),
        (mode.transforming, "a transform of torch.func, or forward mode"),
        (is_dtensor(input), "a DTensor as input"),
    ):
        if refused:
            raise RuntimeError(
                f"accumulating: expected the layer's step as it is, got {what}; its running "
                "statistics cannot wait there: leave accumulating out, or the other"
            )
    return found
