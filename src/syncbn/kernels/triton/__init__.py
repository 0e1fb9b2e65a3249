"""The four steps on GPUs, in one launch each: Triton, one source for CUDA and ROCm.

``measure`` and ``gradient_sums`` read the tensor once and end with what travels; ``normalise`` and
``input_gradient`` begin with what arrived, up to 64 ranks' rows, so that no small operation runs
between a kernel and a message. Nothing waits for the device.

    checks.py, layout.py                  tensors that are fit, and lie as the kernels want them
    plan.py, steps.py, launch.py          who computes what; one launch each; how kernels start
    forward.py, backward.py, tiles.py     the kernels

Triton is imported when a tensor on a GPU first trains. In graphs that torch compiles the
specification serves, whose operations the compiler fuses with what is around them.
"""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch.nn import Parameter

from ...tensors.prefix import NO_PREFIX, Prefix
from ..interface import FLOATING, NO_AFFINE, NO_RUNNING, Affine, Running, Statistics
from . import checks, layout, steps
from .launch import interpreting, unavailable, version

__all__ = [
    "DEVICES",
    "NAME",
    "batch_norm",
    "batch_norm_backward",
    "describe",
    "gradient_sums",
    "gradient_sums_checked",
    "input_gradient",
    "measure",
    "measure_checked",
    "normalise",
    "supports",
    "supports_others",
    "unavailable",
]

NAME = "triton"
DEVICES: tuple[str, ...] = ("cuda",)

_TYPES = (Tensor, Parameter)


def describe() -> str:
    how = "interpreted" if interpreting() else "compiled when first used"
    return f"{version()}, {how}"


def supports(x: Tensor) -> bool:
    """Whether the kernels take x: a plain dense floating tensor on a GPU, outside of a graph."""
    return (
        not torch.compiler.is_compiling()
        and type(x) in _TYPES
        and (x.is_cuda or (x.is_cpu and _on_cpu()))
        and x.dtype in FLOATING
        and x.layout is torch.strided
    )


def _on_cpu() -> bool:
    """The interpreter serves who asks for it by name."""
    return interpreting() and os.environ.get("SYNCBN_KERNELS") == NAME


def supports_others(affine: Affine, running: Running) -> bool:
    here = True
    for tensor in (*affine, *running[:3]):
        here = here and (tensor is None or tensor.is_cuda or (tensor.is_cpu and _on_cpu()))
    return here


def measure(x: Tensor) -> Tensor:
    checks.check_input("measure", x)
    x, plan = layout.planned(x)
    return steps.measure(x, plan)


def measure_checked(
    x: Tensor, *, affine: Affine, running: Running, prefix: Prefix = NO_PREFIX
) -> Tensor:
    checks.check_input("measure", x)
    checks.fit_layer("measure", x, affine, running)
    x, plan = layout.planned(x)
    return steps.measure(x, plan, prefix)


def normalise(
    x: Tensor,
    sets: Tensor,
    *,
    affine: Affine = NO_AFFINE,
    running: Running = NO_RUNNING,
    eps: float,
) -> tuple[Tensor, Statistics]:
    checks.check_input("normalise", x)
    channels = x.shape[1]
    checks.check_wide("normalise", "sets", sets, (len(sets), 1 + 2 * channels), x)
    if not sets.is_contiguous() and sets.stride(1) != 1:
        sets = sets.contiguous()
    saved = x.new_empty((2, channels), dtype=torch.float64)
    count = x.new_empty((), dtype=torch.float64)
    lain, plan = layout.planned(x)
    fit, moved = checks.fit_layer("normalise", x, affine, running)
    room = layout.room(x, lain)
    y = steps.normalise(
        lain, sets, plan, affine=fit, running=moved, eps=eps, saved=saved, count=count
    )
    _copy_back(running, moved)
    mean, invstd = saved.unbind()
    return y if room is None else room.copy_(y), Statistics(mean, invstd, count)


