"""The compiled CPU operators: finds and loads the library, and gives their shapes for tracing.

The operators live in csrc/ (formulas and shapes: composite.py) and are built with the package
by setup.py. They know ranks no more than the others do.
"""

from __future__ import annotations

import ctypes
import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .. import library
from ..numerics.reproducible import NUMBERS
from ..tensors.layout import check_samples
from ..tensors.operators import take_any_strides
from ..tensors.prefix import NO_PREFIX, Prefix, prefixed
from .interface import FLOATING, NO_AFFINE, NO_RUNNING, Affine, Running, Statistics

NAME = "native"
DEVICES: tuple[str, ...] = ("cpu",)

_TYPES = (Tensor, Parameter)
_ops: Any = torch.ops.syncbn  # looks an operator up when it is first used
# Those whose loops read x as it lies, and that return y or dx like it.
_ANY_STRIDES = ("measure", "normalise", "gradient_sums", "input_gradient")
_kept: list[torch.library.Library] = []
_loading = threading.Lock()


def unavailable() -> str | None:
    """Load the library. None if that worked, else why the operators are unavailable."""
    with _loading:  # threads whose first layers run at once
        return _load()


@cache
def _load() -> str | None:
    if why := library.missing():
        return why
    try:
        torch.ops.load_library(library.LIBRARY)  # type: ignore[no-untyped-call]
    except OSError as error:
        return f"{library.LIBRARY.name} does not load: {error}"
    _register_shapes()
    _leave_autograd_out()
    return None


def available() -> bool:
    """Whether the compiled operators can be used here; the first call loads them."""
    return unavailable() is None


def instruction_set() -> str:
    """The name of the instruction set whose loops run on this processor; available() here."""
    name = ctypes.CDLL(str(library.LIBRARY)).syncbn_instruction_set
    name.restype = ctypes.c_char_p
    return bytes(name()).decode()


def describe() -> str:
    return instruction_set()


def supports(x: Tensor) -> bool:
    """Whether the operators take x: a plain dense CPU tensor of a dtype they know."""
    return type(x) in _TYPES and x.is_cpu and x.dtype in FLOATING and x.layout is torch.strided


def measure(x: Tensor) -> Tensor:
    packed: Tensor = _ops.measure.default(x)
    return packed


def normalise(
    x: Tensor,
    sets: Tensor,
    *,
    affine: Affine = NO_AFFINE,
    running: Running = NO_RUNNING,
    eps: float,
) -> tuple[Tensor, Statistics]:
    y, *statistics = _ops.normalise.default(x, sets, *affine, *running, eps)
    return y, Statistics(*statistics)


def gradient_sums(dy: Tensor, x: Tensor, statistics: Statistics) -> Tensor:
    sums: Tensor = _ops.gradient_sums.default(dy, x, statistics.mean, statistics.invstd)
    return sums


def input_gradient(
    dy: Tensor, x: Tensor, *, weight: Tensor | None, statistics: Statistics, sums: Tensor
) -> Tensor:
    mean, invstd, count = statistics
    dx: Tensor = _ops.input_gradient.default(dy, x, weight, mean, invstd, sums, count)
    return dx


def measure_samples(x: Tensor, lengths: Tensor | None) -> Tensor:
    """As composite's; the same demands on x, whose samples must lie apart."""
    check_samples("measure_samples", x)
    represented: Tensor = _ops.measure_samples.default(x, lengths)
    return represented


def merge_samples(received: Tensor) -> Tensor:
    packed: Tensor = _ops.merge_samples.default(received)
    return packed


def gradient_sums_samples(
    dy: Tensor, x: Tensor, statistics: Statistics, lengths: Tensor | None
) -> Tensor:
    """As composite's; the same demands on dy and x, whose samples must lie apart."""
    check_samples("gradient_sums_samples", dy, x)
    mean, invstd, _ = statistics
    represented: Tensor = _ops.gradient_sums_samples.default(dy, x, mean, invstd, lengths)
    return represented


def total_samples(received: Tensor) -> Tensor:
    sums: Tensor = _ops.total_samples.default(received)
    return sums


def supports_others(affine: Affine, running: Running) -> bool:
    here = True
    for tensor in (*affine, *running[:3]):  # a loop takes half the time of all()
        here = here and (tensor is None or tensor.is_cpu)
    return here


def batch_norm(x: Tensor, *, affine: Affine, running: Running, eps: float) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = _ops.batch_norm.default(x, *affine, *running, eps)
    return result


