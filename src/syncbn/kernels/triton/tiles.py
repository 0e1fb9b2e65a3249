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
PREFIX = ("room", "at", "first_word", "second_word", "third_word", "fourth_word")
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
    """Where a tile starts, where its values are from there on, which of them exist (ROWS, WIDTH
    both), and how many per channel. Within a tile 32 bits are enough: plan.py sees to it.
    """
    group = tl.program_id(0).to(tl.int64)
    row_of_tiles = tile // columns
    first = row_of_tiles * ROWS
    rows = tl.minimum(outer - first, ROWS)
    if LAST:
        column = group * WIDTH
        start = first * channels + column
        stride = channels.to(tl.int32)
        values = tl.minimum(channels - column, WIDTH)
        count = rows
    else:
        column = (tile - row_of_tiles * columns) * WIDTH
        start = (first * channels + group) * inner + column
        stride = (channels * inner).to(tl.int32)
        values = tl.minimum(inner - column, WIDTH)
        count = rows * values
    row = tl.arange(0, ROWS)[:, None]
    column = tl.arange(0, WIDTH)[None, :]
    inside = (row < rows.to(tl.int32)) & (column < values.to(tl.int32))
    return start, row * stride + column, inside, count


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
def move(running, new, rate, channel, live):
    """running = (1 − rate)·running + rate·new, which keeps what is small against the other."""
    moved = (1 - rate) * load_wide(running, channel, live) + rate * new
    tl.store(running + channel, narrowed(moved, running), live)


@triton.jit
def count_batch(batches):
    """In the counter's own type. Of this launch's programs only one reads it, this one."""
    value = tl.load(batches)
    if value.dtype.is_floating():
        tl.store(batches, narrowed(value.to(tl.float64) + 1, batches))
    else:
        tl.store(batches, value.to(tl.int64) + 1)


@triton.jit
def write_prefix(message, room, at, first, second, third, fourth):
    """Zeros but for four words, by the first program of a launch: see tensors/prefix.py."""
    if (tl.program_id(0) == 0) & (tl.program_id(1) == 0):
        for begin in range(0, room, 128):
            place = begin + tl.arange(0, 128)
            word = place - at
            value = tl.where(word == 0, first, 0)
            value += tl.where(word == 1, second, 0)
            value += tl.where(word == 2, third, 0)
            value += tl.where(word == 3, fourth, 0)
            tl.store(message + place, value, place < room)


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
def load_sets(pointer, row, first, sets, channel, live, BLOCK: tl.constexpr):
    """One number of each channel in each of BLOCK sets (BLOCK, channels), zero past the last.

    Not by way of the first cache: other programs may have written them in the same launch.
    """
    i = first + tl.arange(0, BLOCK)[:, None]
    here = (i < sets) & live[None, :]
    return tl.load(pointer + i * row + channel[None, :], here, 0, cache_modifier=".cg")


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
    ONCE: tl.constexpr,
):
    """Count, mean and M2 of all sets together, per channel: numerics/moments.py has the formula.

    Set number i has its count (one, or PER_CHANNEL), mean and M2 ``i * row`` further than the
    first. ONCE: there are no more than BLOCK, which are read in one go.
    """
    counted = channel * PER_CHANNEL
    n = tl.zeros_like(channel).to(tl.float64)
    mean = tl.zeros_like(n)
    m2 = tl.zeros_like(n)
    if ONCE:
        weight = load_sets(counts, row, 0, sets, counted, live, BLOCK)
        each = load_sets(means, row, 0, sets, channel, live, BLOCK)
        spread = load_sets(m2s, row, 0, sets, channel, live, BLOCK)
        n = tl.sum(weight, 0)
        mean = tl.sum(weight / tl.where(n > 1, n, 1)[None, :] * each, 0)
        m2 = tl.sum(spread_around(weight, each, spread, mean), 0)
    else:
        for i in range(0, sets, BLOCK):
            n += tl.sum(load_sets(counts, row, i, sets, counted, live, BLOCK), 0)
        divisor = tl.where(n > 1, n, 1)
        for i in range(0, sets, BLOCK):
            weight = load_sets(counts, row, i, sets, counted, live, BLOCK)
            each = load_sets(means, row, i, sets, channel, live, BLOCK)
            mean += tl.sum(weight / divisor[None, :] * each, 0)
        for i in range(0, sets, BLOCK):
            weight = load_sets(counts, row, i, sets, counted, live, BLOCK)
            each = load_sets(means, row, i, sets, channel, live, BLOCK)
            spread = load_sets(m2s, row, i, sets, channel, live, BLOCK)
            m2 += tl.sum(spread_around(weight, each, spread, mean), 0)
    return n, mean, m2


@triton.jit
def spread_around(weight, each, m2, mean):
    """Each set's sum of squares around the mean of all; of an empty set zero, where 0·∞ is none."""
    distance = tl.where(weight > 0, each - mean[None, :], 0)
    return m2 + weight * distance * distance
