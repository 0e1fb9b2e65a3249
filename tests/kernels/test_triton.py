"""The GPU's kernels, run by Triton's interpreter on the CPU: against the oracle and composite.

The interpreter is slow and runs one program after the other, so that cases are tiny and tiles are
made small enough for several programs. Races, barriers and how values are rounded to bfloat16 it
does not show. make test-kernels
"""

from __future__ import annotations

import os
from collections import Counter
from importlib.util import find_spec

import pytest
import torch

import syncbn
from support import magnitudes, oracle
from support.cases import Case, check, laid_out, layouts, step, strides
from support.interpreter import patch_language_once
from support.kernels import whole_step
from support.launches import Others
from syncbn import kernels
from syncbn.kernels import Affine, Running, Statistics, composite
from syncbn.kernels import triton as gpu
from syncbn.kernels.triton import launch, layout, plan, steps
from syncbn.numerics.moments import unpack
from syncbn.tensors.prefix import Prefix, prefixed

pytestmark = [
    pytest.mark.skipif(
        find_spec("triton") is None
        or os.environ.get("TRITON_INTERPRET") != "1"
        or os.environ.get(kernels.VARIABLE) != "triton",
        reason="needs Triton, TRITON_INTERPRET=1 and SYNCBN_KERNELS=triton: make test-kernels",
    ),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # NumPy's, of what is infinite
]

DTYPES = list(oracle.TOLERANCE)
SHAPES = [(70, 3), (5, 2, 3, 7), (2, 2, 7, 3, 2), (9, 1, 17), (5, 66, 1, 1)]


@pytest.fixture(scope="module", autouse=True)
def _fast():
    with pytest.MonkeyPatch.context() as patch:
        patch_language_once(patch)
        yield


@pytest.fixture(params=[4096, 64], ids=["one program", "several programs"])
def tile(request, monkeypatch):
    """As on a device, or so small that groups have several programs of several tiles."""
    plan.make_plan.cache_clear()
    monkeypatch.setattr(plan, "TILE", request.param)
    yield request.param
    plan.make_plan.cache_clear()


small = pytest.mark.parametrize("tile", [64], indirect=True, ids=["several programs"])


def batch(shape, dtype=torch.float32, offset=3.0):
    case = Case(split=shape[:1], channels=shape[1], spatial=shape[2:], dtype=dtype, offset=offset)
    return case.batch()


def wide(dtype):
    return {"dtype": torch.float64 if dtype == torch.float64 else torch.float32}


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [*((shape, torch.float32) for shape in SHAPES), *((SHAPES[1], dtype) for dtype in DTYPES)],
    ids=str,
)
@pytest.mark.usefixtures("tile")
def test_the_four_steps_equal_the_oracle(shape, dtype):
    x, dy, weight, bias = batch(shape, dtype)
    expected = oracle.batch_norm(x, dy, weight, bias)
    for name in ("contiguous", *layouts(len(shape))[3:]):
        y, dx, sums, mean, invstd = whole_step(gpu, laid_out(x, name), dy, weight, bias, 2)
        oracle.assert_close(y, expected.y, factor=4)
        oracle.assert_close(dx, expected.dx, factor=10)
        oracle.assert_close(sums[0], expected.dbias, **wide(dtype), factor=10)
        oracle.assert_close(sums[1], expected.dweight, **wide(dtype), factor=10)
        oracle.assert_close(mean, expected.mean, **wide(dtype))
        oracle.assert_close(invstd, (expected.var + 1e-5).rsqrt(), **wide(dtype))


@pytest.mark.parametrize("offset", [1e4, 1e6])
@pytest.mark.parametrize("shape", [(40, 3), (5, 2, 7, 5)], ids=str)
def test_a_mean_far_from_zero(shape, offset):
    """float32 does not hold the mean: what it lacks is made up for in every step."""
    x, dy, weight, bias = batch(shape, offset=offset)
    y, dx, sums, *_ = whole_step(gpu, x, dy, weight, bias, 2)
    expected = oracle.batch_norm(x, dy, weight, bias)
    oracle.assert_close(y, expected.y, factor=4)
    oracle.assert_close(dx, expected.dx, factor=10)
    oracle.assert_close(sums[0], expected.dbias, dtype=torch.float32, factor=10)
    oracle.assert_close(sums[1], expected.dweight, dtype=torch.float32, factor=10)


