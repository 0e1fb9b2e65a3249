"""The floor of cpu.py: plain two-pass loops in C++ (cpu_floor.cpp), compiled when they are needed.

The first pass adds up two sums per channel, in float32; the second writes the output or the
gradient. Planes are taken channel by channel, so that the second pass finds them in the cache.
One thread, float32. Outputs are new tensors for every call, as the layers', and a large one asks
for huge pages by the layers' own csrc/plan/huge_pages.h.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp-simd", "-shared", "-fPIC")
_HERE = Path(__file__).parent


class NoFloorError(Exception):
    """Why there are no loops."""


def compiler() -> str:
    """$CXX, or the first C++ compiler that is here."""
    names = (os.environ.get("CXX", ""), "c++", "g++", "clang++")
    found = next((name for name in names if name and shutil.which(name)), None)
    if found is None:
        raise NoFloorError("no column of floors, which needs a C++ compiler: expected c++ or $CXX")
    return found


def load() -> ctypes.CDLL:
    """The compiled loops."""
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder, "floor.so")
        places = (f"-I{_HERE.parent / 'csrc'}", str(_HERE / "cpu_floor.cpp"), "-o", str(library))
        done = subprocess.run(
            [compiler(), *FLAGS, *places], capture_output=True, text=True, check=False
        )
        if done.returncode:
            raise NoFloorError(f"no column of floors, which does not compile here:\n{done.stderr}")
        return ctypes.CDLL(str(library))


def passes(loops: ctypes.CDLL, x: Tensor, dy: Tensor) -> tuple[Callable[[], Any], ...]:
    """Forward of x without parameters, and backward of dy; each returns its new tensor.

    x is float32, contiguous or as channels_last lies in memory.
    """
    channels = x.size(1)
    rows = x.dim() == 2 or not x.is_contiguous()
    inner = x[0, 0].numel()
    sizes = (x.size(0) * inner, channels) if rows else (x.size(0), channels, inner)
    kind, counts = ("rows" if rows else "planes"), tuple(map(ctypes.c_int64, sizes))
    saved = torch.empty(2, channels)
    kept: list[Tensor] = []  # what a layer's step keeps: y until backward, dx until the next one

    def call(name: str, *tensors: Tensor) -> None:
        pointers = (ctypes.c_void_p(each.data_ptr()) for each in tensors)
        getattr(loops, f"{name}_{kind}")(*pointers, *counts)

    def forward() -> Tensor:
        y = torch.empty_like(x)
        call("forward", x, y, saved)
        kept.append(y)
        return y

    def backward() -> Tensor:
        kept[:-1] = []
        dx = torch.empty_like(x)
        call("backward", dy, x, dx, saved)
        kept[:] = [dx]
        return dx

    return forward, backward
