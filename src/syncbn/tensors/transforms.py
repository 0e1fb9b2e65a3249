"""Whether a transform of torch.func, forward-mode differentiation or an export is around."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils._python_dispatch import _disable_current_modes

_functorch = torch._C._functorch
# Before 2.12 Dynamo takes is_exporting() for true in whatever it compiles.
_FLAG_ALONE_TELLS = torch.torch_version.TorchVersion(torch.__version__) < "2.12"


def exporting() -> bool:
    """Whether torch.export traces what runs."""
    if _FLAG_ALONE_TELLS:
        flag: bool = torch.compiler._is_exporting_flag
        return flag
    return torch.compiler.is_exporting()


def transforming() -> bool:
    """Whether operations of our own would be refused, or lose what is computed beside them.

    True within grad, vmap, jvp and the others, and within a level of forward mode.
    """
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def batched_or_transforming(gradient: Tensor) -> bool:
    """Whether a backward that was given ``gradient`` is part of a transform.

    The batch of ``is_grads_batched`` and ``vectorize`` is of an older kind, without a transform.
    """
    return transforming() or _functorch.is_legacy_batchedtensor(gradient)


def unwrapped(tensor: Tensor) -> Tensor:
    """What the transforms around have wrapped, with the dimensions that they map over."""
    while _functorch.is_functorch_wrapped_tensor(tensor):
        tensor = _functorch.get_unwrapped(tensor)
    return tensor


def any_element_is_one(number: Tensor) -> bool:
    """Whether ``number`` () is one, in any element of a vmap around it."""
    number = unwrapped(number)
    with _disable_current_modes():  # torch.func.linearize traces, and would refuse to look
        return bool((number == 1).any())


def check_movable(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    num_batches_skipped: Tensor | None,
    *data: Any,
) -> None:
    """Refuse running statistics that a transform of ``data`` cannot move."""
    zero = torch.zeros(())
    for tensor in data:
        if isinstance(tensor, Tensor):
            zero = tensor.new_zeros((), dtype=zero.dtype) + zero.to(tensor.device)
    for name, statistic in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("num_batches_tracked", num_batches_tracked),
        ("num_batches_skipped", num_batches_skipped),
    ):
        if statistic is None:
            continue
        try:
            with torch.no_grad():
                statistic.add_(zero.to(statistic.dtype))
        except RuntimeError as error:
            raise RuntimeError(
                "sync_batch_norm: expected running statistics that a transform of torch.func can "
                f"move in training, got {name} of outside of it ({error}); give the layer's "
                "buffers to the transformed function and use torch.func.functional_call, for vmap "
                "with buffers for each element (torch.func.stack_module_state), or use "
                "track_running_stats=False, or call eval() on the layer"
            ) from error


def check_not_transforming() -> None:
    """Refuse a transform inside one replica of :class:`syncbn.DataParallel`."""
    if transforming():
        raise RuntimeError(
            "sync_batch_norm: expected no transform of torch.func and no forward-mode "
            "differentiation in the forward of a replica of syncbn.DataParallel, got one; put it "
            "around the DataParallel, or use DistributedDataParallel"
        )


def check_not_recording() -> None:
    """Refuse to communicate while operations are recorded, to be run again without their peers."""
    if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None:
        raise RuntimeError(
            "sync_batch_norm: expected operations over ranks to run in this transform, got one "
            "that records them to run later (torch.func.linearize, make_fx), in which messages "
            "would be left out; use torch.func.jvp, or torch.compile"
        )


def check_forward_mode(threads: bool, dtensor: bool) -> None:
    """Refuse forward mode where torch has one level for all threads, or no rules."""
    stack = _functorch.get_interpreter_stack() or ()  # of this thread, as the level is not
    forward = any(each.key() == _functorch.TransformType.Jvp for each in stack)
    if (threads or dtensor) and (forward or forward_ad._current_level >= 0):
        what = "among ranks that are threads, which share its levels" if threads else "of a DTensor"
        raise RuntimeError(
            f"sync_batch_norm: expected no forward-mode differentiation {what}, got one; use "
            "reverse mode (torch.func.grad, vjp, jacrev), or ranks that are processes with tensors "
            "of their own"
        )
