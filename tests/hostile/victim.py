"""What each rank runs while faults.py looks: a small network, of which one rank meets a fault.

Variables: FAULT, VICTIM, MOMENT (forward, backward, between, first) and torchrun's.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import signal
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

import syncbn

STEPS, LATER = 6, 3  # how many there are, and in which of them it happens


class Meets(torch.autograd.Function):
    """Meets a fault on its way forward, or back."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, now: str) -> torch.Tensor:
        ctx.now = now
        if now == "forward":
            meet()
        return x.clone()

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, None]:
        if ctx.now == "backward":
            meet()
        return dy, None


def meet() -> None:
    fault = os.environ["FAULT"]
    print("meets", flush=True)
    if fault == "raise":
        raise ArithmeticError("the fault")
    if fault == "refuse":
        syncbn.sync_batch_norm(torch.ones(3, dtype=torch.long), None, None)
    if fault == "segfault":
        ctypes.string_at(0)
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    if fault == "leave":
        sys.exit(0)
    if fault == "ctrl-c":
        os.kill(os.getpid(), signal.SIGINT)
    if fault == "cut":
        os.system(os.environ["CUT"])


def main() -> None:
    faulthandler.dump_traceback_later(30, exit=False)  # of one that hangs, where
    signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, victim = dist.get_rank(), int(os.environ["VICTIM"])
    moment, last = os.environ["MOMENT"], 0.0
    torch.manual_seed(0)
    first = syncbn.SyncBatchNorm1d(4)
    second = syncbn.SyncBatchNorm1d(4)
    between = nn.Linear(4, 4)
    model = nn.ModuleList((first, between, second))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with syncbn.timeout(float(os.environ.get("PATIENCE", "8"))):
        for step in range(STEPS):
            happens = rank == victim and step == (0 if moment == "first" else LATER)
            now = ("forward" if moment == "first" else moment) if happens else ""
            if now == "between":
                meet()
            x = torch.randn(3 + rank, 4, generator=torch.Generator().manual_seed(step))
            optimizer.zero_grad()
            y = second(Meets.apply(between(first(x)), now))
            (y.square() * torch.arange(4)).sum().backward()
            optimizer.step()
            last = float(y.detach().sum())
    print(f"ended well {time.monotonic():.1f} {first.running_mean.tolist()} {last:.6g}", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
