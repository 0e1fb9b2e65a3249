"""Training within transforms of torch.func and forward mode, over ranks: the steps in the open.

A transform takes torch's operators only, and differentiates them in any order, mode and nesting.
So the composite kernels are called here as they are, with collectives that have derivatives.
torch's own batch norm would not do: in 2.13 the mixed second derivatives that torch.func.hessian,
jacrev of jacrev and the gradient of a jvp find for it are wrong.
"""

from __future__ import annotations

from torch import Tensor

from ..comm import Replica, Threads, refuse_join
from ..kernels import composite
from ..tensors.storages import is_dtensor
from ..tensors.transforms import (
    any_element_is_one,
    check_forward_mode,
    check_not_recording,
    check_not_transforming,
)
from .checks import check_options, refuse_single_value
from .collectives import merged
from .derivatives import graph_dependency
from .masked import zero_masked
from .records import Call
from .speaker import speaking


def normalise_transformed(call: Call, mask: Tensor | None) -> Tensor:
    """y of the call's input, zero where the mask (N, *) is False.

    All tensors have been checked.
    """
    momentum, comm = call.running.momentum, call.comm
    check_options(0.0 if momentum is None else momentum, call.options.eps)
    check_forward_mode(isinstance(comm, Threads) and comm.size > 1, is_dtensor(call.input))
    if isinstance(comm, Replica):
        check_not_transforming()
    if comm.size > 1:
        refuse_join()
        check_not_recording()
    if mask is None:
        return _in_steps(call, call.input, None)
    return zero_masked(_in_steps(call, zero_masked(call.input, mask), mask), mask)


def _in_steps(call: Call, x: Tensor, mask: Tensor | None) -> Tensor:
    """x: zero where the mask is False."""
    comm = call.comm
    packed = composite.measure(x, mask)
    if comm.size == 1:
        sets = packed.unsqueeze(0)
    else:
        speaker = speaking(
            *(comm, call.options.layer, x.shape[1], call.mode.compiling),
            direction="forward within a transform",
        )
        own = packed + graph_dependency(*call.affine)
        sets = merged(own, speaker).pack().unsqueeze(0)
    may_be_single = not x.is_meta and (mask is not None or x.numel() // x.shape[1] <= 1)
    if may_be_single and any_element_is_one(sets[:, 0].sum()):
        refuse_single_value([x.shape], comm.rank, comm.size)
    return composite.normalise(
        x, sets, affine=call.affine, running=call.running, eps=call.options.eps
    )[0]
