"""What the kernels demand of tensors before they read memory by address.

A layer that meets such a refusal says it in words of its own: step/checks.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...tensors.storages import check_held, has_storage
from ..interface import COUNTING, FLOATING, NO_RUNNING, Affine, Running


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
    if dy.shape != x.shape or dy.dtype != x.dtype or dy.get_device() != x.get_device():
        raise RuntimeError(
            f"{step}: expected dy of x's dtype and shape, {x.dtype} and {tuple(x.shape)} on "
            f"{x.device}, got {dy.dtype} and {tuple(dy.shape)} on {dy.device}"
        )
    if not has_storage(dy):
        check_held({"the output's gradient": dy})


def check_wide(step: str, name: str, tensor: Tensor, shape: tuple[int, ...], x: Tensor) -> None:
    """Refuse per-channel numbers that are not float64 of this shape on the device of x."""
    if not (
        tensor.dtype == torch.float64
        and tensor.shape == shape
        and tensor.get_device() == x.get_device()
    ):
        raise RuntimeError(
            f"{step}: expected {name} as float64 of shape {shape} on {x.device}, got "
            f"{tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}"
        )
    if not _is_lain(tensor):
        check_held({name: tensor})


def fit_layer(
    step: str, x: Tensor, affine: Affine, running: Running = NO_RUNNING
) -> tuple[Affine, Running]:
    """Parameters and running statistics as the kernels read and write them: copies of those that
    do not lie so. Refuses what is not (C,), floating and where x is.
    """
    channels, device = x.shape[1], x.get_device()
    found: list[Tensor | None] = []
    for tensor in (*affine, running.mean, running.var):
        if tensor is not None:
            if not (
                tensor.dtype in FLOATING
                and tensor.numel() == channels
                and tensor.dim() == 1
                and tensor.get_device() == device
            ):
                raise RuntimeError(
                    f"{step}: expected parameters and running statistics as floating tensors of "
                    f"shape ({channels},) on {x.device}, got {tensor.dtype} of shape "
                    f"{tuple(tensor.shape)} on {tensor.device}"
                )
            tensor = _lain("a parameter or running statistic", tensor)
        found.append(tensor)
    weight, bias, mean, var = found
    batches = running.batches
    if batches is not None:
        if not (
            batches.numel() == 1 and batches.dtype in COUNTING and batches.get_device() == device
        ):
            raise RuntimeError(
                f"{step}: expected num_batches_tracked as one real number on {x.device}, got "
                f"{batches.dtype} of shape {tuple(batches.shape)} on {batches.device}"
            )
        batches = _lain("num_batches_tracked", batches)
    return Affine(weight, bias), Running(mean, var, batches, running.momentum)


def _lain(name: str, tensor: Tensor) -> Tensor:
    if _is_lain(tensor):
        return tensor
    check_held({name: tensor})
    return tensor.resolve_neg().contiguous()


def _is_lain(tensor: Tensor) -> bool:
    """Whether all values are in memory, side by side and with their own sign."""
    end = tensor.storage_offset() * tensor.itemsize + tensor.nbytes
    return (
        tensor.is_contiguous() and not tensor.is_neg() and tensor.untyped_storage().nbytes() >= end
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
