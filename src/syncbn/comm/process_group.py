"""Ranks that are processes of torch.distributed: any backend, sub-groups, DeviceMesh."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from .base import Communicator

_REMEDY = (
    "pass None (the default group), a torch.distributed group that this rank belongs to, "
    "a one-dimensional DeviceMesh or a syncbn.comm.Communicator"
)


class ProcessGroup(Communicator):
    """A torch.distributed process group (gloo, nccl, ucc, mpi, …)."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def size(self) -> int:
        return self.group.size()

    def all_gather(self, tensor: Tensor) -> Tensor:
        gathered = tensor.new_empty(self.size, *tensor.shape)
        # Not all_gather_into_tensor: some backends lack it, and torch 2.13 warns of its new name.
        dist.all_gather(list(gathered.unbind(0)), tensor.contiguous(), group=self.group)
        return gathered

    def all_reduce(self, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total, group=self.group)
        return total


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
    # torch hands -100 (before 2.7: another object) to a rank that new_group() leaves out.
    if group is dist.GroupMember.NON_GROUP_MEMBER or group == dist.GroupMember.NON_GROUP_MEMBER:
        raise ValueError(_not_a_member("the group given"))
    if not isinstance(group, (dist.ProcessGroup, DeviceMesh)):
        raise TypeError(f"process_group: got {type(group).__name__}; {_REMEDY}")
    if not dist.is_initialized():
        raise ValueError(
            f"process_group: got a {type(group).__name__}, but the default process group is not "
            "initialised (or was destroyed); call torch.distributed.init_process_group first"
        )
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
    if group.rank() < 0:
        raise ValueError(_not_a_member("the group given"))
    return ProcessGroup(group)


def _not_a_member(what: str) -> str:
    return f"process_group: rank {dist.get_rank()} is not in {what}; {_REMEDY}"
