"""Pieces of the kernels: tiles of a tensor, sums over them, and how sets of values merge.

This and its neighbours forward.py and backward.py are written in Triton's language: they look like
Python, but what runs is what Triton compiles of them (or, with TRITON_INTERPRET=1, its interpreter
over NumPy, program by program). Capitals are constants of the compilation. Sizes are 64 bits wide.

One source serves both layouts. What a program knows per channel is a vector: of one channel where
the tensor is contiguous, of WIDTH of them where it is channels_last (LAST). See plan.py.

Values are summed in float32 no more than GROUP at a time, then in float64: at a mean of 1e4
deviations they lie on a coarse grid, where sums of squares round one way, and a sum of 4096 in
float32 is off by 4e-6. Everything is added in an order that only sizes decide: the same bits in
every run.
"""

from __future__ import annotations

import triton
import triton.language as tl

GROUP = tl.constexpr(16)  # plan.MOST_TILES
SLOTS = tl.constexpr(1024)  # values of sets that a program looks at together
INFINITY = tl.constexpr(float("inf"))
LARGEST = tl.constexpr(1.7976931348623157e308)


@triton.jit
def own_channels(WIDTH: tl.constexpr, LAST: tl.constexpr):
    """The channels of this program."""
    group = tl.program_id(0).to(tl.int64)
    if LAST:
        channel = group * WIDTH + tl.arange(0, WIDTH)
    else:
        channel = group + tl.arange(0, 1)
    return channel


@triton.jit
def locate(
    tile,
    outer,
    channels,
    inner,
    columns,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    LAST: tl.constexpr,
):
    """Where a tile's values are (ROWS, WIDTH), which of them exist, and how many per channel."""
    group = tl.program_id(0).to(tl.int64)
    row_of_tiles = tile // columns
    first = row_of_tiles * ROWS
    row = first + tl.arange(0, ROWS)[:, None]
    count = tl.minimum(outer - first, ROWS)
    if LAST:
        channel = group * WIDTH + tl.arange(0, WIDTH)[None, :]
        place = row * channels + channel
        inside = (row < outer) & (channel < channels)
    else:
        start = (tile - row_of_tiles * columns) * WIDTH
        column = start + tl.arange(0, WIDTH)[None, :]
        place = (row * channels + group) * inner + column
        inside = (row < outer) & (column < inner)
        count *= tl.minimum(inner - start, WIDTH)
    return place, inside, count


@triton.jit
def total(values, LAST: tl.constexpr):
    """Per channel, of a tile."""
    if LAST:
        result = tl.sum(values, 0)
    else:
        result = tl.sum(tl.sum(values, 1), 0, keep_dims=True)
    return result


@triton.jit
def narrowed(value, like):
    """For a store to ``like``. float64 becomes half precision by way of float32, as torch's."""
    if like.dtype.element_ty.primitive_bitwidth == 16:
        value = value.to(tl.float32)
    return value


@triton.jit
def load_wide(pointer, channel, live):
    return tl.load(pointer + channel, live, 0).to(tl.float64)


@triton.jit
def come_last(ticket, splits):
    """Whether this program is the last of its group to come here: all have stored their parts.

    The ticket is zero before and after.
    """
    tl.debug_barrier()  # what all threads stored comes before what one of them says
    last = tl.atomic_add(ticket, 1, sem="acq_rel") == splits - 1
    if last:
        tl.store(ticket, 0)
    return last


@triton.jit
def merge(
    counts,
    means,
    m2s,
    row,
    sets,
    channel,
    live,
    PER_CHANNEL: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Count, mean and M2 of all sets together, per channel: numerics/moments.py has the formula.

    Set number i has its count, mean and M2 ``i * row`` further than the first.
    """
    n = tl.zeros_like(channel).to(tl.float64)
    mean = tl.zeros_like(n)
    m2 = tl.zeros_like(n)
    for start in range(0, sets, BLOCK):
        i = start + tl.arange(0, BLOCK)[:, None]
        here = (i < sets) & live[None, :]
        n += tl.sum(
            tl.load(
                counts + i * row + channel[None, :] * PER_CHANNEL, here, 0, cache_modifier=".cg"
            ),
            0,
        )
    divisor = tl.where(n > 1, n, 1)
    for start in range(0, sets, BLOCK):
        i = start + tl.arange(0, BLOCK)[:, None]
        here = (i < sets) & live[None, :]
        weight = tl.load(
            counts + i * row + channel[None, :] * PER_CHANNEL, here, 0, cache_modifier=".cg"
        )
        each = tl.load(means + i * row + channel[None, :], here, 0, cache_modifier=".cg")
        mean += tl.sum(weight / divisor[None, :] * each, 0)
    for start in range(0, sets, BLOCK):
        i = start + tl.arange(0, BLOCK)[:, None]
        here = (i < sets) & live[None, :]
        weight = tl.load(
            counts + i * row + channel[None, :] * PER_CHANNEL, here, 0, cache_modifier=".cg"
        )
        each = tl.load(means + i * row + channel[None, :], here, 0, cache_modifier=".cg")
        spread = tl.load(m2s + i * row + channel[None, :], here, 0, cache_modifier=".cg")
        distance = tl.where(here, each - mean[None, :], 0)
        m2 += tl.sum(spread + weight * distance * distance, 0)
    return n, mean, m2
