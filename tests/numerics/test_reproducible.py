"""reproducible=True: the same bits for every split of a batch, and any number of threads."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from math import inf, nan

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import syncbn
from support import oracle
from support.cases import Case, check, laid_out, share_of, step
from support.many import by_sums
from syncbn.kernels import composite
from syncbn.numerics import reproducible
from syncbn.numerics.moments import merge, unpack

SPLITS = [(6,), (3, 3), (1, 5), (0, 6), (2, 2, 2), (4, 0, 2), (1, 1, 1, 3), (0, 2, 0, 4)]
numbers = st.floats(allow_nan=False, allow_infinity=False, width=32) | st.floats(-1e150, 1e150)


@given(terms=st.lists(numbers, max_size=12), data=st.data())
def test_sums_are_exact_and_know_no_split(terms, data):
    cut = data.draw(st.integers(0, len(terms)))
    order = data.draw(st.permutations(terms))

    def column(values):
        return torch.tensor(values, dtype=torch.float64).view(-1, 1)

    whole = reproducible.finalise(reproducible.to_accumulator(column(terms)).unsqueeze(0))
    parts = [reproducible.to_accumulator(column(part)) for part in (order[:cut], order[cut:])]
    assert torch.equal(torch.stack(whole), torch.stack(reproducible.finalise(torch.stack(parts))))
    high, low = (Fraction(part.item()) for part in whole)
    largest = max(map(abs, terms), default=0)
    error = abs(high + low - sum(map(Fraction, terms)))
    assert error <= Fraction(largest) * (len(terms) + 1) / 2**78 + Fraction(1, 2**940)


@given(terms=st.lists(numbers, max_size=12), cuts=st.lists(st.integers(0, 12), max_size=3))
def test_the_union_by_sums_over_ranks_has_the_same_bits(terms, cuts):
    column = torch.tensor(terms, dtype=torch.float64).view(-1, 1).expand(-1, 2)
    edges = [0, *sorted(min(cut, len(terms)) for cut in cuts), len(terms)]
    parts = [column[begin:end] for begin, end in pairwise(edges)]
    owns = [reproducible.to_accumulator(part) for part in parts]
    expected = torch.stack(reproducible.finalise(torch.stack(owns)))
    for union in by_sums(reproducible.union_by_sums, owns):
        assert torch.equal(union, reproducible.to_accumulator(column))
        assert torch.equal(torch.stack(reproducible.finalise(union.unsqueeze(0))), expected)


def test_the_highest_top_is_found_among_very_many_ranks():
    top = torch.tensor([36.0, -31.0, 0.0], dtype=torch.float64)
    own = torch.cat((top[None], torch.ones(5, 3, dtype=torch.float64)))
    union = reproducible.union_by_sums(own, lambda numbers: numbers * 2**23)
    assert torch.equal(union[0], top)


def test_what_is_not_finite_stays_in_its_column():
    terms = torch.tensor([[nan, inf, inf, 1.0], [1.0, 2.0, -inf, 2.0]], dtype=torch.float64)
    high, low = reproducible.finalise(reproducible.to_accumulator(terms).unsqueeze(0))
    torch.testing.assert_close(high, terms.sum(0), equal_nan=True)
    assert not low.any()


def test_what_is_below_the_lowest_slice_is_left_out():
    """As the compiled kernels do, whose ranks take part in the same sums."""
    terms = torch.tensor([[2.0**-950], [2.0**-960]], dtype=torch.float64)
    representation = reproducible.to_accumulator(terms)
    assert representation[0].item() == -31
    (total,) = reproducible.finalise(representation.unsqueeze(0))[0].tolist()
    assert total == 2.0**-950


@pytest.mark.parametrize("ratio", [0.0, 1e3, 1e6, 1e9])
def test_moments_are_right_at_any_mean(ratio):
    x = torch.randn(40, 3, dtype=torch.float64) + ratio
    samples = torch.stack([composite.measure(rows) for rows in x.split(8)])
    sent = torch.stack([reproducible.moments_to_accumulator(part) for part in samples.split(2)])
    count, mean, m2 = reproducible.merge_moments(sent).split((1, 3, 3))
    expected = oracle.batch_norm(x, x)
    assert count == 40
    oracle.assert_close(mean, expected.mean)
    oracle.assert_close(m2 / 40, expected.var, factor=4 + ratio / 1e3)


@pytest.mark.parametrize("values", [(inf, 1), (inf, 2, -inf), (-inf, 1), (nan, 1), (1e200, 1)])
def test_moments_of_what_is_not_finite_or_too_large(values):
    """As those that add up rounded."""
    x = torch.tensor(values, dtype=torch.float64).view(-1, 1)
    samples = torch.stack([composite.measure(row) for row in x.split(1)])
    sent = reproducible.moments_to_accumulator(samples)
    found, expected = reproducible.merge_moments(sent[None]), merge(unpack(samples)).pack()
    torch.testing.assert_close(found, expected, equal_nan=True)


def everything(results):
    """Outputs, input gradients and running statistics of the whole batch."""
    whole = [torch.cat([result[name] for result in results]) for name in ("y", "dx")]
    return [*whole, results[-1]["running_mean"], results[-1]["running_var"]]


FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
LAYOUTS = ("contiguous", "channels_last", "strided", "transposed")


def quick_first(dtype, layout):
    """Every type, every layout; both varied at once is for the slow run."""
    quick = dtype == FLOATS[0] or layout == LAYOUTS[0]
    return pytest.param(dtype, layout, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(
    ("dtype", "layout"), [quick_first(dtype, layout) for dtype in FLOATS for layout in LAYOUTS]
)
def test_every_split_gives_the_same_bits(ranks, dtype, layout):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    case = Case(
        split=(6,), channels=11, spatial=(7, 9), dtype=dtype, param_dtype=wide, layout=layout,
        offset=100.0, reproducible=True,
    )  # fmt: skip
    seen = []
    for split in SPLITS:
        here = case.with_(split=split)
        results = ranks(len(split), step, here) if len(split) > 1 else [step(0, here)]
        check(here, results, factor=40)
        seen.append(everything(results))
    for split, bits in zip(SPLITS, seen, strict=True):
        for one, other in zip(bits, seen[0], strict=True):
            assert torch.equal(one, other), split


@pytest.mark.parametrize(("channels", "spatial"), [(1, (5, 3)), (40, ()), (3, (1, 1)), (64, (33,))])
@pytest.mark.parametrize("layout", ["contiguous", "transposed"])
def test_other_shapes(ranks, channels, spatial, layout):
    case = Case(
        split=(6,),
        channels=channels,
        spatial=spatial,
        offset=-7.0,
        reproducible=True,
        layout=layout,
    )
    same_bits(ranks, case)


@pytest.mark.parametrize("channels", [1, 5, 40])
def test_a_batch_inside_other_dimensions(ranks, channels):
    """Their strides depend on how many samples a rank has; the bits do not."""
    case = Case(
        split=(6,), channels=channels, spatial=(9, 7), reproducible=True, layout="batch_inside"
    )
    same_bits(ranks, case)


@pytest.mark.parametrize(
    ("layout", "gradient_layout"),
    [("contiguous", "batch_further_inside"), ("channels_last", "batch_inside")],
)
def test_a_gradient_whose_batch_lies_inside_other_dimensions(ranks, layout, gradient_layout):
    case = Case(
        split=(6,), channels=11, spatial=(7, 9), offset=3.0, reproducible=True,
        layout=layout, gradient_layout=gradient_layout,
    )  # fmt: skip
    same_bits(ranks, case)


def same_bits(ranks, case):
    alone = everything([step(0, case)])
    for split in ((1, 5), (2, 0, 4), (1, 2, 1, 2)):
        bits = everything(ranks(len(split), step, case.with_(split=split)))
        assert all(torch.equal(one, other) for one, other in zip(bits, alone, strict=True)), split


@pytest.mark.parametrize(
    ("samples", "spatial", "layout"),
    [
        (3, (70, 80), "contiguous"),
        (3, (70, 80), "channels_last"),
        (300, (3, 4), "contiguous"),
        (4001, (), "contiguous"),
    ],
)
def test_threads_change_nothing(samples, spatial, layout):
    case = Case((samples,), 20, spatial, layout=layout, offset=50.0, reproducible=True)
    before = torch.get_num_threads()
    try:
        seen = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            seen.append(everything([step(0, case)]))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for bits in seen for a, b in zip(bits, seen[0], strict=True))


def test_masked_batches_too(ranks):
    generator = torch.Generator().manual_seed(0)
    x, dy = torch.randn(2, 6, 4, 9, generator=generator) + 5
    mask = torch.rand(6, 9, generator=generator) > 0.4
    mask[2] = False

    def run(rank, split):
        mine = share_of(split, rank)
        layer = syncbn.convert(torch.nn.BatchNorm1d(4), reproducible=True)
        share = x[mine].clone().requires_grad_()
        y = layer(share, mask[mine])
        y.backward(dy[mine])
        return {"y": y.detach(), "dx": share.grad} | layer.state_dict()

    alone = everything([run(0, (6,))])
    for split in ((3, 3), (1, 5), (2, 1, 3), (0, 2, 4)):
        bits = everything(ranks(len(split), run, split))
        assert all(torch.equal(one, other) for one, other in zip(bits, alone, strict=True)), split


def test_gradients_that_keep_their_graph_too(ranks):
    """In float64, whose sums would differ in their last bits."""
    x, dy = torch.randn(2, 6, 3, 4, 5, dtype=torch.float64) + 2

    def run(rank, split, reproducible):
        mine = share_of(split, rank)
        layer = syncbn.SyncBatchNorm2d(3, reproducible=reproducible)
        share = x[mine].clone().requires_grad_()
        (dx,) = torch.autograd.grad(layer(share), share, dy[mine], create_graph=True)
        dx.mul_(2)  # as any other gradient
        dx.square().sum().backward()
        return dx.detach(), share.grad, layer.weight.grad

    (alone, second, weight) = run(0, (6,), True)
    for split in ((3, 3), (1, 5), (2, 0, 4)):
        results = ranks(len(split), run, split, True)
        assert torch.equal(torch.cat([dx for dx, *_ in results]), alone), split
        for got, expected in (
            (torch.cat([dxx for _, dxx, _ in results]), second),
            (sum(dweight for *_, dweight in results), weight),
        ):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    usual = run(0, (6,), False)
    for one, other in zip(usual, (alone, second, weight), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_a_network_in_training_keeps_its_statistics_to_the_bit(ranks):
    """Three layers deep, the first rounding that depended on the split would show."""
    x = torch.randn(6, 3, 8, 8)

    def run(rank, split):
        torch.manual_seed(0)
        layers = [syncbn.SyncBatchNorm2d(3, reproducible=True) for _ in range(3)]
        model = torch.nn.Sequential(*(f for bn in layers for f in (bn, torch.nn.GELU())))
        model(x[share_of(split, rank)])
        return model.state_dict()

    alone = run(0, (6,))
    for split in ((2, 4), (3, 1, 2)):
        for state in ranks(len(split), run, split):
            assert all(torch.equal(state[name], alone[name]) for name in alone)


def test_nan_and_infinity_stay_in_their_channel(ranks):
    def run(rank):
        x = torch.randn(2, 3, 4)
        if rank == 1:
            x[0, 1, 0] = float("nan")
        return syncbn.sync_batch_norm(x, None, None, reproducible=True)

    for y in ranks(2, run):
        assert y[:, 1].isnan().all()
        assert y[:, [0, 2]].isfinite().all()


def test_one_process_alone_is_batch_norm():
    x = laid_out(torch.randn(4, 3, 5, 6), "channels_last")
    ours, torchs = syncbn.SyncBatchNorm2d(3, reproducible=True), torch.nn.BatchNorm2d(3)
    torch.testing.assert_close(ours(x), torchs(x))
    torch.testing.assert_close(ours.state_dict(), torchs.state_dict())
    with pytest.raises(ValueError, match="Expected more than 1 value per channel when training"):
        ours(torch.randn(1, 3, 1, 1))


def test_convert_and_revert_carry_the_option():
    model = syncbn.convert(torch.nn.Sequential(torch.nn.BatchNorm2d(3)), reproducible=True)
    assert model[0].reproducible
    assert not syncbn.convert(model, reproducible=False)[0].reproducible
    assert "reproducible" not in vars(syncbn.revert(model)[0])


def test_data_parallel_refuses():
    layer = syncbn.SyncBatchNorm2d(3, reproducible=True)
    with pytest.raises(ValueError, match="reproducible=True is for ranks"):
        syncbn.DataParallel(layer, ["cpu"] * 2)(torch.randn(4, 3, 2, 2))