def batch_norm_backward(
    dy: Tensor, x: Tensor, *, affine: Affine, saved: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    result: tuple[Tensor, Tensor, Tensor] = _ops.batch_norm_backward.default(dy, x, *affine, saved)
    return result


def measure_checked(
    x: Tensor, *, affine: Affine, running: Running, prefix: Prefix = NO_PREFIX
) -> Tensor:
    packed: Tensor = _ops.measure_checked.default(x, *affine, *running)
    return prefixed(packed, prefix)


def gradient_sums_checked(
    dy: Tensor,
    x: Tensor,
    *,
    affine: Affine,
    statistics: Statistics,
    prefix: Prefix = NO_PREFIX,
) -> tuple[Tensor, Tensor, Tensor]:
    mean, invstd, _ = statistics
    sums, dweight, dbias = _ops.gradient_sums_checked.default(dy, x, *affine, mean, invstd)
    return prefixed(sums, prefix), dweight, dbias


def _leave_autograd_out() -> None:
    """The operators have no derivatives of their own: straight to the CPU, past Autograd's stop.

    They are called from autograd.Functions; torch's fallback for operators like these would only
    prepare a warning, in a third of a microsecond per call.
    """
    operators = (
        *(measure, normalise, gradient_sums, input_gradient, batch_norm, batch_norm_backward),
        *(measure_checked, gradient_sums_checked),
        *(measure_samples, merge_samples, gradient_sums_samples, total_samples),
    )
    fragment = torch.library.Library("syncbn", "FRAGMENT")  # type: ignore[no-untyped-call]
    _kept.append(fragment)  # what it registers goes with it
    for operator in operators:
        name, stop = operator.__name__, torch.library.fallthrough_kernel
        fragment.impl(name, stop, "Autograd")  # type: ignore[no-untyped-call]
    for moving in (_ops.normalise, _ops.batch_norm):
        fragment.impl(moving.default, _resolving(moving.default), "Negative")  # type: ignore[no-untyped-call]


def _resolving(operator: Any) -> Callable[..., Any]:
    """The operator for tensors of which some are views that read with the opposite sign.

    torch would copy such arguments, and find no way back into running statistics.
    """

    def resolved(*arguments: Any) -> Any:
        plain = [a.resolve_neg() if isinstance(a, Tensor) else a for a in arguments]
        result = operator(*plain)
        for old, new in zip(arguments[-5:-2], plain[-5:-2], strict=True):  # what moves
            if new is not old:
                old.copy_(new)
        return result

    return resolved


def _register_shapes() -> None:
    """What the operators return, without computing it, for torch.compile, export and meta."""

    def wide(x: Tensor, *shape: int) -> Tensor:
        return x.new_empty(shape, dtype=torch.float64)

    def normalised(x: Tensor, *_: Any) -> tuple[Tensor, ...]:
        channels = x.shape[1]
        return torch.empty_like(x), wide(x, channels), wide(x, channels), wide(x)

    def of_all(dy: Tensor, x: Tensor, *parameters: Tensor | None) -> tuple[Tensor, ...]:
        dtypes = [torch.float32 if p is None else p.dtype for p in parameters[:2]]
        return torch.empty_like(x), *(x.new_empty(x.shape[1], dtype=dtype) for dtype in dtypes)

    def with_sums(dy: Tensor, x: Tensor, *rest: Any) -> tuple[Tensor, ...]:
        return wide(x, 2, x.shape[1]), *of_all(dy, x, *rest)[1:]

    shapes: dict[str, Callable[..., Any]] = {
        "measure": lambda x: wide(x, 1 + 2 * x.shape[1]),
        "normalise": normalised,
        "gradient_sums": lambda dy, x, *_: wide(x, 2, x.shape[1]),
        "input_gradient": lambda dy, x, *_: torch.empty_like(x),
        "measure_samples": lambda x, _: wide(x, 1 + 2 * NUMBERS * x.shape[1]),
        "merge_samples": lambda received: wide(received, 1, 1 + received.shape[1] // NUMBERS),
        "gradient_sums_samples": lambda dy, x, *_: wide(x, NUMBERS, 2 * x.shape[1]),
        "total_samples": lambda received: wide(received, 2, received.shape[2] // 2),
        "batch_norm": lambda x, *_: (torch.empty_like(x), wide(x, 2, x.shape[1])),
        "batch_norm_backward": of_all,
        "measure_checked": lambda x, *_: wide(x, 1 + 2 * x.shape[1]),
        "gradient_sums_checked": with_sums,
    }
    for name, shape in shapes.items():
        torch.library.register_fake(f"syncbn::{name}", shape)
    for name in _ANY_STRIDES:
        take_any_strides(getattr(_ops, name).default)
