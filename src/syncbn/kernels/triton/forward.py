"""The kernels of a forward: measure, merge_sets and normalise. The formulas: composite.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    GROUP,
    INFINITY,
    LARGEST,
    PREFIX,
    SLOTS,
    come_last,
    count_batch,
    load_wide,
    locate,
    merge,
    move,
    own_channels,
    total,
    write_prefix,
)

_SIZES = ("outer", "channels", "inner", "columns", "tiles", "per", "splits")


@triton.jit(
    do_not_specialize=(*_SIZES, *PREFIX),
    do_not_specialize_on_alignment=("tickets", "slots", "packed"),
)
def measure(
    x,
    tickets,
    slots,
    packed,
    outer: tl.int64,
    channels: tl.int64,
    inner: tl.int64,
    columns: tl.int64,
    tiles: tl.int64,
    per: tl.int64,
    splits: tl.int64,
    room: tl.int64,
    at: tl.int64,
    first_word: tl.float64,
    second_word: tl.float64,
    third_word: tl.float64,
    fourth_word: tl.float64,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    LAST: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """packed (room + 1 + 2C) = a prefix and (count, mean, M2) of x.

    A program sums differences from a shift, the mean of its first tile. Where a group has several,
    each leaves its count, mean and M2 in slots (splits, 3, C), and the last one merges them.
    """
    if LAST:
        channels *= UNIT
    else:
        inner *= UNIT
    channel = own_channels(WIDTH, LAST)
    live = channel < channels
    split = tl.program_id(1)
    write_prefix(packed, room, at, first_word, second_word, third_word, fourth_word)
    packed += room
    first = split * per
    end = tl.minimum(first + per, tiles)

    start, place, inside, count = locate(first, outer, channels, inner, columns, ROWS, WIDTH, LAST)
    values = tl.load(x + start + place, inside, 0).to(DTYPE)
    shift = total(values, LAST) / tl.maximum(count, 1).to(DTYPE)
    shift = tl.where(tl.abs(shift) < INFINITY, shift, 0)  # of ∞ all differences would be no numbers

    count = first * 0
    a = tl.zeros_like(shift).to(tl.float64)
    b = tl.zeros_like(a)
    for begin in range(first, end, GROUP):
        sums = tl.zeros((ROWS, WIDTH), DTYPE)
        squares = tl.zeros((ROWS, WIDTH), DTYPE)
        for tile in range(begin, tl.minimum(begin + GROUP, end)):
            start, place, inside, more = locate(
                tile, outer, channels, inner, columns, ROWS, WIDTH, LAST
            )
            values = tl.load(x + start + place, inside, 0).to(DTYPE)
            values = tl.where(inside, values - shift[None, :], 0)
            sums += values
            squares += values * values
            count += more
        a += total(sums.to(tl.float64), LAST)
        b += total(squares.to(tl.float64), LAST)

    n = tl.zeros_like(a) + count.to(tl.float64)
    delta = a / tl.maximum(n, 1)
    lacking = delta * a
    lacking = tl.where(lacking > LARGEST, LARGEST, lacking)  # ∞ − ∞ would be no number
    m2 = b - lacking
    m2 = tl.where(m2 < 0, 0, m2)  # tl.maximum would make a number of none
    mean = shift.to(tl.float64) + delta
    done = splits == 1
    if splits > 1:
        slot = slots + split.to(tl.int64) * 3 * channels + channel
        tl.store(slot, n, live)
        tl.store(slot + channels, mean, live)
        tl.store(slot + 2 * channels, m2, live)
        done = come_last(tickets + tl.program_id(0), splits)
    if done:
        if splits > 1:
            n, mean, m2 = merge(
                slots,
                slots + channels,
                slots + 2 * channels,
                3 * channels,
                splits,
                channel,
                live,
                1,
                SLOTS // (WIDTH if LAST else 8),
                False,
            )
        tl.store(packed + 1 + channel, mean, live)
        tl.store(packed + 1 + channels + channel, m2, live)
        tl.store(packed + channel, n, channel == 0)


@triton.jit(
    do_not_specialize=("row", "number", "channels"), do_not_specialize_on_alignment=("sets",)
)
def merge_sets(
    sets,
    packed,
    row: tl.int64,
    number: tl.int64,
    channels: tl.int64,
    WIDTH: tl.constexpr,
    BLOCK: tl.constexpr,
    ONCE: tl.constexpr,
):
    """packed (1 + 2C) of a number of sets, each ``row`` further than the one before."""
    channel = own_channels(WIDTH, True)
    live = channel < channels
    n, mean, m2 = merge(
        sets, sets + 1, sets + 1 + channels, row, number, channel, live, 0, BLOCK, ONCE
    )
    tl.store(packed + 1 + channel, mean, live)
    tl.store(packed + 1 + channels + channel, m2, live)
    tl.store(packed + channel, n, channel == 0)


@triton.jit(
    do_not_specialize=(*_SIZES, "row", "number", "momentum", "eps"),
    do_not_specialize_on_alignment=(
        "sets",
        "weight",
        "bias",
        "running_mean",
        "running_var",
        "batches",
        "saved",
        "count",
    ),
)
def normalise(
    x,
    y,
    sets,
    weight,
    bias,
    running_mean,
    running_var,
    batches,
    saved,
    count,
    outer: tl.int64,
    channels: tl.int64,
    inner: tl.int64,
    columns: tl.int64,
    tiles: tl.int64,
    per: tl.int64,
    row: tl.int64,
    number: tl.int64,
    momentum: tl.float64,
    eps: tl.float64,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    LAST: tl.constexpr,
    DTYPE: tl.constexpr,
    BLOCK: tl.constexpr,
    ONCE: tl.constexpr,
    CUMULATIVE: tl.constexpr,
):
    """y, with the moments of all sets; saved = (mean, invstd); their count.

    Every program merges the sets of its channels; the first of each group writes what is per
    channel. CUMULATIVE: the momentum is 1 / batches, which has counted this one already; else the
    first program of all counts it.
    """
    if LAST:
        channels *= UNIT
    else:
        inner *= UNIT
    channel = own_channels(WIDTH, LAST)
    live = channel < channels
    split = tl.program_id(1)
    n, mean, m2 = merge(
        sets, sets + 1, sets + 1 + channels, row, number, channel, live, 0, BLOCK, ONCE
    )
    variance = m2 / tl.where(n > 1, n, 1) + eps
    invstd = tl.where(variance < INFINITY, 1 / tl.sqrt(variance), float("nan"))
    if split == 0:
        tl.store(saved + channel, mean, live)
        tl.store(saved + channels + channel, invstd, live)
        if count is not None:
            tl.store(count + channel, n, channel == 0)
        rate = tl.zeros_like(n) + momentum
        if CUMULATIVE:
            rate = tl.zeros_like(n) + 1 / tl.load(batches).to(tl.float64)
        rate = tl.where(n > 0, rate, 0)
        if running_mean is not None:
            move(running_mean, mean, rate, channel, live)
        if running_var is not None:
            move(running_var, m2 / tl.where(n > 2, n - 1, 1), rate, channel, live)
        if batches is not None and not CUMULATIVE:
            if tl.program_id(0) == 0:
                count_batch(batches)
    scale = invstd
    if weight is not None:
        scale *= load_wide(weight, channel, live)
    shift = mean.to(DTYPE)
    offset = (shift.to(tl.float64) - mean) * scale
    if bias is not None:
        offset += load_wide(bias, channel, live)
    scale = scale.to(DTYPE)[None, :]
    offset = offset.to(DTYPE)[None, :]
    for tile in range(split * per, tl.minimum(split * per + per, tiles)):
        start, place, inside, _ = locate(tile, outer, channels, inner, columns, ROWS, WIDTH, LAST)
        values = tl.load(x + start + place, inside, 0).to(DTYPE)
        values = (values - shift[None, :]) * scale + offset
        tl.store(y + start + place, values.to(y.dtype.element_ty), inside)