@pytest.mark.parametrize("shape", [(5, 2, 7, 5), (40, 6)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("parameters", [(True, False), (False, True), (False, False)], ids=str)
@small
def test_fused_steps_of_one_process(shape, dtype, parameters, tile):
    x, dy, *both = batch(shape, dtype)
    affine = Affine(*(p if has else None for p, has in zip(both, parameters, strict=True)))
    running = Running(torch.zeros(shape[1]), torch.ones(shape[1]), torch.tensor(4))
    y, saved = gpu.batch_norm(x, affine=affine, running=running, eps=1e-5)
    dx, dweight, dbias = gpu.batch_norm_backward(dy, x, affine=affine, saved=saved)
    expected = oracle.batch_norm(x, dy, *affine)
    oracle.assert_close(y, expected.y, factor=4)
    oracle.assert_close(dx, expected.dx, factor=10)
    for found, wanted, has in zip(
        (dweight, dbias), (expected.dweight, expected.dbias), parameters, strict=True
    ):
        if has:
            assert found.dtype == torch.float32
            oracle.assert_close(found, wanted, factor=10)
    mean, var = expected.running(0.0, 1.0, 0.1)
    oracle.assert_close(running.mean, mean)
    oracle.assert_close(running.var, var)
    assert running.batches == 5


@pytest.mark.parametrize(
    ("ranks", "name"),
    [
        *((ranks, "contiguous") for ranks in (1, 3, 64, 65, 130)),
        *((ranks, "channels_last") for ranks in (3, 17, 64)),
    ],
)
@small
def test_sets_of_many_ranks(ranks, name, tile):
    """Rows of a larger tensor, as they arrive behind a header; some of them empty."""
    parts = [torch.randn(1 + rank % 2, 2, 2, 2) * 2 + rank % 7 for rank in range(ranks)]
    parts = [part[:0] if rank % 5 == 1 else part for rank, part in enumerate(parts)]
    received = torch.full((ranks, 3 + 5), torch.nan, dtype=torch.float64)
    received[:, 3:] = torch.stack([composite.measure(part) for part in parts])
    sets = received[:, 3:]
    x = laid_out(parts[0], name)
    weight, bias = torch.rand(2, 2)
    affine = Affine(weight, bias)
    moved = [Running(torch.zeros(2), torch.ones(2), torch.tensor(0)) for _ in range(2)]
    y, found = gpu.normalise(x, sets, affine=affine, running=moved[0], eps=1e-5)
    theirs, expected = composite.normalise(x, sets, affine=affine, running=moved[1], eps=1e-5)
    torch.testing.assert_close(y, theirs)
    torch.testing.assert_close(found, expected, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(moved[0], moved[1])
    whole = torch.cat(parts)
    oracle.assert_close(found.mean, oracle.batch_norm(whole, whole).mean, dtype=torch.float32)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@small
def test_gradients_of_parameters_have_their_dtypes(dtype, tile):
    x, dy, weight, bias = batch((6, 2, 4))
    _, statistics = gpu.normalise(x, gpu.measure(x).unsqueeze(0), eps=1e-5)
    affine = Affine(weight.to(dtype), bias.double())
    sums, dweight, dbias = gpu.gradient_sums_checked(dy, x, affine=affine, statistics=statistics)
    assert torch.equal(sums, gpu.gradient_sums(dy, x, statistics))
    assert (dweight.dtype, dbias.dtype) == (dtype, torch.float64)
    oracle.assert_close(dweight, sums[1])
    assert torch.equal(dbias, sums[0])


@pytest.mark.parametrize("prefix", [Prefix((1.0, 2.0, 3.0, 2.0**48), 4, 256), Prefix((5.0,), 0, 1)])
@pytest.mark.parametrize("name", ["contiguous", "channels_last"])
@small
def test_a_message_begins_with_what_its_carrier_says(prefix, name, tile):
    x, dy, weight, _ = batch((6, 2, 4, 3))
    x, affine = laid_out(x, name), Affine(weight)
    packed = gpu.measure(x)
    _, statistics = gpu.normalise(x, packed.unsqueeze(0), eps=1e-5)
    given = {"affine": affine, "statistics": statistics}
    sums = gpu.gradient_sums(dy, x, statistics)
    for content, message in (
        (packed, gpu.measure_checked(x, affine=affine, running=Running(), prefix=prefix)),
        (sums, gpu.gradient_sums_checked(dy, x, **given, prefix=prefix)[0]),
    ):
        assert torch.equal(message, prefixed(content, prefix))


@pytest.mark.parametrize("ratio", [0.0, 1e2, 1e4])
@pytest.mark.parametrize(
    ("shape", "name"),
    [((4, 3, 64, 65), "contiguous"), ((4, 3, 64, 65), "channels_last"), ((40000, 4), "contiguous")],
    ids=str,
)
def test_statistics_within_a_millionth(ratio, shape, name):
    x = laid_out(torch.randn(shape) + ratio, name)
    count, mean, m2 = unpack(gpu.measure(x))
    values = x.double().transpose(0, 1).flatten(1)
    assert count == values.shape[1]
    torch.testing.assert_close(mean, values.mean(1), rtol=1e-13, atol=1e-7)
    torch.testing.assert_close(m2, values.var(1, correction=0) * count, rtol=1e-6, atol=0)


def test_long_programs_sum_in_float64(monkeypatch):
    """More tiles than GROUP in a program: sums of squares in float32 would be off by 4e-6."""
    plan.make_plan.cache_clear()
    monkeypatch.setattr(plan, "MOST_SPLITS", 1)
    x = torch.randn(1, 1, 2**18) + 1e4
    assert layout.planned(x)[1].per == 64
    _, _, m2 = unpack(gpu.measure(x))
    plan.make_plan.cache_clear()
    torch.testing.assert_close(
        m2 / x.numel(), x.double().var((0, 2), correction=0), rtol=1e-7, atol=0
    )


@pytest.mark.parametrize("shape", [(0, 3, 4), (0, 3), (4, 3, 0), (0, 1, 2)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_empty_input(shape, dtype):
    x = torch.empty(shape, dtype=dtype)
    channels = shape[1]
    packed = gpu.measure(x)
    assert packed.tolist() == [0.0] * (1 + 2 * channels)
    running = Running(torch.full((channels,), 0.5), torch.full((channels,), 2.0), torch.tensor(0))
    y, found = gpu.normalise(x, packed.expand(2, -1), running=running, eps=1e-5)
    assert y.shape == x.shape
    assert running.mean.tolist() == [0.5] * channels
    assert running.var.tolist() == [2.0] * channels
    assert running.batches == 1
    sums = gpu.gradient_sums(x, x, found)
    assert not sums.any()
    dx = gpu.input_gradient(x, x, weight=None, statistics=found, sums=sums)
    assert dx.shape == x.shape


COUNTING = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, *DTYPES]


@pytest.mark.parametrize("momentum", [0.0, 0.25, 1.0, None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_running_statistics(momentum, dtype):
    x = torch.randn(6, 2, 5) * 2 + 1
    sets = gpu.measure(x).unsqueeze(0)
    for counting in COUNTING if dtype == torch.float32 else (torch.int64, None):
        moved = []
        for k in (gpu, composite):
            counter = None if counting is None else torch.tensor(3, dtype=counting)
            mean, var = torch.full((2,), 0.5, dtype=dtype), torch.full((2,), 2.0, dtype=dtype)
            k.normalise(x, sets, running=Running(mean, var, counter, momentum), eps=1e-5)
            assert counter is None or counter == 4
            moved.append((mean, var))
        room = {"rtol": 1e-2, "atol": 0} if dtype == torch.bfloat16 else {}  # the interpreter cuts
        torch.testing.assert_close(*moved, **room)


def test_running_statistics_one_without_the_other():
    x = torch.randn(6, 3, 5)
    var = torch.ones(3)
    gpu.normalise(x, gpu.measure(x).unsqueeze(0), running=Running(None, var), eps=1e-5)
    torch.testing.assert_close(var, 0.9 + 0.1 * x.transpose(0, 1).flatten(1).var(1))


def negative(values):
    """A view that reads with the opposite sign."""
    return torch.complex(torch.zeros_like(values), -values).conj().imag


@pytest.mark.parametrize(
    "how", [negative, lambda t: t.repeat_interleave(2)[::2]], ids=["sign", "gaps"]
)
def test_parameters_and_statistics_that_lie_otherwise(how):
    x, _, weight, bias = batch((6, 3, 5))
    mean, var, sets = how(torch.zeros(3)), how(torch.ones(3)), gpu.measure(x).unsqueeze(0)
    affine, running = Affine(how(weight), how(bias)), Running(mean, var, torch.tensor(0))
    y, _ = gpu.normalise(x, sets, affine=affine, running=running, eps=1e-5)
    expected = oracle.batch_norm(x, x, weight, bias)
    oracle.assert_close(y, expected.y, factor=4)
    for found, wanted in zip((mean, var), expected.running(0.0, 1.0, 0.1), strict=True):
        oracle.assert_close(found.clone(), wanted)


@pytest.mark.parametrize(
    "name", ["contiguous", "strided", "transposed", "channels_last", "batch_inside"]
)
@pytest.mark.parametrize("gradient", ["contiguous", "channels_last", "expanded", "negative"])
def test_layout_of_output_and_gradient_is_the_inputs(name, gradient):
    values, dy, weight, bias = batch((4, 2, 5, 6))
    x = laid_out(values, name)
    if gradient == "expanded":
        dy = dy[:, :1, :1, :1].expand(4, 2, 5, 6)
    elif gradient == "negative":
        dy = negative(dy)
    else:
        dy = laid_out(dy, gradient)
    affine = Affine(weight, bias)
    y, saved = gpu.batch_norm(x, affine=affine, running=Running(), eps=1e-5)
    dx, *_ = gpu.batch_norm_backward(dy, x, affine=affine, saved=saved)
    statistics = Statistics(*saved, count=torch.tensor(120.0, dtype=torch.float64))
    sums = gpu.gradient_sums(dy, x, statistics)
    again = gpu.input_gradient(dy, x, weight=weight, statistics=statistics, sums=sums)
    assert strides(y) == strides(dx) == strides(again) == strides(torch.empty_like(x))
    expected = oracle.batch_norm(values, dy.clone(), weight, bias)
    oracle.assert_close(y, expected.y, factor=4)
    oracle.assert_close(dx, expected.dx, factor=10)
    torch.testing.assert_close(again, dx)


@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e30])
def test_what_has_no_statistics_is_no_number(value):
    """As composite's: never a plausible bias."""
    x = torch.randn(4, 3, 5)
    x[1, 1, 2] = value
    y, found = gpu.normalise(x, gpu.measure(x).unsqueeze(0), eps=1e-5)
    theirs, expected = composite.normalise(x, composite.measure(x).unsqueeze(0), eps=1e-5)
    assert torch.equal(y.isnan(), theirs.isnan())
    assert torch.equal(found.invstd.isnan(), expected.invstd.isnan())
    torch.testing.assert_close(y[:, ::2], theirs[:, ::2])


@pytest.mark.parametrize(
    ("mean", "deviation", "steepness"),
    [(0, 1e18, 1e-12), (1e19, 1e19, 1), (0, 1e20, 1e-10), (2e38, 4e37, 1e3), (0, 1e-12, 1e-12)],
)
def test_values_of_every_size_are_right_or_say_nothing(mean, deviation, steepness):
    x, dy, weight = magnitudes.batch(torch.float32, mean, deviation, steepness, (6, 2, 3, 4))
    y, dx, sums, *_ = whole_step(gpu, x, dy, weight, None)
    expected = oracle.batch_norm(x, dy, weight)
    exact = (expected.y, expected.dx, expected.dbias, expected.dweight)
    for result, right in zip((y, dx, *sums), exact, strict=True):
        for c in range(2):
            got, value = (t[:, c] if t.dim() > 1 else t[c] for t in (result, right))
            close = (got.double() - value).abs() <= 2e-5 * value.abs().max()
            assert close.all() or (deviation > 1e17 and not got.isfinite().any())


@pytest.mark.parametrize("name", ["contiguous", "channels_last"])
@small
def test_the_same_bits_in_every_run(name, tile):
    x, dy, weight, _ = batch((5, 3, 9, 7))
    x = laid_out(x, name)
    results = []
    for _ in range(2):
        y, dx, *rest = whole_step(gpu, x, dy, weight, None)
        results.append((y, dx, *rest))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.fixture
def launched(monkeypatch):
    counts: Counter[str] = Counter()
    start = steps.launch

    def counting(name, *arguments, **options):
        counts[name] += 1
        start(name, *arguments, **options)

    monkeypatch.setattr(steps, "launch", counting)
    return counts


@pytest.mark.parametrize("name", ["contiguous", "channels_last"])
@small
def test_one_launch_a_step_and_nothing_between(name, launched, monkeypatch, tile):
    x, dy, weight, bias = batch((5, 3, 9, 7), torch.float16)
    x, dy = laid_out(x, name), laid_out(dy, name)
    affine = Affine(weight, bias)
    running = Running(torch.zeros(3), torch.ones(3), torch.tensor(0))
    launch.meeting_place(x, 4096, 4096)  # which a first call makes
    monkeypatch.setattr(
        launch, "_start", lambda *_, **__: None
    )  # the interpreter uses torch itself
    sets = torch.zeros(8, 7, dtype=torch.float64)
    with Others() as others:
        packed = gpu.measure_checked(x, affine=affine, running=running)
        _, found = gpu.normalise(x, sets, affine=affine, running=running, eps=1e-5)
        given = {"affine": affine, "statistics": found}
        sums, *_ = gpu.gradient_sums_checked(dy, x, **given)
        gpu.input_gradient(dy, x, weight=weight, statistics=found, sums=sums)
    assert launched == dict.fromkeys(("measure", "normalise", "gradient_sums", "input_gradient"), 1)
    with others:
        _, saved = gpu.batch_norm(x, affine=affine, running=running, eps=1e-5)
        gpu.batch_norm_backward(dy, x, affine=affine, saved=saved)
    assert set(launched.values()) == {2}
    assert others.found == []
    gpu.normalise(x, packed.expand(65, -1), eps=1e-5)
    assert launched["merge_sets"] == 1


@pytest.mark.parametrize("name", ["contiguous", "channels_last", "transposed"])
@pytest.mark.parametrize(
    "changes", [{}, {"bias": False}, {"weight": False, "bias": False}], ids=str
)
def test_a_layer_trains(name, changes, launched):
    case = Case(split=(6,), layout=name, param_dtype=torch.float32, **changes)
    check(case, [step(0, case)], factor=4)
    assert launched["input_gradient"] == 1


def test_a_layer_of_half_precision_trains(launched):
    case = Case(split=(6,), dtype=torch.float16)
    check(case, [step(0, case)], factor=4)
    assert launched["measure"] == 1


def test_gradients_that_can_be_differentiated_again():
    layer = syncbn.SyncBatchNorm(1, eps=1e-3, dtype=torch.float64)
    x = torch.randn(3, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)
