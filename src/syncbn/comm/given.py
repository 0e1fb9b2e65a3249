"""What users give as ``process_group``: torch.distributed's groups and meshes, as communicators."""

from __future__ import annotations

import weakref
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from .frames import Received
from .graphs import InGraph, know
from .groups import has_private, is_alive, name_in_graphs
from .headers import NOBODY, Caller
from .process_group import ProcessGroup

_AVAILABLE = dist.is_available()
_NEVER_NONE = torch.torch_version.TorchVersion(torch.__version__) < "2.12"
_REMEDY = (
    "pass None (the default group), a torch.distributed group that this rank belongs to, "
    "a one-dimensional DeviceMesh or a syncbn.comm.Communicator"
)


class _Traced(ProcessGroup):
    """A group while torch.compile traces: the graph knows it by its name.

    On a device messages are torch's own operators, which wait for no host.
    """

    rank, size = 0, 1

    def __init__(self, name: Any, rank: int, size: int) -> None:
        self.group, self.rank, self.size = name, rank, size
        self._in_graph = InGraph(name, rank, size)

    def gather(
        self, tensor: Tensor, caller: Caller, flags: int, layer: Tensor | None = None
    ) -> Received:
        if _is_opaque(tensor):
            return self._in_graph.gather(tensor, caller, flags, layer)
        return super().gather(tensor, caller, flags)

    def reduce(
        self, tensor: Tensor, caller: Caller, flags: int, layer: Tensor | None = None
    ) -> Received:
        if _is_opaque(tensor):
            return self._in_graph.reduce(tensor, caller, flags, layer)
        return super().reduce(tensor, caller, flags)

    def all_gather(self, tensor: Tensor) -> Tensor:
        return self.gather(tensor, NOBODY, 0).rows

    def _takes_frames(self, tensor: Tensor) -> bool:
        return False

    def _send(self, tensor: Tensor, operation: str) -> Tensor:
        gathered = _in_graphs.all_gather_into_tensor(tensor.contiguous(), self.size, self.group)
        rows: Tensor = _in_graphs.wait_tensor(gathered).view(self.size, *tensor.shape)
        return rows

    def _reduce(self, tensor: Tensor, operation: str) -> Tensor:
        total: Tensor = _in_graphs.wait_tensor(_in_graphs.all_reduce(tensor, "sum", self.group))
        return total


_in_graphs: Any = torch.ops._c10d_functional


def _is_opaque(tensor: Tensor) -> bool:
    """Whether a graph's message is an operator of ours, and a frame when it runs."""
    return tensor.device.type == "cpu"


def default_group() -> ProcessGroup | None:
    """The default group, or None where torch.distributed is missing or not initialised."""
    world = dist.group.WORLD if _AVAILABLE else None
    # Before torch 2.12 what torch.compile sees there is never None, even where there is no group.
    if world is None or (_NEVER_NONE and not dist.is_initialized()):
        return None
    return _Traced(*_facts(world)) if torch.compiler.is_compiling() else ProcessGroup(world)


def from_torch(group: Any) -> ProcessGroup:
    """:func:`_from_torch`, also while torch.compile traces."""
    return _Traced(*_facts(group)) if torch.compiler.is_compiling() else _from_torch(group)


def _facts(group: Any) -> tuple[str, int, int]:
    """Rank and size of a group, and its clone's name."""
    comm = _from_torch(getattr(group, "real_obj", group))  # which torch.compile has wrapped
    if not has_private(comm.group):
        comm.meet("torch.compile")  # ranks that compile nothing wait there before they make it
    name, found = name_in_graphs(comm.group), weakref.ref(comm.group)

    def find() -> ProcessGroup | None:
        group = found()
        return ProcessGroup(group) if group is not None and is_alive(group) else None

    know(name, find)
    return name, comm.rank, comm.size


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


def _not_a_member(operation: str) -> str:
    return f"process_group: rank {dist.get_rank()} is not in {operation}; {_REMEDY}"


def refuse_join(
    operation: str = "sync_batch_norm", around: str = "a synchronised layer", ddp: Any = None
) -> None:
    """Refuse to communicate in DistributedDataParallel's ``join()``.

    A rank that has joined stands in for DDP's collectives alone: a layer's would meet them, or
    wait for ever. ddp: the one whose ``join()`` it would be; None for the one whose forward runs.
    """
    if ddp is None:
        ddp = getattr(DistributedDataParallel, "_active_ddp_module", None)
    config = getattr(ddp, "_join_config", None)
    if config is not None and config.enable and not config.throw_on_early_termination:
        raise RuntimeError(
            f"{operation}: expected no DistributedDataParallel.join() around {around}, got one on "
            f"rank {dist.get_rank()}: ranks that have joined take no part in its statistics, and "
            "the others would wait for them; iterate over syncbn.until_all_done(loader) instead, "
            "or pass throw_on_early_termination=True to join(). DistributedDataParallel stays in "
            "join()'s mode afterwards: wrap the model anew"
        )
