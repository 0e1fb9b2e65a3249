"""Copies of a module on several devices, which lead back to it, and the modes they run in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, TypeVar

import torch
import torch.nn as nn
from torch import Tensor

from ..tensors.storages import check_held

ModuleT = TypeVar("ModuleT", bound=nn.Module)


def place(device: torch.device) -> Callable[[], ExitStack]:
    """How another thread enters ``device`` and the modes that this thread is in."""
    grad, inference = torch.is_grad_enabled(), torch.is_inference_mode_enabled()
    casts = [
        (kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind))
        for kind in {"cpu", device.type}
    ]
    cache = torch.is_autocast_cache_enabled()
    default = torch.get_default_device()  # of new tensors
    backend = None if device.type in ("cpu", "mps") else torch.get_device_module(device)
    stream = backend.current_stream(device) if backend else None

    def enter() -> ExitStack:
        stack = ExitStack()
        if backend:
            stack.enter_context(backend.device(device))
            stack.enter_context(backend.stream(stream))
        if default.type != "cpu":  # its index is the caller's
            stack.enter_context(device if default.type == device.type else default)
        stack.enter_context(torch.inference_mode(inference))
        stack.enter_context(torch.set_grad_enabled(grad))
        for kind, dtype, enabled in casts:
            stack.enter_context(torch.autocast(kind, dtype, enabled, cache_enabled=cache))
        return stack

    return enter


def replicate(module: ModuleT, devices: Sequence[torch.device]) -> list[ModuleT]:
    """Shallow copies of ``module``, one per device, on whose tensors autograd leads back to it.

    The first one has its very buffers, the others copies of them.
    """
    if len(set(devices)) == len(devices) and "cpu" not in {device.type for device in devices}:
        return nn.parallel.replicate(module, devices, detach=not torch.is_grad_enabled())
    return [_replica(module, device, first=rank == 0) for rank, device in enumerate(devices)]


def _replica(module: ModuleT, device: torch.device, first: bool) -> ModuleT:
    copies: dict[nn.Module, Any] = {
        original: original._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        for original in module.modules()
    }
    moved: dict[int, Tensor] = {}  # tensors that modules share stay shared
    for original, replica in copies.items():
        for name, child in original._modules.items():
            replica._modules[name] = None if child is None else copies[child]
        for name, parameter in original._parameters.items():
            if parameter is None:
                replica._parameters[name] = None
            else:  # not into _parameters: some modules (RNN) must notice
                setattr(replica, name, moved.setdefault(id(parameter), parameter.to(device)))
        for name, buffer in original._buffers.items():
            if buffer is not None:
                check_held({name: buffer}, "DataParallel")
                copy = buffer.to(device, copy=not first)
                setattr(replica, name, moved.setdefault(id(buffer), copy))
    return copies[module]  # type: ignore[no-any-return]
