"""Ranks that are processes of torch.distributed: any backend, sub-groups, DeviceMesh."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .base import Communicator

_REMEDY = (
    "pass None (the default group), a torch.distributed group that this rank belongs to, "
    "a one-dimensional DeviceMesh or a syncbn.comm.Communicator"
)


class ProcessGroup(Communicator):
    """A torch.distributed process group (gloo, nccl, ucc, mpi, …).

    A small message's time on the CPU is its rounds: gloo's all_gather passes it on from rank to
    rank, its all_reduce does so twice. Up to ``few`` ranks each sends to each at once, one round
    (benchmarks/collectives.py).
    """

    few = 8

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

    def all_gather(self, tensor: Tensor) -> Tensor:
        if self._direct(tensor):
            copies = tensor.expand(self.size, *tensor.shape).contiguous()
            gathered = torch.empty_like(copies)
            dist.all_to_all_single(gathered, copies, group=self.group)
        else:
            gathered = tensor.new_empty(self.size, *tensor.shape)
            # Not all_gather_into_tensor: some backends lack it, torch 2.13 warns of its new name.
            dist.all_gather(list(gathered.unbind(0)), tensor.contiguous(), group=self.group)
        return gathered

    def all_reduce(self, tensor: Tensor) -> Tensor:
        if self._direct(tensor):
            return self.all_gather(tensor).sum(0)
        total = tensor.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def _direct(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu" and self.size <= self.few


def default_group() -> ProcessGroup | None:
    """The default group, or None where torch.distributed is missing or not initialised."""
    if dist.is_available() and dist.is_initialized():
        world = dist.group.WORLD
        return None if world is None else ProcessGroup(world)
    return None


def from_torch(group: Any) -> ProcessGroup:
    """The communicator over a torch.distributed group or a one-dimensional DeviceMesh.

    Raises:
        TypeError: ``group`` is neither.
        ValueError: torch.distributed is not initialised, this rank is not in the group, or the
            mesh has more than one dimension.
    """
    if not dist.is_available():
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
    return ProcessGroup(group)


def _not_a_member(what: str) -> str:
    return f"process_group: rank {dist.get_rank()} is not in {what}; {_REMEDY}"
