"""Groups of ranks by how many samples their statistics are to come from."""

from __future__ import annotations

import os

from .given import default_group
from .numbers import numbers_of_all


def group_size_for(samples: int, batch_per_rank: int) -> int:
    """The least number of consecutive ranks whose batches reach so many samples, for all ranks.

    It divides the world size. Where all hosts have the same number of ranks, groups lie within a
    host or are made of whole ones: what ranks of one host tell each other costs least. All ranks
    must make this call, which sends three numbers of each.

    Raises:
        TypeError: no integers.
        ValueError: below 1, or torch.distributed is not initialised; on all ranks alike, other
            numbers on other ranks, or more samples than all ranks' batches have.
    """
    for name, value in (("samples", samples), ("batch_per_rank", batch_per_rank)):
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"convert: expected {name} as a number, got {type(value).__name__}")
        if value < 1:
            raise ValueError(f"convert: expected {name} ≥ 1, got {value}")
    world = default_group()
    if world is None:
        raise ValueError(
            f"convert: got samples={samples}, but torch.distributed is not initialised; call "
            "torch.distributed.init_process_group first"
        )
    said = numbers_of_all(world, (samples, batch_per_rank, _ranks_of_this_host()))
    for rank, numbers in enumerate(said):
        if numbers[:2] != said[0][:2]:
            raise ValueError(
                "convert: expected the same samples and batch_per_rank on all ranks, got "
                f"{_shown(said[0])} on rank 0 and {_shown(numbers)} on rank {rank}; where batches "
                "differ pass their least number on all ranks"
            )
    per_host = int(said[0][2]) if len({numbers[2] for numbers in said}) == 1 else 0
    size = least_group(samples, batch_per_rank, world.size, per_host)
    if size is None:
        raise ValueError(
            f"convert: expected samples that the ranks' batches reach, got {samples} on "
            f"{world.size} ranks of {batch_per_rank}, which have {world.size * batch_per_rank} "
            "together; leave samples out to normalise over all of them"
        )
    return size


def least_group(samples: int, batch_per_rank: int, ranks: int, per_host: int = 0) -> int | None:
    """The least divisor of ``ranks`` that reaches ``samples``; None where none does.

    per_host: how many ranks each host has, or 0 where that is not known. Of the divisors only
    those then count whose groups share no host with others, unless they lie in it.
    """
    if per_host < 1 or ranks % per_host:
        per_host = ranks
    for size in range(1, ranks + 1):
        fits = ranks % size == 0 and (per_host % size == 0 or size % per_host == 0)
        if fits and size * batch_per_rank >= samples:
            return size
    return None


def _ranks_of_this_host() -> int:
    """As torchrun says it; 0 where nobody does."""
    said = os.environ.get("LOCAL_WORLD_SIZE", "")
    return int(said) if said.isdecimal() else 0


def _shown(numbers: list[float]) -> str:
    return f"samples={numbers[0]:.0f} and batch_per_rank={numbers[1]:.0f}"
