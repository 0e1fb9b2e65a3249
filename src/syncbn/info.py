"""What `syncbn info` shows: versions, devices, engines of communication, kernels and memory."""

from __future__ import annotations

import ctypes
import json
import os
import sys
from pathlib import Path

import torch

from . import library
from .comm.memory import unavailable
from .comm.process_group import EXCHANGES
from .kernels import describe, native
from .versions import versions

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")  # "always [madvise] never"
STATUS = Path("/proc/self/status")
UNKNOWN = "unknown"
VARIABLE = "THP_MEM_ALLOC_ENABLE"  # torch's own


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
        "memory": huge_pages(),
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


def huge_pages() -> dict[str, str]:
    """Huge pages for the CPU: who gets them, and what torch's variable would bring."""
    setting, words = _setting()
    ours = "get none"
    torchs = (
        "with 1, none of torch's CPU tensors gains by it, and those of some MiB may take longer"
    )
    if sys.platform != "linux":
        torchs = "which changes nothing here"
    elif setting == "always":
        ours = "get them, as all large memory does"
    elif setting in ("madvise", UNKNOWN):
        least = _least_for_huge_pages()
        ours = f"of {least >> 20} MiB and more ask for them" if least else "do not ask for them"
        torchs = (
            "with 1, torch asks for all its CPU tensors of 2 MiB and more: other layers take less "
            "time where results are large, but may take more where they are of some MiB"
        )
    value = os.environ.get(VARIABLE)
    said = "not set" if value is None else f"set to {value!r}"
    return {"huge pages": words, "results of syncbn": ours, VARIABLE: f"{said}; {torchs}"}


def _setting() -> tuple[str, str]:
    """The system's setting, or nothing where there can be no huge pages; and in words."""
    if sys.platform != "linux":
        return "", f"none: the system is {sys.platform}, and only Linux can be asked for them"
    own = SETTING.parent / "hugepages-2048kB" / SETTING.name  # of this size, since Linux 6.8
    try:
        inherits = not own.exists() or _chosen(own) == "inherit"
        where = SETTING if inherits else own
        setting = _chosen(where)
    except FileNotFoundError:
        return "", f"none: this kernel has no {SETTING}"
    except OSError as error:  # as where a sandbox hides it
        return UNKNOWN, f"unknown: cannot read {SETTING} ({error.strerror})"
    if _switched_off():
        return "", "none: they are switched off for this process"
    words = {"always": "for all large memory", "madvise": "for memory that asks for them"}
    if setting not in words:
        return "", f"none: {where} says {setting}"
    return setting, f"{words[setting]} ({setting})"


def _chosen(setting: Path) -> str:
    """The word in brackets."""
    return setting.read_text().partition("[")[2].partition("]")[0]


def _switched_off() -> bool:
    """Whether this process gets none, as far as the kernel says so."""
    try:
        return b"THP_enabled:\t0" in STATUS.read_bytes()  # its name may be any bytes
    except OSError:
        return False


def _least_for_huge_pages() -> int:
    """The bytes from which results of the kernels that serve the CPU ask; 0 where none does."""
    if not describe()["cpu"].startswith(native.NAME):
        return 0
    size = ctypes.CDLL(str(library.LIBRARY)).syncbn_least_for_huge_pages
    size.restype = ctypes.c_int64
    return int(size())
