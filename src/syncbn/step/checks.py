"""What sync_batch_norm refuses and says then: expected, got, remedy. Whether it runs again."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.fx import Proxy

from ..kernels import COUNTING, FLOATING, Affine, Running
from ..tensors.storages import PLAIN, check_held, form_of, has_storage, is_dtensor, is_held
from ..tensors.transforms import transforming
from .nested import check_form

if TYPE_CHECKING:
    from typing import NoReturn

FLOATING_WORDS = "of float16, bfloat16, float32 or float64"
_NAMES = ("running_mean", "running_var", "weight", "bias")
_NUMBERS = (Real, torch.SymInt, torch.SymFloat)
_LARGEST = torch.finfo(torch.float64).max
MOST_DIMENSIONS = 64  # of torch's sums, and so of ours


def check_options(momentum: float | None, eps: float) -> None:
    """Refuse a momentum outside [0, 1] and an eps that is not positive and finite."""
    if (
        type(momentum) is float
        and 0 <= momentum <= 1
        and type(eps) is float
        and 0 < eps <= _LARGEST
    ):
        return  # as mostly
    for name, value in (("momentum", momentum), ("eps", eps)):
        if not isinstance(value, _NUMBERS) and not (value is None and name == "momentum"):
            raise TypeError(
                f"sync_batch_norm: expected {name} to be a number, got {type(value).__name__}; "
                f"{'0.1' if name == 'momentum' else '1e-5'} is usual"
            )
    if momentum is None or not 0 <= momentum <= 1:
        raise ValueError(
            f"sync_batch_norm: expected momentum in [0, 1], got {momentum}; it is the weight of "
            "the new batch in the running statistics (0.1 is usual, a layer takes None for the "
            "cumulative average)"
        )
    if not 0 < eps <= _LARGEST:
        wanted = "a finite eps" if eps > 0 else "eps > 0"
        raise ValueError(
            f"sync_batch_norm: expected {wanted}, got {eps}; it keeps a constant channel from "
            "dividing by zero (1e-5 is usual)"
        )


def checked_dtype(name: str, dtype: Any) -> torch.dtype:
    """``dtype``, unless it is none of those that a layer computes with."""
    if not isinstance(dtype, torch.dtype) or dtype not in FLOATING:
        raise TypeError(
            f"SyncBatchNorm: expected {name} to be a floating-point dtype, {FLOATING_WORDS}, got "
            f"{dtype!r}; for example torch.float64"
        )
    return dtype


def check_input(input: Tensor, compiling: bool | None = None) -> None:
    """Refuse what is no floating (N, C, *) tensor with at least one channel.

    compiling: whether a graph is being traced, without values; None to ask.
    """
    if not isinstance(input, Tensor):
        traced = isinstance(input, Proxy)
        remedy = "; for torch.fx, syncbn.revert the model first" if traced else ""
        raise TypeError(
            f"sync_batch_norm: expected a torch.Tensor as input, got {type(input).__name__}{remedy}"
        )
    if input.dtype not in FLOATING:
        raise TypeError(
            f"sync_batch_norm: expected floating-point input, {FLOATING_WORDS}, got {input.dtype}; "
            "convert it first, for example input.float()"
        )
    check_form(input)
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
    if input.dim() > MOST_DIMENSIONS:
        raise ValueError(
            f"sync_batch_norm: expected at most {MOST_DIMENSIONS} dimensions, as torch's sums, got "
            f"{input.dim()}; join some, for example input.flatten(2)"
        )
    if input.is_nested:  # whose values are looked at by themselves
        return
    if not (is_held(input) if compiling is None else compiling or has_storage(input)):
        check_held({"input": input})


def check_dims(layer: str, dims: Sequence[int], shapes: str, input: Tensor) -> None:
    """Refuse an input of another number of dimensions than the layer's class takes."""
    if input.dim() in dims:
        return
    expected = " or ".join(f"{dim}D" for dim in dims)
    raise ValueError(
        f"{layer}: expected {expected} input (got {input.dim()}D input) of shape {shapes}, got "
        f"shape {tuple(input.shape)}; syncbn.SyncBatchNorm takes any number of dimensions from two"
    )


def check_shape(name: str, shape: tuple[int, ...], input: Tensor) -> None:
    """Refuse a shape that isn't (C,) for input (N, C, *)."""
    if shape != input.shape[1:2]:
        raise ValueError(
            f"sync_batch_norm: expected {name} of shape ({input.shape[1]},) for input of shape "
            f"{tuple(input.shape)}, got {tuple(shape)}; channels are dimension 1 of the input and "
            "must equal the layer's num_features"
        )


