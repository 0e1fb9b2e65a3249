"""One layer in one process: the tensors of cpu.py and cpu_compilers.py, and rows of figures."""

from __future__ import annotations

import statistics
from ctypes import CDLL
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

import cpu_floor
import syncbn
from syncbn.diagnose.bench.measure import passes
from syncbn.diagnose.bench.options import LAYOUTS, SHAPES
from syncbn.diagnose.bench.timing import in_turns, summary

SMALL = ((32, 256), (256, 64), (16, 128, 500), (1, 16, 256, 256), (1, 3, 512, 512))
LARGE_SHAPES = ((16, 64, 112, 112), (32, 64, 112, 112))  # of 49 and 98 MiB in float32
PASSES = ("forward", "backward")


@dataclass(frozen=True)
class Case:
    """A tensor to normalise."""

    shape: tuple[int, ...]
    dtype: str
    layout: str


CASES = (
    *(Case(shape, "float32", "contiguous") for shape in (*SHAPES, *SMALL)),
    *(Case(shape, "float32", "channels_last") for shape in SHAPES),
    *(Case(shape, "bfloat16", "contiguous") for shape in SHAPES[:3]),
    *(Case(shape, "bfloat16", "channels_last") for shape in SHAPES[:3]),
)
# Results are fresh mappings; the loops on them are those on the tensors above.
LARGE = tuple(
    Case(shape, "float32", layout)
    for layout in ("contiguous", "channels_last")
    for shape in LARGE_SHAPES
)
BY_KIND = sorted(
    (*CASES, *LARGE), key=lambda case: (case.dtype != "float32", case.layout != "contiguous")
)
TOYS = (Case((2, 3, 4, 5), "bfloat16", "channels_last"), Case((4, 3), "float32", "contiguous"))


def measure(case: Case, *, threads: int, rounds: int, floor: CDLL | None) -> list[dict[str, Any]]:
    """A row per pass. Small tensors get ten times the rounds; the first two rounds warm up."""
    torch.set_num_threads(threads)
    x = torch.randn(case.shape, dtype=getattr(torch, case.dtype))
    x = x.contiguous(memory_format=LAYOUTS[case.layout])
    dy, y_reused = torch.randn_like(x), torch.empty_like(x)
    channels = case.shape[1]
    peer = nn.BatchNorm2d(channels) if x.dim() == 4 else nn.BatchNorm1d(channels)
    layers = {"syncbn": syncbn.SyncBatchNorm(channels), "torch": peer}
    steps = {name: passes(layer, x, dy) for name, layer in layers.items()}
    steps["copy"] = (lambda: y_reused.copy_(x),)
    if floor and threads == 1 and case.dtype == "float32":
        steps["floor"] = cpu_floor.passes(floor, x, dy)
    times = in_turns(steps, rounds if x.numel() > 1e5 else 10 * rounds)
    copy_us = statistics.median(copy for (copy,) in times["copy"]) * 1e6
    tensor = {"shape": case.shape, "dtype": case.dtype, "layout": case.layout, "threads": threads}
    rows = []
    for part, pass_ in enumerate(PASSES):
        taken = {name: [each[part] for each in times[name]] for name in times if name != "copy"}
        ours, theirs = taken["syncbn"], taken["torch"]
        us = {"syncbn_us": middle(ours, 1e3), "torch_us": middle(theirs, 1e3)}
        ratios = {"ratio": summary(theirs, ours)[2]}
        ratios |= {f"{key[:-3]}_copies": value[0] / copy_us for key, value in us.items()}
        if "floor" in taken:
            ratios["over_floor"] = summary(ours, taken["floor"])[2]
        rows.append(tensor | {"pass": pass_} | us | ratios)
    return rows


def middle(times: list[float], scale: float = 1) -> tuple[float, ...]:
    """Median and half the interquartile distance; in milliseconds, or scale times as many."""
    return tuple(scale * value for value in summary(times, times)[:2])
