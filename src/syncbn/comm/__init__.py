"""Who takes part in a layer's statistics, and how numbers travel between them."""

from __future__ import annotations

from typing import Any

from .base import Communicator, Local
from .mpi import MPI
from .process_group import ProcessGroup, default_group, from_torch, refuse_join, subgroups
from .replicas import Crew, Replica, Unplaced, current_replica
from .threads import Threads, threads

__all__ = [
    "LOCAL",
    "MPI",
    "Communicator",
    "Crew",
    "Local",
    "ProcessGroup",
    "Replica",
    "Threads",
    "Unplaced",
    "default_group",
    "refuse_join",
    "resolve",
    "subgroups",
    "threads",
]

LOCAL = Local()


def resolve(process_group: Any) -> Communicator:
    """The communicator that ``process_group`` stands for.

    None is the replicas of a syncbn.DataParallel in the forward of one of them, else the default
    group, or this process alone where none is initialised. A Communicator is itself; everything
    else must be a torch.distributed group or a one-dimensional DeviceMesh (errors:
    :func:`syncbn.comm.process_group.from_torch`).
    """
    if process_group is None:
        return current_replica() or default_group() or LOCAL
    if isinstance(process_group, Communicator):
        return process_group
    return from_torch(process_group)
