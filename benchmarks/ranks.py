"""How the benchmarks start ranks, and a group whose messages take gloo's way."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import syncbn
from syncbn.launch import Worker, launch


def group_over_gloo() -> dist.ProcessGroup:
    """A group of all ranks whose layers exchange through gloo, though memory be there."""
    group = dist.new_group()
    with mock.patch.dict(os.environ, {"SYNCBN_EXCHANGE": "torch"}):
        syncbn.comm.resolve(group).all_gather(torch.zeros(1))  # when it is chosen
    return group


def join_gloo(rank: int, ranks: int, folder: Path) -> None:
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=ranks)


def run_ranks(worker: Worker, task: Any, ranks: int) -> Any:
    """What ``worker(rank, task, folder, send)`` returns on rank 0."""
    return launch(worker, task, ranks=ranks, on_message=print)
