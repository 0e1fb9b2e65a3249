"""N ranks equal one float64 process with the whole batch: the reason to exist."""

from __future__ import annotations

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import syncbn
from support import oracle
from support.cases import Case, check, laid_out, layouts, share_of, step

HALF = (torch.float16, torch.bfloat16)


@st.composite
def case_strategy(draw) -> Case:
    world = draw(st.integers(2, 4))
    spatial = tuple(draw(st.lists(st.integers(1, 5), max_size=3)))
    split = draw(st.lists(st.integers(0, 4), min_size=world, max_size=world))
    values = sum(split)
    for extent in spatial:
        values *= extent
    if values < 2:
        split[draw(st.integers(0, world - 1))] += 2
    dtype = draw(st.sampled_from((torch.float32, torch.float64, *HALF)))
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return Case(
        split=tuple(split),
        channels=draw(st.integers(1, 6)),
        spatial=spatial,
        dtype=dtype,
        param_dtype=draw(st.sampled_from((wide, dtype))),
        layout=draw(st.sampled_from(layouts(2 + len(spatial)))),
        offset=draw(st.sampled_from((0.0, -3.0, 10.0))),
        spread=draw(st.sampled_from((1.0, 0.25, 8.0))),
        weight=draw(st.booleans()),
        bias=draw(st.booleans()),
        momentum=draw(st.sampled_from((0.0, 0.1, 1.0))),
        seed=draw(st.integers(0, 1000)),
    )


@given(case=case_strategy())
@settings(suppress_health_check=[HealthCheck.too_slow])
def test_any_split_equals_the_whole_batch(ranks, case):
    # Few values make dx a small difference of large terms: allow for their size, not for mistakes.
    values = sum(case.split) * torch.Size(case.spatial).numel()
    check(case, ranks(len(case.split), step, case), factor=4 if values > 8 else 40)


@pytest.mark.parametrize("ratio", [1e2, 1e4, 1e6])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_a_mean_far_from_zero(ranks, ratio, dtype, layout):
    case = Case(
        split=(3, 1, 4), spatial=(9, 7), dtype=dtype, param_dtype=dtype, layout=layout, offset=ratio
    )
    # float64 carries the mean itself to 1e-16 of its size, the oracle does not do better.
    check(case, ranks(3, step, case), factor=4 if dtype == torch.float32 else 4 + ratio / 1e3)


@pytest.mark.parametrize(
    "split", [(5, 0), (0, 5), (0, 0, 3), (2, 0, 0, 0), (0, 1, 0, 7), (1, 2, 3, 4), (9, 1, 1, 1)]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_uneven_and_empty_ranks(ranks, split, dtype):
    case = Case(split=split, dtype=dtype)
    check(case, ranks(len(split), step, case), factor=4)


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("spatial", [(), (1, 1)])
def test_one_value_per_channel_on_each_rank(ranks, world, spatial):
    case = Case(split=(1,) * world, spatial=spatial, channels=5)
    check(case, ranks(world, step, case), factor=40)


@pytest.mark.parametrize("spatial", [(), (7,), (4, 3), (2, 3, 4), (2, 3, 2, 2)])
@pytest.mark.parametrize("dtype", [torch.float32, *HALF])
def test_every_layout_is_kept(ranks, spatial, dtype):
    for layout in layouts(2 + len(spatial)):
        case = Case(split=(4, 3), spatial=spatial, dtype=dtype, layout=layout)
        check(case, ranks(2, step, case), factor=4)


def test_ranks_may_differ_in_dtype_and_layout(ranks):
    shares = [
        (torch.float32, "contiguous"),
        (torch.bfloat16, "channels_last"),
        (torch.float16, "transposed"),
    ]
    whole = Case(split=(2, 2, 2), dtype=torch.bfloat16)  # bfloat16 values: exact in float32

    def mixed(rank):
        x, dy, weight, bias = whole.with_(dtype=torch.float32).batch()
        dtype, layout = shares[rank]
        mine = slice(2 * rank, 2 * rank + 2)
        share = laid_out(x.bfloat16()[mine].to(dtype), layout).requires_grad_()
        y = syncbn.sync_batch_norm(share, None, None, weight, bias)
        y.backward(dy[mine].to(dtype))
        assert y.dtype == share.grad.dtype == dtype
        return y.detach(), share.grad, share.detach()

    results = ranks(3, mixed)
    _, dy, weight, bias = whole.with_(dtype=torch.float32).batch()
    seen = torch.cat([x.double() for _, _, x in results])
    expected = oracle.batch_norm(seen, dy, weight, bias)
    for rank, (y, dx, _) in enumerate(results):
        mine = slice(2 * rank, 2 * rank + 2)
        tolerance = {"dtype": torch.bfloat16} if rank else {"dtype": torch.float32}
        oracle.assert_close(y, expected.y[mine], **tolerance)
        # dy itself is rounded to half precision on two of the ranks
        oracle.assert_close(dx, expected.dx[mine], dtype=torch.bfloat16)


def test_a_gradient_with_other_strides_than_the_input(ranks):
    case = Case(split=(2, 3), layout="channels_last")

    def expanded(rank):
        x, _, weight, bias = case.batch()
        mine = laid_out(x[share_of(case.split, rank)], "channels_last").requires_grad_()
        y = syncbn.sync_batch_norm(mine, None, None, weight, bias)
        (y.sum((2, 3)) * torch.arange(3.0)).sum().backward()  # dy is expanded, stride 0
        assert mine.grad.is_contiguous(memory_format=torch.channels_last)
        return mine.grad.contiguous()

    x, _, weight, bias = case.batch()
    dy = torch.arange(3.0).view(1, 3, 1, 1).expand_as(x)
    dx = torch.cat(ranks(2, expanded))
    oracle.assert_close(dx, oracle.batch_norm(x, dy, weight, bias).dx, factor=4)


def test_nan_and_infinity_stay_in_their_channel(ranks):
    def poisoned(rank):
        x = torch.randn(2, 3, 4)
        if rank == 1:
            x[0, 1, 0] = float("nan")
        return syncbn.sync_batch_norm(x, None, None)

    for y in ranks(2, poisoned):
        assert y[:, 1].isnan().all(), "every rank sees it, as one process would"
        assert y[:, [0, 2]].isfinite().all()


@pytest.mark.parametrize("world", [2, 3])
def test_momentum_none_is_the_cumulative_average(ranks, world):
    def steps(rank):
        layer = syncbn.SyncBatchNorm(3, momentum=None, dtype=torch.float64)
        for seed in range(4):
            x, *_ = Case(split=(2,) * world, dtype=torch.float64, seed=seed).batch()
            layer(x[2 * rank : 2 * rank + 2])
        return layer.running_mean, layer.running_var, layer.num_batches_tracked

    expected = [
        oracle.batch_norm(*Case(split=(2,) * world, dtype=torch.float64, seed=seed).batch())
        for seed in range(4)
    ]
    for mean, var, batches in ranks(world, steps):
        oracle.assert_close(mean, torch.stack([e.mean for e in expected]).mean(0))
        oracle.assert_close(var, torch.stack([e.unbiased_var for e in expected]).mean(0))
        assert batches == 4


def test_a_long_run_of_small_batches_keeps_ranks_bit_identical(ranks):
    def run(rank):
        layer = syncbn.SyncBatchNorm(8)
        for step_ in range(200):
            x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step_)) * 3 + 5
            layer(x[2 * rank : 2 * rank + 2])
        return layer.running_mean, layer.running_var

    first, second = ranks(2, run)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])
