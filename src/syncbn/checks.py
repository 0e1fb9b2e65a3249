"""What sync_batch_norm refuses and says then: expected, got, remedy. Whether it runs again."""

from __future__ import annotations

import threading
from typing import Any

import torch
from torch import Tensor
from torch.fx import Proxy


def check_options(momentum: float, eps: float) -> None:
    """Refuse a momentum outside [0, 1] and an eps ≤ 0."""
    if momentum is None or not 0 <= momentum <= 1:
        raise ValueError(
            f"sync_batch_norm: expected momentum in [0, 1], got {momentum}; it is the weight of "
            "the new batch in the running statistics (0.1 is usual, a layer takes None for the "
            "cumulative average)"
        )
    if not eps > 0:
        raise ValueError(
            f"sync_batch_norm: expected eps > 0, got {eps}; it keeps a constant channel from "
            "dividing by zero (1e-5 is usual)"
        )


def checked_dtype(name: str, dtype: Any) -> torch.dtype:
    """``dtype``, unless it is no floating one."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(
            f"SyncBatchNorm: expected {name} to be a floating-point dtype, got {dtype!r}; "
            "for example torch.float64"
        )
    return dtype


def check_input(input: Tensor) -> None:
    """Refuse what is no floating (N, C, *) tensor with at least one channel."""
    if not isinstance(input, Tensor):
        remedy = "; for torch.fx, syncbn.revert the model first" if type(input) is Proxy else ""
        raise TypeError(
            f"sync_batch_norm: expected a torch.Tensor as input, got {type(input).__name__}{remedy}"
        )
    if not input.dtype.is_floating_point:
        raise TypeError(
            f"sync_batch_norm: expected floating-point input, got {input.dtype}; "
            "convert it first, for example input.float()"
        )
    if input.dim() < 2:
        raise ValueError(
            f"sync_batch_norm: expected at least 2D input (got {input.dim()}D input) of shape "
            f"(N, C, *), got shape {tuple(input.shape)}; add a batch dimension with unsqueeze(0)"
        )
    if input.shape[1] == 0:
        raise ValueError(
            "sync_batch_norm: number of input channels should be non-zero, got shape "
            f"{tuple(input.shape)}; channels are dimension 1"
        )


def check_shape(name: str, shape: tuple[int, ...], input: Tensor) -> None:
    """Refuse a shape that isn't (C,) for input (N, C, *)."""
    if shape != input.shape[1:2]:
        raise ValueError(
            f"sync_batch_norm: expected {name} of shape ({input.shape[1]},) for input of shape "
            f"{tuple(input.shape)}, got {tuple(shape)}; channels are dimension 1 of the input and "
            "must equal the layer's num_features"
        )


def check_tensors(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
) -> None:
    """Refuse tensors that aren't (C,), floating and on the device of input (N, C, *)."""
    check_input(input)
    shape, device = input.shape[1:2], input.device
    for name, tensor in (
        ("running_mean", running_mean),
        ("running_var", running_var),
        ("weight", weight),
        ("bias", bias),
    ):
        if tensor is not None and not (
            isinstance(tensor, Tensor)
            and tensor.shape == shape
            and tensor.device == device
            and tensor.dtype.is_floating_point
        ):
            _refuse(name, tensor, input)
    if (running_mean is None) != (running_var is None):
        raise ValueError(
            "sync_batch_norm: expected running_mean and running_var both or neither, got only "
            f"running_{'var' if running_mean is None else 'mean'}"
        )


def _refuse(name: str, tensor: Any, input: Tensor) -> None:
    if not isinstance(tensor, Tensor) or not tensor.dtype.is_floating_point:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(
            f"sync_batch_norm: expected {name} to be a floating-point tensor, got {got}; "
            "use the input's dtype or torch.float32"
        )
    check_shape(name, tensor.shape, input)
    raise ValueError(
        f"sync_batch_norm: expected {name} on the input's device {input.device}, got "
        f"{tensor.device}; move one of them with .to()"
    )


def check_timeout(operation: str, timeout: float) -> None:
    """Refuse what threads cannot wait for: no seconds, or too many."""
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)):
        raise TypeError(
            f"{operation}: expected a number of seconds as timeout, got {type(timeout).__name__}"
        )
    if not 0 < timeout <= threading.TIMEOUT_MAX:
        raise ValueError(
            f"{operation}: expected 0 < timeout ≤ {threading.TIMEOUT_MAX:g}, got {timeout}; it is "
            "in seconds, of waiting for the other ranks"
        )


def check_not_reproducible(reproducible: bool) -> None:
    """Refuse what DataParallel doesn't do."""
    if reproducible:
        raise ValueError(
            "sync_batch_norm: reproducible=True is for ranks; within syncbn.DataParallel leave it "
            "out, or use DistributedDataParallel with one process per device"
        )
