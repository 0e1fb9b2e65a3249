"""The kernels of a backward: gradient_sums and input_gradient. The formulas: composite.py."""

from __future__ import annotations

import triton
import triton.language as tl

from .tiles import (
    GROUP,
    PREFIX,
    SLOTS,
    come_last,
    load_sets,
    load_wide,
    locate,
    narrowed,
    own_channels,
    total,
    write_prefix,
)

_SIZES = ("outer", "channels", "inner", "columns", "tiles", "per", "splits")
_PER_CHANNEL = ("mean", "invstd", "weight", "count", "sums")


@triton.jit(
    do_not_specialize=(*_SIZES, *PREFIX),
    do_not_specialize_on_alignment=(
        *("mean", "invstd", "tickets", "slots", "sums"),
        *("dweight", "dbias"),
    ),
)
def gradient_sums(
    dy,
    x,
    mean,
    invstd,
    tickets,
    slots,
    sums,
    dweight,
    dbias,
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
    """sums (room + 2C) = a prefix and (Σdy, Σdy·x̂); with dweight and dbias these, too, in their own
    types.

    Where a group has several programs, each leaves its sums in slots (splits, 2, C), and the last
    one adds them up.
    """
    if LAST:
        channels *= UNIT
    else:
        inner *= UNIT
    channel = own_channels(WIDTH, LAST)
    live = channel < channels
    split = tl.program_id(1)
    write_prefix(sums, room, at, first_word, second_word, third_word, fourth_word)
    sums += room
    centre = load_wide(mean, channel, live)
    shift = centre.to(DTYPE)
    first = split * per
    end = tl.minimum(first + per, tiles)
    a = tl.zeros_like(centre)
    b = tl.zeros_like(centre)
    for begin in range(first, end, GROUP):
        gradients = tl.zeros((ROWS, WIDTH), DTYPE)
        products = tl.zeros((ROWS, WIDTH), DTYPE)
        for tile in range(begin, tl.minimum(begin + GROUP, end)):
            start, place, inside, _ = locate(
                tile, outer, channels, inner, columns, ROWS, WIDTH, LAST
            )
            gradient = tl.load(dy + start + place, inside, 0).to(DTYPE)
            values = tl.load(x + start + place, inside, 0).to(DTYPE)
            gradients += gradient
            products += tl.where(inside, gradient * (values - shift[None, :]), 0)
        a += total(gradients.to(tl.float64), LAST)
        b += total(products.to(tl.float64), LAST)

    done = splits == 1
    if splits > 1:
        slot = slots + split.to(tl.int64) * 2 * channels + channel
        tl.store(slot, a, live)
        tl.store(slot + channels, b, live)
        done = come_last(tickets + tl.program_id(0), splits)
    if done:
        if splits > 1:
            a = _add_up(slots, 2 * channels, splits, channel, live, SLOTS // (WIDTH if LAST else 8))
            b = _add_up(
                slots + channels,
                2 * channels,
                splits,
                channel,
                live,
                SLOTS // (WIDTH if LAST else 8),
            )
        dot = (b + (shift.to(tl.float64) - centre) * a) * load_wide(invstd, channel, live)
        tl.store(sums + channel, a, live)
        tl.store(sums + channels + channel, dot, live)
        if dweight is not None:
            tl.store(dbias + channel, narrowed(a, dbias), live)
            tl.store(dweight + channel, narrowed(dot, dweight), live)


@triton.jit
def _add_up(slots, row, splits, channel, live, BLOCK: tl.constexpr):
    result = tl.zeros_like(channel).to(tl.float64)
    for i in range(0, splits, BLOCK):
        result += tl.sum(load_sets(slots, row, i, splits, channel, live, BLOCK), 0)
    return result


@triton.jit(do_not_specialize=_SIZES, do_not_specialize_on_alignment=_PER_CHANNEL)
def input_gradient(
    dy,
    x,
    dx,
    mean,
    invstd,
    count,
    weight,
    sums,
    outer: tl.int64,
    channels: tl.int64,
    inner: tl.int64,
    columns: tl.int64,
    tiles: tl.int64,
    per: tl.int64,
    UNIT: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    LAST: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """dx, from the sums of all sets together, whose count it is; without one, the count is x's."""
    if LAST:
        channels *= UNIT
    else:
        inner *= UNIT
    channel = own_channels(WIDTH, LAST)
    live = channel < channels
    split = tl.program_id(1)
    if count is not None:
        n = tl.load(count).to(tl.float64)
    else:
        n = (outer * inner).to(tl.float64)
    n = tl.where(n > 1, n, 1)
    centre = load_wide(mean, channel, live)
    inverse = load_wide(invstd, channel, live)
    scale = inverse
    if weight is not None:
        scale *= load_wide(weight, channel, live)
    average = load_wide(sums, channel, live) / n
    slope = -load_wide(sums, channel + channels, live) / n * inverse
    shift = centre.to(DTYPE)
    offset = ((shift.to(tl.float64) - centre) * slope - average) * scale
    # The scale comes last: its product with the slope has the square of invstd, which underflows.
    slope = slope.to(DTYPE)[None, :]
    scale = scale.to(DTYPE)[None, :]
    offset = offset.to(DTYPE)[None, :]
    for tile in range(split * per, tl.minimum(split * per + per, tiles)):
        start, place, inside, _ = locate(tile, outer, channels, inner, columns, ROWS, WIDTH, LAST)
        gradient = tl.load(dy + start + place, inside, 0).to(DTYPE)
        values = tl.load(x + start + place, inside, 0).to(DTYPE)
        result = (gradient + (values - shift[None, :]) * slope) * scale + offset
        tl.store(dx + start + place, result.to(dx.dtype.element_ty), inside)
