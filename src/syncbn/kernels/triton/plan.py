"""How a tensor is shared out among programs of a GPU: pure functions of sizes.

A plan sees a tensor as (outer, channels, inner): contiguous (N, C, *) as (N, C, S), channels_last
as (N·S, C, 1). It cuts the values of a group of channels into tiles of ``rows`` × ``width``, which
a program holds in registers at once, and gives ``per`` of them to every program of a group, its
splits:

    contiguous      a group is one channel; a tile lies over rows of the batch and columns of S
    channels_last   a group is ``width`` channels; a tile lies over rows of N·S

A small layer gives about :data:`PROGRAMS` programs to each multiprocessor, as long as there are
tiles; a large one no more than :data:`MOST_TILES` tiles to a program, so that the last ones to run
do not run for long. :data:`MOST_SPLITS` bounds what the last program of a group merges.
"""

from __future__ import annotations

from functools import lru_cache
from math import gcd
from typing import NamedTuple

TILE = 4096  # values, 16 of a thread; half as many of eight bytes, or if few lie side by side
PROGRAMS = 4  # a multiprocessor, of eight warps
MOST_TILES = 16  # also how many values the kernels sum in float32, see tiles.py
MOST_SPLITS = 1024
MOST_CHANNELS = 64  # of a program, channels_last: 128 bytes of half precision in a row
TILE_COST = 256  # what a tile costs beside its values, in values
LARGE = 2**31  # bytes; ROCm's kernels address smaller tensors otherwise


class Plan(NamedTuple):
    """A launch, but for the kernel. The dimension that is contiguous is counted in ``unit``s."""

    outer: int
    channels: int
    inner: int
    columns: int  # of tiles, side by side in S
    tiles: int  # of a group
    per: int  # tiles of a program, the last one perhaps fewer
    splits: int  # programs of a group
    unit: int  # 1, 2, 4, 8 or 16 values
    rows: int
    width: int
    last: bool  # channels_last
    groups: int
    warps: int
    large: bool

    @property
    def grid(self) -> tuple[int, int]:
        return self.groups, self.splits


@lru_cache(4096)
def make_plan(outer: int, channels: int, inner: int, itemsize: int, processors: int) -> Plan:
    """The plan for a tensor (outer, channels, inner), contiguous, of itemsize bytes a value."""
    if channels == 1:  # all of one channel: one row
        outer, inner = 1, outer * inner
    last = inner == 1 and channels > 1
    unit = gcd(channels if last else inner, 16)
    full = TILE if itemsize <= 4 and unit >= 4 else TILE // 2
    if last:
        width = _channels_of_a_program(channels)
        rows = max(1, min(full // width, power_of_two(outer), _near(channels)))
        columns = 1
    else:
        rows, width = _tile(outer, channels, inner, full)
        columns = max(1, ceil(inner, width))
    groups = ceil(channels, width) if last else channels
    tiles = ceil(outer, rows) * columns
    wanted = max(1, ceil(tiles, MOST_TILES), ceil(PROGRAMS * processors, groups))
    per = max(1, tiles // wanted, ceil(tiles, MOST_SPLITS))
    return Plan(
        outer,
        channels // unit if last else channels,
        inner if last else inner // unit,
        columns,
        tiles,
        per,
        max(1, ceil(tiles, per)),
        unit,
        rows,
        width,
        last,
        groups,
        max(1, min(8, rows * width * 8 // full)),
        outer * channels * inner * itemsize >= LARGE,
    )


def ceil(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


def power_of_two(n: int) -> int:
    """The least power of two that is not less than n."""
    return 1 << max(0, n - 1).bit_length()


def _channels_of_a_program(channels: int) -> int:
    """The width that leaves the fewest lanes without a channel; the largest of these."""
    most = min(power_of_two(channels), MOST_CHANNELS)
    return min((most, max(1, most // 2)), key=lambda width: (ceil(channels, width) * width, -width))


def _near(stride: int) -> int:
    """The most rows, a power of two, whose values are less than 2³¹ places apart."""
    return 1 << max(0, ((2**31 - TILE) // max(1, stride)).bit_length() - 1)


def _tile(outer: int, channels: int, inner: int, full: int) -> tuple[int, int]:
    """Rows and columns of the tile with which outer × inner values cost least."""
    best, shape = None, (1, 1)
    width = min(power_of_two(inner), full)
    while width >= min(16, power_of_two(inner)):
        rows = min(full // width, power_of_two(outer), _near(channels * inner))
        cost = ceil(outer, rows) * ceil(inner, width) * (rows * width + TILE_COST)
        if best is None or cost < best:
            best, shape = cost, (rows, width)
        if width == 1:
            break
        width //= 2
    return shape
