"""How messages travel, in words."""

from __future__ import annotations

import torch

from .base import Communicator
from .groups import engine_of
from .process_group import ProcessGroup


def way_of(comm: Communicator, device: torch.device) -> str:
    """How tensors on ``device`` travel. Collective where that is not known yet."""
    if not isinstance(comm, ProcessGroup):
        return type(comm).__name__
    if device.type == "cpu" and comm._channel() is not None:
        return "shared memory"
    return engine_of(comm.group, device.type)
