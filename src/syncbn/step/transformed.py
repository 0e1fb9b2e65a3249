"""Training within transforms of torch.func and forward mode, over ranks: the steps in the open.

A transform takes torch's operators only, and differentiates them in any order, mode and nesting.
So the composite kernels are called here as they are, with collectives that have derivatives.
torch's own batch norm would not do: in 2.13 the mixed second derivatives that torch.func.hessian,
jacrev of jacrev and the gradient of a jvp find for it are wrong.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..comm import LOCAL, Communicator, Replica, Threads, refuse_join, resolve
from ..kernels import composite
from ..tensors.storages import is_dtensor
from ..tensors.transforms import (
    any_element_is_one,
    check_forward_mode,
    check_not_recording,
    check_not_transforming,
)
from .checks import check_options, refuse_single_value
from .collectives import gather
from .differentiable import tie
from .masks import blank, check_mask


def transformed(
    input: Tensor,
    mask: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | None,
    eps: float,
    group: Any,
) -> Tensor:
    """Batch normalisation of ``input`` (N, C, *) with the statistics of all ranks.

    Zero where the mask (N, *) is False. The tensors have been checked, but for the mask.
    """
    check_options(0.0 if momentum is None else momentum, eps)
    if mask is not None:
        check_mask(mask, input)
    silent = input.is_meta or torch.compiler.is_exporting()
    comm = LOCAL if silent else resolve(group)
    check_forward_mode(isinstance(comm, Threads) and comm.size > 1, is_dtensor(input))
    if isinstance(comm, Replica):
        check_not_transforming()
    if comm.size > 1:
        refuse_join()
        check_not_recording()
    rest = (weight, bias, running_mean, running_var, num_batches_tracked, momentum, eps)
    if mask is None:
        return _in_steps(input, mask, *rest, comm)
    return blank(_in_steps(blank(input, mask), mask, *rest, comm), mask)


def _in_steps(
    x: Tensor,
    mask: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    momentum: float | None,
    eps: float,
    comm: Communicator,
) -> Tensor:
    """x: zero where the mask is False."""
    packed = composite.measure(x, mask)
    sets = packed.unsqueeze(0) if comm.size == 1 else gather(packed + tie(weight, bias), comm)
    may_be_single = not x.is_meta and (mask is not None or x.numel() // x.shape[1] <= 1)
    if may_be_single and any_element_is_one(sets[:, 0].sum()):
        refuse_single_value(x.shape, comm.rank, comm.size)
    statistics = (running_mean, running_var, num_batches_tracked)
    return composite.normalise(x, sets, weight, bias, *statistics, momentum, eps)[0]
