"""Launch plans as integers: every value in one tile of one program, and programs enough."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from syncbn.kernels.triton import plan as planning
from syncbn.kernels.triton.plan import Plan, ceil, make_plan, power_of_two

PROCESSORS = (1, 2, 16, 108, 132, 304)
SPACES = (1, 2, 3, 5, 7, 16, 49, 64, 97, 196, 1000, 3136, 4096, 4097, 12544, 2**18, 2**31 + 11)


@st.composite
def arguments(draw):
    outer = draw(st.one_of(st.integers(0, 300), st.integers(0, 2**33)))
    channels = draw(st.one_of(st.integers(1, 300), st.integers(1, 100_000)))
    inner = draw(st.one_of(st.sampled_from(SPACES), st.integers(0, 2**33)))
    itemsize = draw(st.sampled_from((2, 4, 8)))
    return outer, channels, inner, itemsize, draw(st.sampled_from(PROCESSORS))


def sizes(plan: Plan) -> tuple[int, int, int]:
    """(outer, channels, inner) in values, as the kernels make them."""
    if plan.last:
        return plan.outer, plan.channels * plan.unit, plan.inner
    return plan.outer, plan.channels, plan.inner * plan.unit


def places(plan: Plan) -> list[int]:
    """Where each value lies that a launch touches: tiles.locate, in integers."""
    outer, channels, inner = sizes(plan)
    found = []
    for group, split in product(range(plan.groups), range(plan.splits)):
        for tile in range(split * plan.per, min((split + 1) * plan.per, plan.tiles)):
            first = tile // plan.columns * plan.rows
            rows = range(min(outer - first, plan.rows))
            column = group * plan.width if plan.last else tile % plan.columns * plan.width
            width = range(min((channels if plan.last else inner) - column, plan.width))
            if plan.last:
                start, stride = first * channels + column, channels
            else:
                start, stride = (first * channels + group) * inner + column, channels * inner
            found += [start + row * stride + value for row in rows for value in width]
    return found


@given(
    st.integers(0, 40),
    st.integers(1, 70),
    st.integers(0, 60),
    st.sampled_from((2, 8)),
    st.sampled_from((1, 2, 16)),
    st.sampled_from((16, 64, 4096)),
)
def test_every_value_is_in_one_tile(outer, channels, inner, itemsize, processors, tile):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(planning, "TILE", tile)
        plan = make_plan.__wrapped__(outer, channels, inner, itemsize, processors)
    assert sorted(places(plan)) == list(range(outer * channels * inner))


@given(arguments())
def test_plans_of_any_size(given):
    outer, channels, inner, itemsize, _ = given
    plan = make_plan(*given)
    seen = sizes(plan)
    assert seen[0] * seen[1] * seen[2] == outer * channels * inner
    # Programs cover tiles, tiles cover rows and columns, each once and none in vain.
    assert plan.per * (plan.splits - 1) < max(1, plan.tiles) <= plan.per * plan.splits
    across, width = (seen[1], plan.groups) if plan.last else (seen[2], plan.columns)
    assert plan.width * (width - 1) < max(1, across) <= plan.width * width
    assert plan.tiles == ceil(seen[0], plan.rows) * plan.columns
    assert plan.last or plan.groups == channels
    # What Triton and the kernels take.
    for size in (plan.rows, plan.width, plan.warps):
        assert size == power_of_two(size)
    assert plan.warps <= 8
    assert plan.rows * plan.width <= planning.TILE
    assert 32 * plan.warps <= max(32, plan.rows * plan.width)
    stride = seen[1] if plan.last else seen[1] * seen[2]
    assert (plan.rows - 1) * stride + plan.width < 2**31
    assert plan.groups < 2**31
    assert plan.splits <= planning.MOST_SPLITS
    assert plan.large == (outer * channels * inner * itemsize >= 2**31)
    assert plan.unit == 1 or (seen[1] if plan.last else seen[2]) % plan.unit == 0


@given(arguments())
def test_programs_fill_the_device_and_end_together(given):
    *_, processors = given
    plan = make_plan(*given)
    programs = plan.groups * plan.splits
    wanted = planning.PROGRAMS * processors
    too_many = ceil(plan.tiles, planning.MOST_SPLITS)  # programs to merge, with fewer tiles each
    assert programs >= wanted or plan.per in (1, too_many)
    # No more tiles than one sum in float32 takes.
    assert plan.per <= max(planning.MOST_TILES, too_many)


@pytest.mark.parametrize("processors", [108, 132, 304])
@pytest.mark.parametrize(
    ("shape", "lost"),
    [
        ((2, 64, 512 * 512), 0.0),  # few samples of large images
        ((16, 64, 112 * 112), 0.13),
        ((8, 256, 56 * 56), 0.24),
        ((32, 2048, 49), 0.24),
        ((64, 512, 28 * 28), 0.24),
        ((16 * 128 * 500, 128, 1), 0.0),
        ((32 * 3136, 256, 1), 0.0),
        ((32 * 49, 2048, 1), 0.25),
        ((1, 1, 2**31), 0.0),
    ],
    ids=str,
)
def test_usual_layers_fill_the_device(shape, lost, processors):
    """At least four programs a multiprocessor where the work allows, most lanes with a value."""
    plan = make_plan(*shape, 4, processors)
    programs = plan.groups * plan.splits
    assert programs >= min(planning.PROGRAMS * processors, plan.groups * min(plan.tiles, 1024))
    lanes = plan.groups * plan.tiles * plan.rows * plan.width
    outer, channels, inner = shape
    assert 1 - outer * channels * inner / lanes <= lost


def test_a_group_sums_no_more_in_float32_than_a_program_has_tiles():
    """tiles.GROUP cannot be imported without Triton."""
    assert planning.MOST_TILES == 16
