"""DataParallel: replicas of one module in one process that normalise their batches together."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import torch
import torch.nn as nn
from torch.nn.parameter import is_lazy

from ..batches.empty import forget_original
from ..batches.scatter import gather, scatter
from ..comm import LOCAL, Replica, ReplicaGroup, resolve
from ..layers.modules import SyncBatchNorm
from ..tensors.transforms import exporting, transforming
from .replicate import place, replicate

ModuleT = TypeVar("ModuleT", bound=nn.Module)
Device = int | str | torch.device
_TRACED = "DataParallel: torch.jit.trace and torch.export cannot follow replicas; use .module"


class DataParallel(nn.DataParallel[ModuleT]):
    """Run a module on several devices of one process as if one device held the whole batch.

    Each forward splits the batch over replicas of ``module``, runs them, and concatenates their
    outputs on the first device. Every syncbn layer normalises over all replicas: outputs, gradients
    of any order and running statistics are those of one device. Gradients land in the parameters of
    ``module``, running statistics in its buffers, once per forward. Plain BatchNorm layers are left
    as they are; :func:`syncbn.convert` them. In one of several ranks, the replicas of all ranks are
    one batch, and torch.nn.parallel.DistributedDataParallel around this averages gradients; with
    one device per process that is the faster one, too.

    In threads that a replica starts, a function or an unregistered layer doesn't know the other
    replicas. Put activation checkpointing around the whole,
    ``checkpoint(parallel, x, use_reentrant=True)``: the other form saves no memory there.

    A torch.nn.DataParallel to whoever asks: ``.module``, state dict keys and the semantics of
    inputs, hooks and module attributes (those set in forward are lost) are the same.

    Args:
        module: its parameters and buffers on ``devices[0]``.
        devices: torch devices, their names or CUDA indices, repeated ones among them; None for all
            CUDA devices, or the CPU where there is none. Replicas on a repeated device run in
            turns, so that random numbers are reproducible.

    Inputs:
        Tensors (N, *), split along dimension 0 as evenly as possible, in any nesting of tuples,
        lists, mappings and dataclasses, positional or by keyword. All else, tensors () included,
        goes to every replica. A batch of fewer than ``len(devices)`` samples uses fewer replicas.

    Outputs:
        The same nesting that the replicas return; tensors () become a vector, one per replica;
        other values must be equal.

    Raises:
        TypeError, ValueError: no module, no devices; nested tensors or packed sequences for
            several devices; outputs that differ in structure; a layer that is ``reproducible``.
        RuntimeError: parameters elsewhere or uninitialised; replicas that do not run the same
            synchronised layers in the same order; activation checkpointing inside a replica. What
            one raises names it, and keeps its traceback, and its type if that takes one message.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.DataParallel.html;
    https://github.com/vacancy/Synchronized-BatchNorm-PyTorch

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 3), syncbn.SyncBatchNorm1d(3))
        >>> model = syncbn.DataParallel(model, devices=["cpu", "cpu"])
        >>> y = model(torch.randn(5, 4))
        >>> bool(y.mean(0).abs().max() < 1e-6)
        True
    """

    def __init__(self, module: ModuleT, devices: Sequence[Device] | None = None) -> None:
        nn.Module.__init__(self)
        if not isinstance(module, nn.Module):
            raise TypeError(
                f"DataParallel: expected a torch.nn.Module, got {type(module).__name__}"
            )
        if devices is None:
            devices = list(range(torch.cuda.device_count())) or ["cpu"]
        if isinstance(devices, (str, int, torch.device)) or not len(devices):
            raise ValueError(
                f"DataParallel: expected a list of one device or more, got {devices!r}; "
                "for example ['cuda:0', 'cuda:1'], or None for all CUDA devices"
            )
        self.module = module
        self.dim = 0
        places: list[Any] = [_device(device) for device in devices]  # torch's class has indices
        self.device_ids = places
        self.output_device = self.src_device_obj = places[0]
        if len(devices) == 1:
            module.to(self.src_device_obj)

    @property
    def devices(self) -> list[torch.device]:
        """Where the replicas run; empty for a converted torch.nn.DataParallel without devices."""
        return [self._device_of(device) for device in self.device_ids]

    def forward(self, *inputs: Any, **kwargs: Any) -> Any:
        devices = self.devices
        if not devices:
            return self.module(*inputs, **kwargs)
        if len(devices) > 1 and (torch.jit.is_tracing() or exporting()):  # type: ignore[attr-defined, no-untyped-call]
            raise RuntimeError(_TRACED)
        over_ranks = _check(self.module, devices[0])
        # Threads are in no transform of torch.func. Without input there is nothing to do in them.
        used = devices if (inputs or kwargs) and not transforming() else devices[:1]
        shares = scatter((inputs, kwargs), used, self.dim)
        # A rank with one share must do, and refuse, what the others do with more.
        if len(shares) == 1 and not (over_ranks and len(used) > 1):
            args, keywords = shares[0]
            outputs = [self.module(*args, **keywords)]
        else:
            outputs = _run(self.module, devices[: len(shares)], shares)
        output = self._device_of(self.output_device)
        return outputs[0] if len(devices) == 1 else gather(outputs, output, self.dim)

    def extra_repr(self) -> str:
        return f"devices={[str(device) for device in self.devices]}"

    def _device_of(self, device: Any) -> torch.device:
        # torch.nn.DataParallel, which may have been converted into this, keeps indices.
        return torch.device(self.src_device_obj.type, device) if isinstance(device, int) else device


def _device(device: Device) -> torch.device:
    """With an index where the device has any, as tensors on it say."""
    found = torch.device("cuda", device) if isinstance(device, int) else torch.device(device)
    if found.type == "cpu":
        return torch.device("cpu")
    if found.index is None:
        return torch.device(found.type, torch.accelerator.current_device_index())
    return found


def _check(module: nn.Module, device: torch.device) -> bool:
    """Whether replicas in other processes take part in a training step."""
    over_ranks = resolve(None).size > 1
    for tensor in chain(module.parameters(), module.buffers()):
        if is_lazy(tensor):
            raise RuntimeError(
                "DataParallel: expected initialised parameters, got a lazy module that has not "
                "seen its first input; run a batch through .module first"
            )
        if tensor.device != device:
            raise RuntimeError(
                "DataParallel: module must have its parameters and buffers on device "
                f"{device} (devices[0]) but found one of them on device: {tensor.device}; "
                f"move it with module.to({str(device)!r})"
            )
    for name, layer in module.named_modules():
        if type(layer).__name__ == "OptimizedModule":  # a copy would write into its original
            raise RuntimeError(
                f"DataParallel: expected modules that can be copied, got {name or 'the module'} "
                "wrapped by torch.compile(); give DataParallel the module itself"
            )
        if isinstance(layer, SyncBatchNorm) and layer.training:
            comm = resolve(layer.process_group)
            over_ranks = over_ranks or comm.size > 1
            if isinstance(comm, Replica):
                raise RuntimeError(
                    "DataParallel: expected no DataParallel inside another, got one with the layer "
                    f"{name!r} in a replica of {comm.size}; list all devices in the outer one"
                )
    return over_ranks


def _run(
    module: ModuleT, devices: Sequence[torch.device], shares: Sequence[tuple[Any, Any]]
) -> list[Any]:
    """The outputs of replicas of ``module`` on ``devices``, given one's share each."""
    names = [f"replica {rank} on device {device}" for rank, device in enumerate(devices)]
    group = ReplicaGroup(names, in_turns=len(set(devices)) < len(devices))
    replicas = replicate(module, devices)
    outer = {
        name: resolve(layer.process_group if layer.training else LOCAL)
        for name, layer in module.named_modules()
        if isinstance(layer, SyncBatchNorm)
    }
    for rank, replica in enumerate(replicas):
        for name, layer in replica.named_modules():
            forget_original(layer)
            if isinstance(layer, SyncBatchNorm):
                where = f"layer {name!r}" if name else "module"
                layer.process_group = Replica(group, rank, where, outer[name])
    places = [place(device) for device in devices]

    def forward(rank: int) -> Any:
        with places[rank]():
            args, keywords = shares[rank]
            return replicas[rank](*args, **keywords)

    return group.run([partial(forward, rank) for rank in range(len(devices))])
