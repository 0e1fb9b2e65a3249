"""Who takes part in a layer's statistics, and how numbers travel between them."""

from __future__ import annotations

from typing import Any

from .base import Communicator, Local
from .groups import subgroups
from .mpi import MPI
from .process_group import ProcessGroup, default_group, from_torch, refuse_join
from .replicas import Crew, Replica, Unplaced, current_replica, refused_group
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
    "refused_group",
    "resolve",
    "subgroups",
    "threads",
]

LOCAL = Local()

for _public in (Communicator, MPI, Threads, threads):
    _public.__module__ = __name__


def resolve(process_group: Any) -> Communicator:
    """The communicator that ``process_group`` stands for.

    None is the replicas of a syncbn.DataParallel in the forward of one of them, else the default
    group, or this process alone where none is initialised. A Communicator is itself; everything
    else must be a torch.distributed group or a one-dimensional DeviceMesh (errors:
    :func:`syncbn.comm.process_group.from_torch`). Both at once, replicas and a default group of
    several ranks, raise RuntimeError.
    """
    if process_group is None:
        replica, world = current_replica(), default_group()
        if replica is not None and world is not None and world.size > 1:
            raise RuntimeError(refused_group("sync_batch_norm", world.size))
        return replica or world or LOCAL
    if isinstance(process_group, Communicator):
        return process_group
    return from_torch(process_group)