def check_tensors(input: Tensor, affine: Affine, running: Running, compiling: bool) -> None:
    """Refuse tensors that aren't (C,), floating and on the device of input (N, C, *)."""
    check_input(input, compiling)
    shape, device = input.shape[1:2], input.device
    for name, tensor in zip(_NAMES, (*running[:2], *affine), strict=True):
        if tensor is not None and not (
            (type(tensor) in PLAIN or _is_like(tensor, input))
            and tensor.shape == shape
            and tensor.device == device
            and tensor.dtype in FLOATING
            and tensor.layout is torch.strided
            and (compiling or has_storage(tensor))  # a graph is traced without values
        ):
            _refuse(name, tensor, input)
    if (running.mean is None) != (running.var is None):
        raise ValueError(
            "sync_batch_norm: expected running_mean and running_var both or neither, got only "
            f"running_{'var' if running.mean is None else 'mean'}"
        )
    if running.batches is not None:
        check_counter("num_batches_tracked", running.batches, device)
        if running.momentum is None:
            _check_divisor(running.batches, compiling)


def _is_like(tensor: Any, input: Tensor) -> bool:
    """Whether this is a tensor, and no DTensor beside a plain one."""
    return isinstance(tensor, Tensor) and (is_dtensor(input) or not is_dtensor(tensor))


def _refuse(name: str, tensor: Any, input: Tensor) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype not in FLOATING:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(
            f"sync_batch_norm: expected {name} to be a floating-point tensor, {FLOATING_WORDS}, "
            f"got {got}; use the input's dtype or torch.float32"
        )
    if (form := form_of(tensor)) is not None:
        raise TypeError(
            f"sync_batch_norm: expected {name} as a dense tensor, got a {form} one; convert it "
            "first, for example with .to_dense()"
        )
    check_shape(name, tensor.shape, input)
    if is_dtensor(tensor) and not is_dtensor(input):
        raise TypeError(
            f"sync_batch_norm: expected {name} as a plain tensor, as the input is, got a DTensor; "
            "distribute the input, too, or take its full_tensor()"
        )
    check_held({name: tensor})
    raise ValueError(
        f"sync_batch_norm: expected {name} on the input's device {input.device}, got "
        f"{tensor.device}; move one of them with .to()"
    )


def check_counter(name: str, counter: Any, device: torch.device) -> None:
    """Refuse what cannot count batches."""
    if not isinstance(counter, Tensor) or counter.dtype not in COUNTING:
        got = counter.dtype if isinstance(counter, Tensor) else type(counter).__name__
        raise TypeError(
            f"sync_batch_norm: expected {name} as a tensor of int64, int32, int16, int8 or uint8, "
            f"or {FLOATING_WORDS}, got {got}; torch.tensor(0) is usual"
        )
    if counter.numel() != 1 or counter.device != device:
        raise ValueError(
            f"sync_batch_norm: expected {name} as one number on the input's device {device}, got "
            f"shape {tuple(counter.shape)} on {counter.device}; torch.tensor(0) is usual"
        )
    check_held({name: counter})


def _check_divisor(counter: Tensor, compiling: bool) -> None:
    """Refuse a counter of batches, which an average divides by, that counts on to 0 or less."""
    # Asking an accelerator means waiting for it: only of counters that soon come to their end.
    readable = counter.is_cpu or (counter.dtype != torch.int64 and not counter.is_meta)
    if not readable or compiling or transforming():
        return
    if not float(counter + 1) > 0:
        raise ValueError(
            "sync_batch_norm: expected num_batches_tracked that counts on to more than 0, as "
            f"momentum=None divides by it, got {counter.item()} of {counter.dtype}; "
            "torch.tensor(0) starts anew"
        )


def refuse_single_value(shapes: Sequence[torch.Size], rank: int, size: int) -> NoReturn:
    """Refuse a batch with a single value per channel in all parts of all ranks together."""
    if len(shapes) > 1 and size == 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, got 1 on all "
            f"{len(shapes)} replicas together, of input sizes {[tuple(s) for s in shapes]}; "
            "use a larger batch or call eval() on the layer"
        )
    sizes = " and ".join(str(shape) for shape in shapes)
    raise ValueError(
        f"Expected more than 1 value per channel when training, got input size {sizes} on "
        f"rank {rank} and 1 value per channel on all {size} ranks together; "
        "use a larger batch or call eval() on the layer"
    )


def check_not_reproducible(reproducible: bool) -> None:
    """Refuse what DataParallel doesn't do."""
    if reproducible:
        raise ValueError(
            "sync_batch_norm: reproducible=True is for ranks; within syncbn.DataParallel leave it "
            "out, or use DistributedDataParallel with one process per device"
        )
