"""What `syncbn info` shows: versions, devices, engines of communication and kernels."""

from __future__ import annotations

import json
import os

import torch

from .comm.memory import unavailable
from .comm.process_group import EXCHANGES
from .kernels import describe
from .versions import versions


def show(*, as_json: bool) -> None:
    """Print :func:`facts`, as a table or as one JSON object."""
    found = facts()
    if as_json:
        print(json.dumps(found, indent=2))
        return
    width = max(map(len, found)) + 2
    for subject, content in found.items():
        for name, value in content.items():
            print(f"{subject:{width}}{name}: {value}")
            subject = ""


def facts() -> dict[str, dict[str, str]]:
    """What is known of each subject, by name."""
    devices = {
        "cpu": f"{torch.get_num_threads()} threads, {torch.backends.cpu.get_cpu_capability()}"
    }
    for index in range(torch.cuda.device_count()):
        devices[f"cuda:{index}"] = torch.cuda.get_device_name(index)
    if torch.backends.mps.is_available():
        devices["mps"] = "available"
    return {
        "versions": versions(),
        "devices": devices,
        "engines": _engines(),
        "kernels": describe(),
    }


def _engines() -> dict[str, str]:
    """The backends of torch.distributed in this build of torch, and shared memory."""
    import torch.distributed as dist

    if not dist.is_available():
        return {"torch.distributed": "missing from this build of torch"}
    checks = {
        "gloo": dist.is_gloo_available,
        "nccl": dist.is_nccl_available,
        "ucc": dist.is_ucc_available,
        "mpi": dist.is_mpi_available,
    }
    found = {name: "found" if check() else "not in this torch" for name, check in checks.items()}
    return found | {"shared memory": unavailable() or "found", "CPU exchange": _exchange()}


def _exchange() -> str:
    """How CPU tensors of a gloo group travel, as far as one process knows."""
    told = os.environ.get("SYNCBN_EXCHANGE", "")
    if told and told not in EXCHANGES:
        return f"SYNCBN_EXCHANGE is {told!r}, which is none of {', '.join(EXCHANGES)}"
    if told:
        return f"{told}, for SYNCBN_EXCHANGE says so"
    if why := unavailable():
        return f"torch, for {why}"
    return "shared_memory among processes of one host that can share it, else torch"
