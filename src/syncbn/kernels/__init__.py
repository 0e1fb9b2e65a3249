"""Arithmetic on one device: four operators, and which implementation serves which tensor.

A kernel knows nothing of ranks: it sees one tensor, and packed moments of some sets of values.
To add one, write a module with the four functions of :class:`Kernels`, let :func:`serving` return
it where it is the better choice, and add it to the list in tests/test_kernels.py, which holds it
to the specification, :mod:`syncbn.kernels.composite`.
"""

from __future__ import annotations

import os
import threading
import warnings
from typing import Protocol, cast

import torch
from torch import Tensor

from . import composite, native

VARIABLE = "SYNCBN_KERNELS"
_choice: str | None = None


class Kernels(Protocol):
    """What a module of kernels provides; formulas and shapes stand in composite.py."""

    NAME: str

    def measure(self, x: Tensor) -> Tensor: ...

    def normalise(
        self,
        x: Tensor,
        sets: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        num_batches_tracked: Tensor | None,
        momentum: float | None,
        eps: float,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]: ...

    def gradient_sums(self, dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor) -> Tensor: ...

    def input_gradient(
        self,
        dy: Tensor,
        x: Tensor,
        weight: Tensor | None,
        mean: Tensor,
        invstd: Tensor,
        sums: Tensor,
        count: Tensor,
    ) -> Tensor: ...

    # measure and gradient_sums, and how they merge, where no split of the batch may show
    def measure_samples(self, x: Tensor, lengths: Tensor | None) -> Tensor: ...

    def merge_samples(self, received: Tensor) -> Tensor: ...

    def gradient_sums_samples(
        self, dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor, lengths: Tensor | None
    ) -> Tensor: ...

    def total_samples(self, received: Tensor) -> Tensor: ...


def serving(x: Tensor) -> Kernels:
    """The kernels that serve x: the compiled ones where there are any for it, else composite."""
    return cast(Kernels, native if native_serves(x) else composite)


def describe() -> dict[str, str]:
    """Which kernels serve tensors on the CPU and on CUDA here, in words."""
    chosen = _chosen()
    if chosen == native.NAME:
        more = native.instruction_set()
    else:
        more = native.unavailable() or f"{VARIABLE} says so"
    return {"cpu": f"{chosen} ({more})", "cuda": composite.NAME}


def native_serves(x: Tensor) -> bool:
    """Whether the compiled operators serve x, which is asked in training only.

    The first time that they would, were they here, a warning says so.
    """
    if not native.serves(x):
        return False
    if _chosen() == native.NAME:
        return True
    if not torch.compiler.is_compiling():
        _warn_once()
    return False


_unsaid = threading.Lock()  # who takes it warns; nobody gives it back


def _warn_once() -> None:
    if not _unsaid.acquire(blocking=False) or os.environ.get(VARIABLE) == composite.NAME:
        return
    if why := native.unavailable():
        warnings.warn(
            "syncbn trains tensors on the CPU with plain torch operations, which are slower than "
            f"its compiled ones: {why}. To do without a warning, set {VARIABLE}={composite.NAME}",
            stacklevel=2,
        )


def _chosen() -> str:
    """The kernels for the CPU: what SYNCBN_KERNELS said when first asked, else the best."""
    global _choice
    if _choice is None:
        _choice = _choose()
    return _choice


def _choose() -> str:
    choice = os.environ.get(VARIABLE, "")
    if choice not in ("", native.NAME, composite.NAME):
        raise ValueError(
            f"{VARIABLE}: expected {native.NAME} or {composite.NAME}, got {choice!r}; leave it "
            "unset for the best available"
        )
    if choice == native.NAME and not native.available():
        raise RuntimeError(f"{VARIABLE}: got {choice!r}, but {native.unavailable()}")
    return choice or (native.NAME if native.available() else composite.NAME)


# torch.compile calls it while it traces and takes the answer for granted. This is what
# torch.compiler.assume_constant_result does, which would import the compiler now.
_chosen._dynamo_marked_constant = True  # type: ignore[attr-defined]
