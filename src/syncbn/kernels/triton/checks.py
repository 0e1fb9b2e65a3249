"""What the kernels demand of tensors before they read memory by address.

A layer that meets such a refusal says it in words of its own: step/checks.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...tensors.storages import check_held, has_storage
from ..interface import Affine, Running

FLOATING = frozenset((torch.float32, torch.float64, torch.bfloat16, torch.float16))
COUNTING = FLOATING | {torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8}


def check_input(step: str, x: Tensor) -> None:
    """Refuse what is no floating (N, C, *) tensor with its values in memory."""
    if x.dim() < 2 or x.shape[1] == 0 or x.dtype not in FLOATING:
        raise RuntimeError(
            f"{step}: expected x of shape (N, C, *) with C > 0 and of float32, float64, bfloat16 "
            f"or float16, got shape {tuple(x.shape)} and {x.dtype}"
        )
    if not has_storage(x):
        check_held({"input": x})


def check_gradient(step: str, dy: Tensor, x: Tensor) -> None:
    """Refuse a gradient that is not of the shape, device and dtype of x; checks x too."""
    check_input(step, x)
    if dy.shape != x.shape or dy.dtype != x.dtype or dy.device != x.device:
        raise RuntimeError(
            f"{step}: expected dy of x's dtype and shape, {x.dtype} and {tuple(x.shape)} on "
            f"{x.device}, got {dy.dtype} and {tuple(dy.shape)} on {dy.device}"
        )
    if not has_storage(dy):
        check_held({"the output's gradient": dy})


def check_wide(step: str, name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    """Refuse per-channel numbers that are not float64 of this shape on the device of x."""
    if tensor.shape != shape or tensor.dtype != torch.float64 or tensor.device != x.device:
        raise RuntimeError(
            f"{step}: expected {name} as float64 of shape {shape} on {x.device}, got "
            f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
        )
    if not has_storage(tensor):
        check_held({name: tensor})


def check_layer(step: str, x: Tensor, affine: Affine, running: Running) -> None:
    """Refuse parameters and running statistics that are not (C,), floating and where x is."""
    device, shape = x.device, x.shape[1:2]
    weight, bias = affine
    for tensor in (weight, bias, running.mean, running.var):
        if tensor is None or (
            tensor.shape == shape
            and tensor.dtype in FLOATING
            and tensor.device == device
            and has_storage(tensor)
        ):
            continue
        check_held({"a parameter or running statistic": tensor})
        raise RuntimeError(
            f"{step}: expected parameters and running statistics as floating tensors of shape "
            f"{tuple(shape)} on {device}, got {tensor.dtype} of shape {tuple(tensor.shape)} on "
            f"{tensor.device}"
        )
    batches = running.batches
    if batches is not None and not (
        batches.numel() == 1
        and batches.dtype in COUNTING
        and batches.device == device
        and has_storage(batches)
    ):
        check_held({"num_batches_tracked": batches})
        raise RuntimeError(
            f"{step}: expected num_batches_tracked as one real number on {device}, got "
            f"{batches.dtype} of shape {tuple(batches.shape)} on {batches.device}"
        )


def check_pair(step: str, statistics: tuple[Tensor, Tensor], x: Tensor) -> None:
    """Refuse mean and invstd that are not (C,), contiguous and where x is."""
    for name, tensor in zip(("mean", "invstd"), statistics, strict=True):
        check_wide(step, name, tensor, (x.shape[1],), x)
        if not tensor.is_contiguous():
            raise RuntimeError(
                f"{step}: expected {name} contiguous, got stride {tensor.stride()}; "
                "normalise() gives it so"
            )
