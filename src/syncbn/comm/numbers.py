"""Some numbers of every rank, which belong to no device: counts, states, how many batches."""

from __future__ import annotations

import torch

from .base import Communicator


def device_of(comm: Communicator) -> torch.device:
    """Where a communicator takes tensors that belong to no device yet."""
    return getattr(comm, "device", torch.device("cpu"))


def numbers_of_all(comm: Communicator, numbers: tuple[float, ...]) -> list[list[float]]:
    """Every rank's numbers, in the order of ranks."""
    sent = torch.tensor(numbers, dtype=torch.float64, device=device_of(comm))
    received: list[list[float]] = comm.all_gather(sent).tolist()
    return received
