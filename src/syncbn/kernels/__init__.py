"""Arithmetic on one device: the implementations, and which of them serves a tensor.

To add one, write a module with the functions of :class:`~syncbn.kernels.interface.Kernels` and put
it in :data:`IMPLEMENTATIONS`: selection, ``syncbn info``, ``SYNCBN_KERNELS`` and the tests, which
hold it to the specification, :mod:`syncbn.kernels.composite`, read that tuple.
"""

from __future__ import annotations

import os
import threading
import warnings

import torch
from torch import Tensor

from . import composite, native, triton
from .interface import (
    COUNTING,
    FLOATING,
    Affine,
    Fused,
    Implementation,
    Kernels,
    Running,
    SampleKernels,
    Statistics,
)

__all__ = [
    "COUNTING",
    "FLOATING",
    "IMPLEMENTATIONS",
    "VARIABLE",
    "Affine",
    "Fused",
    "Implementation",
    "Kernels",
    "Running",
    "SampleKernels",
    "Statistics",
    "composite",
    "describe",
    "native",
    "select_kernels",
    "triton",
]

VARIABLE = "SYNCBN_KERNELS"
COMPOSITE = Implementation(composite, missed="", samples=composite)  # never unavailable
IMPLEMENTATIONS = (  # the first that supports a tensor serves it; the last one supports all
    Implementation(
        native,
        samples=native,
        fused=native,
        missed="syncbn trains tensors on the CPU with plain torch operations, which are slower "
        "than its compiled ones",
    ),
    Implementation(
        triton,
        fused=triton,
        missed="syncbn trains tensors on the GPU with plain torch operations, about a hundred "
        "small ones in a layer's step, which are slower than its kernels",
    ),
    COMPOSITE,
)
_FASTER = IMPLEMENTATIONS[:-1]
_usable: frozenset[str] | None = None  # names; when first asked


def select_kernels(x: Tensor) -> Implementation:
    """The implementation that serves x, which is asked in training only.

    The first time that a better one would, were it installed, a warning says so.
    """
    for implementation in _FASTER:
        if implementation.steps.supports(x):
            if _is_usable(implementation.steps.NAME):
                return implementation
            if not torch.compiler.is_compiling():
                _warn_once(implementation)
    return COMPOSITE


def describe() -> dict[str, str]:
    """Which kernels serve tensors on the CPU and on CUDA here, in words."""
    return {device: _describe(device) for device in ("cpu", "cuda")}


def _describe(device: str) -> str:
    reasons = []
    for implementation in _FASTER:
        steps = implementation.steps
        if device in steps.DEVICES:
            if _is_usable(steps.NAME):
                return f"{steps.NAME} ({steps.describe()})"
            reasons.append(steps.unavailable() or f"{VARIABLE} says so")
    return f"{composite.NAME} ({'; '.join(reasons)})" if reasons else composite.NAME


_unsaid = threading.Lock()  # who takes it warns; nobody gives it back


def _warn_once(implementation: Implementation) -> None:
    why = implementation.steps.unavailable()
    if why and os.environ.get(VARIABLE) != composite.NAME and _unsaid.acquire(blocking=False):
        warnings.warn(
            f"{implementation.missed}: {why}. To do without a warning, set "
            f"{VARIABLE}={composite.NAME}",
            stacklevel=2,
        )


def _is_usable(name: str) -> bool:
    """Whether these kernels may serve: what SYNCBN_KERNELS said when first asked, else all."""
    global _usable
    if _usable is None:
        _usable = _find_usable()
    return name in _usable


# torch.compile calls it while it traces and takes the answer for granted. This is what
# torch.compiler.assume_constant_result does, which would import the compiler now.
_is_usable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _find_usable() -> frozenset[str]:
    choice = os.environ.get(VARIABLE, "")
    steps = {implementation.steps.NAME: implementation.steps for implementation in IMPLEMENTATIONS}
    if choice not in ("", *steps):
        *names, last = steps
        raise ValueError(
            f"{VARIABLE}: expected {', '.join(names)} or {last}, got {choice!r}; leave it "
            "unset for the best available"
        )
    if choice:
        if why := steps[choice].unavailable():
            raise RuntimeError(f"{VARIABLE}: got {choice!r}, but {why}")
        return frozenset((choice, composite.NAME))
    return frozenset(name for name, each in steps.items() if each.unavailable() is None)
