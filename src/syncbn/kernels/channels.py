"""Per-channel arithmetic on one tensor, of which composite.py makes the steps."""

from __future__ import annotations

import torch
from torch import Tensor

from ..numerics.moments import Moments
from ..tensors.graphs import computed_once
from ..tensors.storages import is_dtensor


def arithmetic(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def reduced(x: Tensor) -> tuple[int, ...]:
    return (0, *range(2, x.dim()))


def sum_per_channel(values: Tensor, wide: torch.dtype) -> Tensor:
    """Sum per channel: pairwise in float32 along memory, wide over what is left.

    torch adds pairwise along runs in memory, but one by one over samples and in unusual layouts.
    """
    usual = values.is_contiguous() or (values.dim() > 3 and values.movedim(1, -1).is_contiguous())
    if values.dim() == 2 or not usual:
        return values.sum(reduced(values), dtype=wide)
    return values.sum(reduced(values)[1:]).sum(0, dtype=wide)


def coefficients(x: Tensor, *values: Tensor) -> list[Tensor]:
    """What arithmetic on x takes of each channel, computed once for all of its values."""
    return list(computed_once(*(per_channel(each, x) for each in values)))


def per_channel(values: Tensor, x: Tensor) -> Tensor:
    """(C,) in the dtype of the arithmetic on x and shaped to broadcast against x."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return values.to(dtype).view(1, -1, *(1,) * (x.dim() - 2))


def measure_in_one_pass(x: Tensor, wide: torch.dtype) -> Tensor:
    """composite.measure() of x; torch.compile makes one loop over x of it, as of torch's own layer.

    The shift is the first value of each channel. Where that is far from all n others, they lose up
    to half a unit in its last place: √n·6e-8 deviations, of which it is most. Sums of squares would
    lose n·6e-8; hence torch.var_mean, which is slow where nothing is compiled.
    """
    values = arithmetic(x)
    shift = values.detach()[0]
    while shift.dim() > 1:
        shift = shift[:, 0]
    shift = shift.nan_to_num(0, 0, 0)
    centred = values - per_channel(shift, x)
    variance, delta = torch.var_mean(centred, reduced(x), correction=0)
    count = x.new_full((), x.numel() // x.shape[1], dtype=wide)
    m2 = variance.to(wide) * count
    return Moments(count, shift.to(wide) + delta.to(wide), m2).pack()


def has_a_value(x: Tensor) -> bool:
    """Whether a graph knows that x, whose sizes may be symbols, has one, and has it here."""
    from torch.fx.experimental.symbolic_shapes import guard_or_false  # imports sympy

    return not is_dtensor(x) and guard_or_false(x.numel() > 0)
