"""Launches: compiled kernels are kept, and so is the memory in which programs meet.

Triton's own call binds arguments and looks up what it compiled in 10 to 17 µs. A kept kernel starts
in less than half of that, by a call that is private to Triton: with other versions than those in
:data:`TRIED` the public call serves.
"""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor

TRIED = ("3.6.", "3.7.")
ALIGNED = 3  # leading tensors of a kernel, for whose alignment Triton compiles: x, y or dy, x, dx

_kept: dict[tuple[Any, ...], Any] = {}
_scratch: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}


@cache
def unavailable() -> str | None:
    """Why there is no Triton here, in words; None where there is. It is imported to see only where
    there is a device for it, as that takes a while.
    """
    if find_spec("triton") is None:
        return (
            "Triton is not installed; torch's builds for CUDA and ROCm bring it, else "
            "pip install 'syncbn[triton]'"
        )
    if torch.cuda.is_available() or interpreting():
        try:
            _modules()
        except (
            Exception
        ) as error:  # of a version that lacks what the kernels use, or half installed
            return f"Triton does not load: {type(error).__name__}: {error}"
    return None


@cache
def _modules() -> tuple[Any, Any, Any]:
    """triton, and the kernels that it compiles."""
    import triton

    from . import backward, forward

    return triton, forward, backward


@cache
def kernel(name: str) -> Any:
    """The kernel of this name, of forward.py or backward.py."""
    _, forward, backward = _modules()
    return getattr(forward, name, None) or getattr(backward, name)


@cache
def dtypes(x: torch.dtype) -> Any:
    """In which of Triton's types the kernels compute on values of a tensor of this one."""
    language = _modules()[0].language
    return language.float64 if x == torch.float64 else language.float32


def version() -> str:
    return str(_modules()[0].__version__)


@cache
def interpreting() -> bool:
    """Whether Triton's interpreter runs the kernels, on the CPU: for tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def _keeps() -> bool:
    return version().startswith(TRIED) and not interpreting()


@cache
def processors(index: int) -> int:
    """The multiprocessors of a device; of none, for the interpreter, one."""
    if index < 0:
        return 1
    return int(torch.cuda.get_device_properties(index).multi_processor_count)


class Arguments(NamedTuple):
    """Of a kernel, in this order; the first tensor says on which device it runs."""

    tensors: tuple[Tensor | None, ...]
    numbers: tuple[float, ...]
    constants: tuple[Any, ...]


def launch(
    name: str, arguments: Arguments, *, grid: tuple[int, int], warps: int, large: bool
) -> None:
    """Start a kernel on its device's current stream. large: tensors past plan.LARGE bytes."""
    device = arguments.tensors[0].get_device()  # type: ignore[union-attr]
    if device >= 0 and device != torch._C._cuda_getDevice():
        with torch.cuda.device(device):
            _start(name, arguments, device, grid=grid, warps=warps, large=large)
    else:
        _start(name, arguments, device, grid=grid, warps=warps, large=large)


def _start(
    name: str,
    arguments: Arguments,
    device: int,
    *,
    grid: tuple[int, int],
    warps: int,
    large: bool,
) -> None:
    tensors, numbers, constants = arguments
    # All that Triton compiles for: tests/kernels/test_triton_launch.py compares.
    kinds = [None if tensor is None else tensor.dtype for tensor in tensors]
    places = [t.data_ptr() % 16 for t in tensors[:ALIGNED] if t is not None]
    key = (name, device, large, warps, *constants, *kinds, *places)
    kept = _kept.get(key)
    if kept is None:
        _kept_from(key, name, arguments, grid=grid, warps=warps)
        return
    stream = torch._C._cuda_getCurrentRawStream(device)
    kept.run(
        *(*grid, 1, stream, kept.function, kept.packed_metadata, None, None, None),
        *(*tensors, *numbers, *constants),
    )


def _kept_from(
    key: tuple[Any, ...], name: str, arguments: Arguments, *, grid: tuple[int, int], warps: int
) -> None:
    """Start a kernel for the first time, by Triton's own call, and keep what that compiled."""
    tensors, numbers, constants = arguments
    device = key[1]
    if _is_capturing(device):
        raise RuntimeError(
            "sync_batch_norm: expected kernels that are loaded before a CUDA graph is captured, "
            f"got the first {name} of tensors of this kind in the middle of one; run the model "
            "once before capture, forward and backward, with tensors of the same shapes and dtypes"
        )
    compiled = kernel(name)[grid](*tensors, *numbers, *constants, num_warps=warps)
    if _keeps():
        _kept[key] = compiled
    elif device >= 0:
        _kept[key] = PublicCall(name, warps)


class PublicCall:
    """Triton's own call in the form of a kept kernel, for versions that were not tried."""

    function = packed_metadata = None

    def __init__(self, name: str, warps: int) -> None:
        self.kernel, self.warps = kernel(name), warps

    def run(self, x: int, y: int, z: int, *rest: Any) -> None:
        self.kernel[(x, y, z)](*rest[6:], num_warps=self.warps)


def _is_capturing(device: int) -> bool:
    return device >= 0 and torch._C._cuda_isCurrentStreamCapturing()


def meeting_place(x: Tensor, tickets: int, slots: int) -> tuple[Tensor, Tensor]:
    """Zeros (int32), which kernels leave as zeros, and float64 memory: for one launch.

    Those of one stream follow each other and share them. A captured graph may run on any stream,
    beside others: each of its launches has its own.
    """
    device = x.get_device()
    if _is_capturing(device):
        return _new_place(x, tickets, slots)
    key = (device, torch._C._cuda_getCurrentRawStream(device) if device >= 0 else 0)
    found = _scratch.get(key)
    if found is None or found[0].numel() < tickets or found[1].numel() < slots:
        least = (1024, 8192) if found is None else (found[0].numel(), found[1].numel())
        found = _new_place(x, max(tickets, least[0]), max(slots, least[1]))
        _scratch[key] = found
    return found


def _new_place(x: Tensor, tickets: int, slots: int) -> tuple[Tensor, Tensor]:
    zeros = torch.zeros(tickets, dtype=torch.int32, device=x.device)
    return zeros, torch.empty(slots, dtype=torch.float64, device=x.device)
