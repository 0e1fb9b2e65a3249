"""Who takes part in a layer's statistics, and how numbers travel between them."""

from __future__ import annotations

from typing import Any

import torch

from . import devices
from .alone import warn_if_alone
from .base import Communicator, Local
from .devices import Begun
from .framed import Framed
from .frames import Received
from .given import default_group, from_torch, refuse_join
from .graphs import InGraph, know_layers
from .groups import subgroups
from .headers import MAY, NONE, SINGLE, WANTS, Caller
from .mpi import MPI
from .numbers import device_of, numbers_of_all
from .process_group import ProcessGroup
from .replicas import Replica, ReplicaGroup, Unplaced, current_replica
from .samples import group_size_for
from .shared_memory import SharedMemory
from .sums import are_many
from .threads import Threads, threads

__all__ = [
    "LOCAL",
    "MAY",
    "MPI",
    "NONE",
    "SINGLE",
    "WANTS",
    "Begun",
    "Caller",
    "Communicator",
    "Framed",
    "Local",
    "ProcessGroup",
    "Received",
    "Replica",
    "ReplicaGroup",
    "SharedMemory",
    "Threads",
    "Unplaced",
    "are_many",
    "default_group",
    "device_of",
    "devices",
    "group_size_for",
    "know_layers",
    "numbers_of_all",
    "refuse_join",
    "resolve",
    "subgroups",
    "threads",
    "warn_if_alone",
]

LOCAL = Local()

for _public in (Communicator, MPI, SharedMemory, Threads, threads):
    _public.__module__ = __name__


def resolve(process_group: Any) -> Communicator:
    """The communicator that ``process_group`` stands for.

    None is the default group, or this process alone where none is initialised; in the forward of a
    replica of a syncbn.DataParallel the replicas of all these ranks. A Communicator is itself;
    everything else must be a torch.distributed group or a one-dimensional DeviceMesh (errors:
    :func:`syncbn.comm.given.from_torch`).
    """
    comm: Communicator
    if process_group is None:
        comm = default_group() or LOCAL
    elif isinstance(process_group, Communicator):
        comm = process_group
        if isinstance(comm, Framed) and torch.compiler.is_compiling():
            comm = InGraph(comm.name_in_graphs, comm.rank, comm.size)
    else:
        comm = from_torch(process_group)
    replica = current_replica()
    if replica is None or process_group is LOCAL or isinstance(comm, (Replica, Unplaced)):
        return comm
    return replica.over(comm)
