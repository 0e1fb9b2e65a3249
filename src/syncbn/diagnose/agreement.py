"""What ranks must have alike before they put their models' statistics together, and how they do."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any
from zlib import crc32

import torch
import torch.nn as nn
from torch import Tensor

from ..comm import Communicator, device_of, numbers_of_all
from ..numerics.moments import wide_dtype

# Numbers that a rank receives at once: 8 MB, and all layers of a usual model.
_RECEIVED = 1 << 20


def check_model(operation: str, model: object) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{operation}: expected a torch.nn.Module, got {type(model).__name__}")


def check_alike(operation: str, comm: Communicator, layers: Mapping[str, Any]) -> None:
    """Refuse, on every rank alike, models whose layers differ in names or sizes.

    One message of two numbers.
    """
    if comm.size == 1:
        return
    words = [f"{name}: {layer.running_mean.numel()}" for name, layer in layers.items()]
    said = numbers_of_all(comm, (len(words), crc32("\n".join(words).encode())))
    other = next((rank for rank, row in enumerate(said) if row != said[0]), None)
    if other is None:
        return
    longest = max(int(row[0]) for row in said)
    sums = [crc32(word.encode()) for word in words] + [-1] * (longest - len(words))
    every = numbers_of_all(comm, tuple(sums))
    place = next(i for i in range(longest) if len({row[i] for row in every}) > 1)
    here = f"{words[place]} channels" if place < len(words) else "no further one"
    raise ValueError(
        f"{operation}: expected the same BatchNorm layers on all ranks, got {int(said[0][0])} on "
        f"rank 0 and {int(said[other][0])} on rank {other}; the first that differs is layer "
        f"{place + 1}, which is {here} on rank {comm.rank}; build the model alike on all ranks"
    )


def rows_of_all(comm: Communicator, own: Sequence[Tensor]) -> list[Tensor]:
    """Every rank's (W, n) of each tensor (n,), which has one size on all ranks.

    In one message where they are not many, and never many more at once than memory takes.
    """
    device = device_of(comm)
    limit, rows = _RECEIVED // comm.size, []
    waiting: list[Tensor] = []
    for tensor in own:
        if waiting and sum(map(len, waiting)) + len(tensor) > limit:
            rows += _gathered(comm, waiting)
            waiting = []
        waiting.append(tensor.to(device, wide_dtype(device)))
    return rows + _gathered(comm, waiting)


def _gathered(comm: Communicator, own: Sequence[Tensor]) -> list[Tensor]:
    if not own:
        return []
    received, sizes = comm.all_gather(torch.cat(list(own))), [len(tensor) for tensor in own]
    return list(received.split(sizes, dim=1))  # type: ignore[no-untyped-call]
