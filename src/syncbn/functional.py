"""sync_batch_norm(): validates, picks the path. The one public function."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import local
from .autograd import synchronised
from .comm import LOCAL, resolve
from .kernels import composite


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    group: Any = None,
) -> Tensor:
    """Batch normalisation with the statistics of the whole batch, however it is split over ranks.

    ``y = (x − mean) / sqrt(var + eps) · weight + bias`` per channel, where mean and biased
    variance are those of all ranks' values together. Gradients with respect to ``input`` account
    for the statistics' dependence on every rank's input; gradients of ``weight`` and ``bias`` stay
    local sums, which DistributedDataParallel averages as it does for every parameter.

    Without a group of more than one rank, with ``training=False``, while tracing or exporting and
    on the meta device this is :func:`torch.nn.functional.batch_norm` and nothing is communicated.

    Args:
        input: (N, C, *), any floating dtype and strides; N may be 0 and may differ between ranks.
        running_mean, running_var: (C,) or None, of any floating dtype. In training they move in
            place by ``momentum`` towards the mean and the *unbiased* variance of the whole batch.
        weight, bias: (C,) or None, of ``input``'s dtype or float32.
        training: normalise with the batch's statistics (True) or the running ones (False).
        momentum: in [0, 1], the weight of this batch in the running statistics.
        eps: > 0, added to the variance.
        group: None (the default group, if one is initialised), a torch.distributed group, a
            one-dimensional DeviceMesh or a :class:`syncbn.comm.Communicator`.

    Returns:
        A tensor of ``input``'s shape, dtype and memory format.

    Raises:
        TypeError: an ``input`` that is no floating tensor, or a ``group`` of another type.
        ValueError: fewer than two dimensions, no channels, sizes or devices that don't match,
            ``momentum`` or ``eps`` out of range, a group without this rank; on every rank alike, a
            single value per channel over all ranks.

    Source: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167;
    https://docs.pytorch.org/docs/stable/generated/torch.nn.SyncBatchNorm.html

    Example:
        >>> x = torch.randn(4, 3, 8, 8)
        >>> y = syncbn.sync_batch_norm(x, None, None)
        >>> bool(y.mean((0, 2, 3)).abs().max() < 1e-6)
        True
    """
    check_options(momentum, eps)
    return batch_norm(
        *(input, running_mean, running_var, None, weight, bias, training, momentum, eps), group
    )


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    group: Any,
) -> Tensor:
    """:func:`sync_batch_norm` for layers: counts batches, over which momentum None averages."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    silent = not training or tracing or torch.compiler.is_exporting()
    comm = LOCAL if silent or getattr(input, "is_meta", False) else resolve(group)
    if not tracing:  # a trace would record the checks, with warnings
        check_options(0.0 if momentum is None else momentum, eps)
        if (
            training
            and comm.size == 1
            and local.serves(input, weight, bias, running_mean, running_var)
        ):
            try:
                return local.batch_norm(
                    *(input, weight, bias, running_mean, running_var, num_batches_tracked),
                    *(momentum, eps),
                )
            except RuntimeError:  # the operator checks in no time; the words follow here
                _check_tensors(input, running_mean, running_var, weight, bias)
                raise
        _check_tensors(input, running_mean, running_var, weight, bias)
    if comm.size > 1:
        return synchronised(
            *(input, running_mean, running_var, num_batches_tracked, weight, bias),
            *(momentum, eps, comm),
        )
    if running_mean is not None and _mixed(running_mean.dtype, input, weight):
        if training:
            F._verify_batch_size(input.size())  # type: ignore[attr-defined]
            moments = composite.measure(input).unsqueeze(0)
            rest = (running_mean, running_var, num_batches_tracked, momentum, eps)
            return composite.normalise(input, moments, weight, bias, *rest)[0]
        wide = torch.float64 if input.dtype == torch.float64 else torch.float32
        running_mean, running_var, weight, bias = (
            None if tensor is None else tensor.to(wide)
            for tensor in (running_mean, running_var, weight, bias)
        )
    if momentum is None:
        momentum = 0.0 if num_batches_tracked is None else 1 / (float(num_batches_tracked) + 1)
    y = F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    return y


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
        raise TypeError(
            f"sync_batch_norm: expected a torch.Tensor as input, got {type(input).__name__}"
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


def _check_tensors(
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


def _mixed(statistics: torch.dtype, input: Tensor, weight: Tensor | None) -> bool:
    """Whether running statistics are of a dtype that our kernels take and torch's refuse."""
    if weight is not None:
        return statistics != weight.dtype
    return statistics != input.dtype and (
        statistics != torch.float32 or input.dtype == torch.float64
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
