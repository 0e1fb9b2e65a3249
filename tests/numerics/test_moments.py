"""Sets of values merge to the moments of their union, in any grouping, at any mean."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from support.many import by_sums
from syncbn.numerics.moments import Moments, merge, merge_by_sums, unpack


def of(values: torch.Tensor) -> Moments:
    """Moments of values (n, C), by definition."""
    values = values.double()
    mean = values.mean(0) if len(values) else values.new_zeros(values.shape[1])
    count = torch.tensor(float(len(values)), dtype=torch.float64)
    return Moments(count, mean, (values - mean).square().sum(0))


def stacked(sets: list[Moments]) -> Moments:
    return unpack(torch.stack([moments.pack() for moments in sets]))


def assert_same(actual: Moments, expected: Moments, relative: float = 1e-12) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=relative, atol=1e-9)


sizes = st.lists(st.integers(0, 6), min_size=1, max_size=5)


@given(sizes, st.integers(0, 1000), st.sampled_from((0.0, 3.0, 1e6)))
def test_merge_is_the_moments_of_the_union(sizes, seed, offset):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(sizes), 3, generator=generator, dtype=torch.float64) + offset
    parts = [of(part) for part in values.split(sizes)] if sum(sizes) else [of(values)]
    assert_same(merge(stacked(parts)), of(values), relative=1e-12 * (1 + offset))


@given(sizes, st.integers(0, 1000), st.sampled_from((0.0, 3.0, 1e6)))
def test_sums_over_ranks_merge_as_well(sizes, seed, offset):
    generator = torch.Generator().manual_seed(seed)
    values = torch.randn(sum(sizes), 3, generator=generator, dtype=torch.float64) + offset
    parts = [of(part) for part in values.split(sizes)] if sum(sizes) else [of(values)]
    first, *others = by_sums(merge_by_sums, parts)
    assert all(torch.equal(first.pack(), other.pack()) for other in others)
    assert_same(first, of(values), relative=1e-12 * (1 + offset))
    assert (first.mean - values.mean(0)).abs().nan_to_num().max() <= 4e-16 * (1 + offset)


@given(st.integers(0, 1000))
def test_grouping_does_not_matter(seed):
    generator = torch.Generator().manual_seed(seed)
    a, b, c = (of(torch.randn(n, 2, generator=generator)) for n in (3, 1, 4))
    left = merge(stacked([merge(stacked([a, b])), c]))
    right = merge(stacked([a, merge(stacked([b, c]))]))
    assert_same(left, right)


def test_empty_sets_weigh_nothing():
    values = torch.randn(5, 3)
    empty = of(torch.empty(0, 3))
    assert_same(merge(stacked([empty, of(values), empty])), of(values))
    assert all((part == 0).all() for part in merge(stacked([empty, empty])))


def test_pack_and_unpack_are_inverse():
    moments = of(torch.randn(5, 3))
    assert moments.pack().shape == (7,)
    assert_same(unpack(moments.pack()), moments, relative=0)
    sets = stacked([moments, of(torch.randn(3, 3))])
    assert_same(unpack(sets.pack()), sets, relative=0)
