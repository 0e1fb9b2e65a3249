"""Where the checks run: a GPU, or in a rehearsal the CPU."""

from __future__ import annotations

import platform
import statistics
from dataclasses import dataclass
from typing import Any

import torch

import syncbn
from syncbn.kernels import select_kernels, triton
from timing import device_times

GIGABYTE = 1e9
_COPIED = 2**30  # bytes


@dataclass(frozen=True)
class Machine:
    """toy: whether tiny tensors and few rounds will do."""

    device: torch.device
    toy: bool

    @property
    def is_gpu(self) -> bool:
        return self.device.type == "cuda"

    def memory(self) -> int:
        """Bytes of memory that are free on the device; none on the CPU."""
        return torch.cuda.mem_get_info(self.device)[0] if self.is_gpu else 0


def find_machine(toy: bool) -> Machine:
    """The current GPU, or the CPU where there is none."""
    if not torch.cuda.is_available():
        return Machine(torch.device("cpu"), True)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    return Machine(torch.device("cuda", torch.cuda.current_device()), toy)


def kernels_of(machine: Machine) -> str:
    """The name of the kernels that train tensors here."""
    return select_kernels(torch.empty(2, 2, device=machine.device)).steps.NAME


def environment(machine: Machine) -> dict[str, Any]:
    """Versions, and what the device is."""
    found = {
        "device": platform.machine(),
        "torch": torch.__version__,
        "syncbn": syncbn.__version__,
        "python": platform.python_version(),
        "kernels": kernels_of(machine),
        "triton": triton.unavailable() or triton.describe(),
    }
    if not machine.is_gpu:
        return found
    properties = torch.cuda.get_device_properties(machine.device)
    return found | {
        "device": properties.name,
        "multiprocessors": properties.multi_processor_count,
        "cache_bytes": cache_of(machine),
        "memory_bytes": properties.total_memory,
        "cuda": torch.version.cuda or torch.version.hip,
        "cudnn": torch.backends.cudnn.version(),
    }


def cache_of(machine: Machine) -> int:
    """Bytes of the device's second cache, as far as torch knows."""
    if not machine.is_gpu:
        return 0
    return int(getattr(torch.cuda.get_device_properties(machine.device), "L2_cache_size", 0))


def copy_bandwidth(machine: Machine) -> float:
    """Bytes read and written per second where a large tensor is copied."""
    source = torch.empty(2**16 if machine.toy else _COPIED, dtype=torch.uint8)
    source = source.to(machine.device)
    target = torch.empty_like(source)
    times = device_times({"copy": lambda: target.copy_(source)}, 10, machine.device)["copy"]
    return 2 * source.numel() / statistics.median(times)