def batch_norm(x: Tensor, *, affine: Affine, running: Running, eps: float) -> tuple[Tensor, Tensor]:
    checks.check_input("batch_norm", x)
    saved = x.new_empty((2, x.shape[1]), dtype=torch.float64)
    lain, plan = layout.planned(x)
    fit, moved = checks.fit_layer("batch_norm", x, affine, running)
    sets = steps.measure(lain, plan).unsqueeze(0)
    room = layout.room(x, lain)
    y = steps.normalise(lain, sets, plan, affine=fit, running=moved, eps=eps, saved=saved)
    _copy_back(running, moved)
    return y if room is None else room.copy_(y), saved


def _copy_back(running: Running, moved: Running) -> None:
    """Into running statistics that the kernels could not write as they lie."""
    for old, new in zip(running[:3], moved[:3], strict=True):
        if old is not None and new is not None and old is not new:
            old.copy_(new)


def gradient_sums(dy: Tensor, x: Tensor, statistics: Statistics) -> Tensor:
    checks.check_gradient("gradient_sums", dy, x)
    mean, invstd, _ = statistics
    checks.check_pair("gradient_sums", (mean, invstd), x)
    x, plan = layout.planned(x)
    sums = steps.gradient_sums(layout.like(dy, x), x, plan, mean=mean, invstd=invstd)
    return sums.view(2, -1)


def gradient_sums_checked(
    dy: Tensor,
    x: Tensor,
    *,
    affine: Affine,
    statistics: Statistics,
    prefix: Prefix = NO_PREFIX,
) -> tuple[Tensor, Tensor, Tensor]:
    checks.check_gradient("gradient_sums", dy, x)
    checks.fit_layer("gradient_sums", x, Affine(affine.weight))
    mean, invstd, _ = statistics
    checks.check_pair("gradient_sums", (mean, invstd), x)
    into = _parameter_gradients(x, affine)
    x, plan = layout.planned(x)
    sums = steps.gradient_sums(
        layout.like(dy, x), x, plan, mean=mean, invstd=invstd, into=into, prefix=prefix
    )
    return sums if prefix.room else sums.view(2, -1), *into


def input_gradient(
    dy: Tensor, x: Tensor, *, weight: Tensor | None, statistics: Statistics, sums: Tensor
) -> Tensor:
    checks.check_gradient("input_gradient", dy, x)
    fit, _ = checks.fit_layer("input_gradient", x, Affine(weight))
    checks.check_pair("input_gradient", statistics[:2], x)
    checks.check_wide("input_gradient", "sums", sums, (2, x.shape[1]), x)
    lain, plan = layout.planned(x)
    dx = steps.input_gradient(
        layout.like(dy, lain),
        lain,
        plan,
        weight=fit.weight,
        statistics=statistics,
        sums=sums.contiguous(),
    )
    return dx if lain is x else layout.restored(dx, x)


def batch_norm_backward(
    dy: Tensor, x: Tensor, *, affine: Affine, saved: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    checks.check_gradient("batch_norm_backward", dy, x)
    fit, _ = checks.fit_layer("batch_norm_backward", x, Affine(affine.weight))
    checks.check_wide("batch_norm_backward", "saved", saved, (2, x.shape[1]), x)
    into = _parameter_gradients(x, affine)
    lain, plan = layout.planned(x)
    dy, (mean, invstd) = layout.like(dy, lain), saved.unbind()
    sums = steps.gradient_sums(dy, lain, plan, mean=mean, invstd=invstd, into=into)
    statistics = mean, invstd, None
    dx = steps.input_gradient(dy, lain, plan, weight=fit.weight, statistics=statistics, sums=sums)
    return dx if lain is x else layout.restored(dx, x), *into


def _parameter_gradients(x: Tensor, affine: Affine) -> tuple[Tensor, Tensor]:
    """Memory for dweight and dbias, each of its parameter's dtype."""
    dweight, dbias = (
        x.new_empty(x.shape[1], dtype=torch.float32 if parameter is None else parameter.dtype)
        for parameter in affine
    )
    return dweight, dbias
