"""Ranks that are processes of torch.distributed: any backend, sub-groups, DeviceMesh."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from .base import Communicator
from .groups import is_alive, name_in_graphs, private

_AVAILABLE = dist.is_available()
_REMEDY = (
    "pass None (the default group), a torch.distributed group that this rank belongs to, "
    "a one-dimensional DeviceMesh or a syncbn.comm.Communicator"
)


class ProcessGroup(Communicator):
    """The ranks of a torch.distributed process group (gloo, nccl, ucc, mpi, …).

    Messages travel on a clone of the group, which its ranks make at their first collective: see
    groups.py.

    A small message's time on the CPU is its rounds: gloo's all_gather passes it on from rank to
    rank, its all_reduce does so twice. Up to ``direct_exchange_max_size`` ranks each sends to each
    at once, one round (benchmarks/collectives.py).
    """

    direct_exchange_max_size = 8

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ProcessGroup) and other.group is self.group

    def __hash__(self) -> int:
        return hash(self.group)

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def size(self) -> int:
        return self.group.size()

    @property
    def device(self) -> torch.device:
        """Where this group takes tensors that belong to no device yet: the CPU if it can."""
        devices = self.group._device_types
        cpu = torch.device("cpu")
        return cpu if cpu in devices else devices[0]

    def all_gather(self, tensor: Tensor) -> Tensor:
        if self._direct(tensor):
            copies = tensor.expand(self.size, *tensor.shape).contiguous()
            gathered = torch.empty_like(copies)
            self._run("all_gather", dist.all_to_all_single, gathered, copies)
        else:
            gathered = tensor.new_empty(self.size, *tensor.shape)
            # Not all_gather_into_tensor: some backends lack it, torch 2.13 warns of its new name.
            rows = list(gathered.unbind(0))
            self._run("all_gather", dist.all_gather, rows, tensor.contiguous())
        return gathered

    def all_reduce(self, tensor: Tensor) -> Tensor:
        if self._direct(tensor):
            return self.all_gather(tensor).sum(0)
        total = tensor.clone()
        self._run("all_reduce", dist.all_reduce, total)
        return total

    def _run(self, operation: str, collective: Callable[..., Any], *tensors: Any) -> None:
        """``collective(*tensors)`` in this group's private clone."""
        if torch.compiler.is_compiling():
            collective(*tensors, group=self.group)
            return
        waiting = True  # for other ranks: their absence may be the cause of an error
        try:
            group = private(self.group)
            waiting = False
            if tensors[-1].device.type == "cpu" or dist.get_backend(group) == "gloo":
                work = collective(*tensors, group=group, async_op=True)
                waiting = True
                work.wait()
            else:  # asynchronous, NCCL's would take a stream of their own
                collective(*tensors, group=group)
        except RuntimeError as error:
            raise type(error)(self._failure(operation, error, waiting)) from error

    def _failure(self, operation: str, error: RuntimeError, waiting: bool) -> str:
        """The backends' errors name neither operation nor ranks."""
        where = f"rank {self.rank} of {self.size} ({dist.get_backend(self.group)}): {error}"
        if not waiting and not isinstance(error, dist.DistError):
            return f"ProcessGroup: {operation} could not be sent on {where}"
        return (
            f"ProcessGroup: {operation} failed on {where}; another rank has ended, is late by "
            "the group's timeout, or makes other calls: see its error, and where loaders "
            "differ in length iterate over syncbn.until_all_done(loader)"
        )

    def _direct(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu" and self.size <= self.direct_exchange_max_size


class _Traced(ProcessGroup):
    """A group while torch.compile traces: the graph knows it by its name."""

    rank, size = 0, 1

    def __init__(self, name: Any, rank: int, size: int) -> None:
        self.group, self.rank, self.size = name, rank, size


def default_group() -> ProcessGroup | None:
    """The default group, or None where torch.distributed is missing or not initialised."""
    world = dist.group.WORLD if _AVAILABLE else None
    if world is None:
        return None
    return _Traced(*_facts(world)) if torch.compiler.is_compiling() else ProcessGroup(world)


def from_torch(group: Any) -> ProcessGroup:
    """:func:`_from_torch`, also while torch.compile traces."""
    return _Traced(*_facts(group)) if torch.compiler.is_compiling() else _from_torch(group)


def _facts(group: Any) -> tuple[str, int, int]:
    """Rank and size of a group, and its clone's name."""
    comm = _from_torch(getattr(group, "real_obj", group))  # which torch.compile has wrapped
    return name_in_graphs(comm.group), comm.rank, comm.size


# torch.compile calls it while it traces and traces anew for another group: of one that is used by
# what it traces, it would guard no more than the type. See kernels/__init__.py.
_facts._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _from_torch(group: Any) -> ProcessGroup:
    """The communicator over a torch.distributed group or a one-dimensional DeviceMesh.

    Raises:
        TypeError: ``group`` is neither.
        ValueError: torch.distributed is not initialised, this rank is not in the group, or the
            mesh has more than one dimension.
    """
    if not _AVAILABLE:
        raise ValueError(
            f"process_group: got {group!r}, but this build of torch has no torch.distributed; "
            "pass None or a syncbn.comm.Communicator"
        )
    # What new_group() hands to a rank that it leaves out is a number (-100).
    left_out = isinstance(group, int) and group == dist.GroupMember.NON_GROUP_MEMBER
    if not left_out and not isinstance(group, (dist.ProcessGroup, DeviceMesh)):
        raise TypeError(f"process_group: got {type(group).__name__}; {_REMEDY}")
    if not dist.is_initialized():
        raise ValueError(
            "process_group: got a torch.distributed group, but the default group is not "
            "initialised (or was destroyed); call torch.distributed.init_process_group first"
        )
    if left_out:
        raise ValueError(_not_a_member("the group given"))
    if isinstance(group, DeviceMesh):
        if group.ndim != 1:
            raise ValueError(
                f"process_group: expected a one-dimensional DeviceMesh, got {group.ndim} "
                f"dimensions {group.mesh_dim_names or tuple(group.shape)}; pick one, for example "
                "mesh['dp']"
            )
        if group.get_coordinate() is None:
            raise ValueError(_not_a_member("the DeviceMesh given"))
        group = group.get_group()
    if not is_alive(group):
        raise ValueError(
            f"process_group: got a torch.distributed group of {group.size()} ranks that was "
            "destroyed; make it anew after torch.distributed.init_process_group, and set it as "
            "layer.process_group"
        )
    return ProcessGroup(group)


def _not_a_member(what: str) -> str:
    return f"process_group: rank {dist.get_rank()} is not in {what}; {_REMEDY}"


def refuse_join() -> None:
    """Refuse to communicate in DistributedDataParallel's ``join()``.

    A rank that has joined stands in for DDP's collectives alone: a layer's would meet them, or
    wait for ever.
    """
    ddp = getattr(DistributedDataParallel, "_active_ddp_module", None)
    config = getattr(ddp, "_join_config", None)
    if config is not None and config.enable and not config.throw_on_early_termination:
        raise RuntimeError(
            "sync_batch_norm: expected no DistributedDataParallel.join() around a synchronised "
            f"layer, got one on rank {dist.get_rank()}: ranks that have joined take no part in "
            "the layer's statistics, and the others would wait for them; iterate over "
            "syncbn.until_all_done(loader) instead, or pass throw_on_early_termination=True to "
            "join(). DistributedDataParallel stays in join()'s mode afterwards: wrap the model anew"
        )
