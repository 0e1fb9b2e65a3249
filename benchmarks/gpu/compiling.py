"""Compiles all kernels that the cases need in several processes; Triton keeps what they compile."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from syncbn.launch import launch

from .calls import Case, make_batch, our_steps, our_whole
from .machine import Machine, kernels_of
from .sections import Result, Skipped

_MOST_PROCESSES = 12


def compile_all(machine: Machine, cases: Sequence[Case]) -> Result:
    if kernels_of(machine) != "triton":
        raise Skipped(f"{kernels_of(machine)} kernels are not compiled when first used")
    if not machine.is_gpu:
        raise Skipped("Triton's interpreter compiles nothing")
    count = max(1, min(_MOST_PROCESSES, (os.cpu_count() or 1) - 1))
    kinds = dict.fromkeys(replace(case, ratio=0.0) for case in cases)
    task = (str(machine.device), list(kinds), count)
    launch(_compile_share, task, ranks=count, on_message=lambda message: None)
    return Result(f"kernels for {len(task[1])} tensors in {count} processes")


def _compile_share(
    rank: int, task: tuple[str, list[Case], int], folder: Path, send: Callable[[Any], None]
) -> None:
    device, cases, count = task
    for case in cases[rank::count]:
        batch = make_batch(case, torch.device(device))
        for call in (our_steps(batch) | our_whole(batch)).values():
            call()
    torch.cuda.synchronize()
