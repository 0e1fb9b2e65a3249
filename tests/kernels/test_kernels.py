"""Every implementation of the four steps against the oracle, one device, several sets."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from support import oracle
from support.cases import Case, laid_out, layouts, strides
from support.kernels import needs_native, on_device, whole_step
from syncbn import kernels
from syncbn.kernels import Affine, Running, Statistics, composite, native
from syncbn.numerics.moments import unpack
from syncbn.tensors.layout import samplewise_contiguous

IMPLEMENTATIONS = [
    k.steps
    for k in kernels.IMPLEMENTATIONS
    if k.steps.supports(torch.empty(1, 1)) and not k.steps.unavailable()
]
WITH_SAMPLES = [
    k.steps for k in kernels.IMPLEMENTATIONS if k.samples and k.steps in IMPLEMENTATIONS
]
SHAPES = [(7, 3), (1, 5, 9), (6, 4, 5, 3), (2, 3, 4, 3, 2), (64, 1, 33, 17)]


@pytest.fixture(params=IMPLEMENTATIONS, ids=lambda module: module.NAME)
def implementation(request):
    return on_device(request.param)


each_with_samples = pytest.mark.parametrize("k", WITH_SAMPLES, ids=lambda module: module.NAME)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", list(oracle.TOLERANCE), ids=str)
@pytest.mark.parametrize(("pieces", "offset"), [(1, 3.0), (3, 3.0), (2, 1e6)])
def test_the_four_steps_equal_the_oracle(implementation, shape, dtype, pieces, offset):
    if offset > 100 and dtype in (torch.float16, torch.bfloat16):
        pytest.skip("half precision cannot hold such a mean")
    for layout in layouts(len(shape)):
        case = Case(
            split=shape[:1], channels=shape[1], spatial=shape[2:], dtype=dtype, offset=offset
        )
        x, dy, weight, bias = case.batch()
        x = laid_out(x, layout)
        y, dx, sums, mean, invstd = whole_step(implementation, x, dy, weight, bias, pieces)
        expected = oracle.batch_norm(x, dy, weight, bias)
        # float64 carries a mean to 1e-16 of its size, and the oracle does not do better
        room = offset / 1e3 if dtype == torch.float64 else 0
        oracle.assert_close(y, expected.y, factor=4 + room)
        oracle.assert_close(dx, expected.dx, factor=10 + room)
        wide = {"dtype": torch.float64 if dtype == torch.float64 else torch.float32}
        oracle.assert_close(sums[0], expected.dbias, **wide, factor=10)
        oracle.assert_close(sums[1], expected.dweight, **wide, factor=10 + 20 * room)
        oracle.assert_close(mean, expected.mean, **wide)
        oracle.assert_close(invstd, (expected.var + 1e-5).rsqrt(), **wide, factor=1 + room)


def test_statistics_are_wide_and_packed(implementation):
    x = torch.randn(4, 3, 5, dtype=torch.bfloat16)
    measured = implementation.measure(x)
    assert (measured.dtype, measured.shape) == (torch.float64, (7,))
    assert measured[0] == 20
    assert implementation.measure(x[:0]).tolist() == [0.0] * 7


@pytest.mark.parametrize("ratio", [0.0, 1e2, 1e4, 1e6])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed"])
def test_statistics_at_a_mean_far_from_zero(implementation, ratio, layout):
    x = laid_out(torch.randn(4, 3, 64, 65) + ratio, layout)
    _, mean, m2 = unpack(implementation.measure(x))
    values = x.double()
    expected = values.mean((0, 2, 3))
    m2_expected = (values - expected.view(1, 3, 1, 1)).square().sum((0, 2, 3))
    torch.testing.assert_close(mean, expected, rtol=1e-13, atol=1e-7)
    torch.testing.assert_close(m2, m2_expected, rtol=1e-6, atol=0)


@pytest.mark.parametrize("offset", [0.0, 1e4, 1e6])
@pytest.mark.parametrize(
    ("shape", "layout"),
    [
        ((65536, 8, 3), "contiguous"),
        ((20000, 4, 7, 7), "contiguous"),
        ((300000, 2, 2, 2), "channels_last"),
        ((100000, 4), "contiguous"),
        ((8, 2, 256, 256), "transposed"),
        ((50000, 4, 2, 2), "strided"),
    ],
    ids=str,
)
def test_many_samples_of_few_values(implementation, shape, layout, offset):
    """Sums over the batch must not lose what sums over an image keep."""
    x = laid_out(torch.randn(shape) + offset, layout)
    y, _ = implementation.normalise(x, implementation.measure(x).unsqueeze(0), eps=1e-5)
    oracle.assert_close(y, oracle.batch_norm(x, x).y)


@pytest.mark.parametrize("shape", [(40000, 2), (40000, 2, 1), (20000, 2, 2, 2)], ids=str)
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_sums_over_the_batch_are_wide(implementation, shape, layout):
    """Of whole numbers, whose sums are exact in float64 and round in float32."""
    if layout == "channels_last" and len(shape) != 4:
        pytest.skip("images only")
    half = torch.randint(-500, 500, shape).float()
    x = laid_out(torch.cat((half, -half)), layout)
    dy = laid_out(torch.randint(0, 4096, x.shape).float(), layout)
    count, mean, m2 = unpack(implementation.measure(x))
    statistics = Statistics(mean, torch.ones_like(mean), count)
    sums = implementation.gradient_sums(dy, x, statistics)
    room = 1e-14 if implementation.NAME == composite.NAME else 1e-6
    exact = {"rtol": room, "atol": 0}
    others = (0, *range(2, x.dim()))
    torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=room * 300)
    torch.testing.assert_close(m2, x.double().square().sum(others), **exact)
    torch.testing.assert_close(sums[0], dy.double().sum(others), **exact)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e6, -7.3])
def test_a_constant_channel_has_no_variance(implementation, constant):
    x = torch.full((5, 2, 7, 3), constant)
    _, mean, m2 = unpack(implementation.measure(x))
    assert (m2 >= 0).all()
    torch.testing.assert_close(mean, x.double().mean((0, 2, 3)), rtol=1e-12, atol=0)
    assert (m2 <= 1e-12 * max(1, constant**2)).all()


def test_running_statistics_move_in_their_own_dtype(implementation):
    x = torch.randn(6, 3, 5) * 2 + 1
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        mean, var = torch.full((3,), 0.5, dtype=dtype), torch.full((3,), 2.0, dtype=dtype)
        sets = implementation.measure(x).unsqueeze(0)
        running = Running(mean, var, None, 0.25)
        implementation.normalise(x, sets, running=running, eps=1e-5)
        expected = oracle.batch_norm(x, x).running(0.5, 2.0, 0.25)
        oracle.assert_close(
            mean, expected[0], dtype=max(dtype, torch.float32, key=oracle.TOLERANCE.get)
        )
        oracle.assert_close(
            var, expected[1], dtype=max(dtype, torch.float32, key=oracle.TOLERANCE.get)
        )


def test_the_usual_momentum_is_torchs(implementation):
    x, theirs = torch.randn(6, 3, 5), torch.nn.BatchNorm1d(3)
    theirs(x)
    running = Running(torch.zeros(3), torch.ones(3))
    implementation.normalise(x, implementation.measure(x).unsqueeze(0), running=running, eps=1e-5)
    torch.testing.assert_close(running[:2], (theirs.running_mean, theirs.running_var))


def test_running_statistics_stay_when_every_set_is_empty(implementation):
    x = torch.empty(0, 3, 4)
    mean, var = torch.full((3,), 0.5), torch.full((3,), 2.0)
    sets = implementation.measure(x).expand(2, 7)
    running = Running(mean, var, None, 0.1)
    y, _ = implementation.normalise(x, sets, running=running, eps=1e-5)
    assert y.shape == x.shape
    assert mean.tolist() == [0.5] * 3
    assert var.tolist() == [2.0] * 3


@pytest.mark.parametrize("layout", ["contiguous", "strided", "transposed", "channels_last"])
def test_layout_of_output_and_gradient_is_the_inputs(implementation, layout):
    x = laid_out(torch.randn(4, 3, 5, 6), layout)
    dy = torch.randn(4, 1, 1, 1).expand(4, 3, 5, 6)
    y, found = implementation.normalise(x, implementation.measure(x).unsqueeze(0), eps=1e-5)
    sums = implementation.gradient_sums(dy, x, found)
    dx = implementation.input_gradient(dy, x, weight=None, statistics=found, sums=sums)
    assert strides(y) == strides(dx) == strides(torch.empty_like(x))


def test_the_specification_is_differentiable_twice():
    """gradcheck knows the formulas of the backward steps to be the gradient of the forward ones."""
    weight = torch.rand(2, dtype=torch.float64) + 0.5
    bias = torch.randn(2, dtype=torch.float64)

    def forward(x, weight, bias):
        sets = composite.measure(x).unsqueeze(0)
        return composite.normalise(x, sets, affine=Affine(weight, bias), eps=1e-3)[0]

    x = torch.randn(4, 2, 3, dtype=torch.float64)
    inputs = [t.requires_grad_() for t in (x, weight, bias)]
    assert torch.autograd.gradcheck(forward, inputs)
    assert torch.autograd.gradgradcheck(forward, inputs)


def test_devices_without_float64_keep_statistics_in_float32():
    assert composite.wide_dtype(torch.device("mps")) == torch.float32
    assert composite.wide_dtype(torch.device("cuda")) == torch.float64


def test_the_composite_serves_every_device():
    for device in ("cpu", "cuda", "xpu", "mps", "meta"):
        assert kernels.select_kernels(torch.device(device)).steps.NAME == "composite"


@pytest.mark.parametrize("dtype", list(oracle.TOLERANCE), ids=str)
@pytest.mark.parametrize("lengths", [None, (0, 3, 1, 2)])
@pytest.mark.parametrize("offset", [3.0, 1e4])
@pytest.mark.parametrize(
    ("x_layout", "dy_layout"),
    [
        ("contiguous", "contiguous"),
        ("channels_last", "transposed"),
        ("contiguous", "batch_inside"),
        ("batch_inside", "strided"),
    ],
)
@each_with_samples
def test_samples_are_added_up_to_the_whole(k, dtype, lengths, offset, x_layout, dy_layout):
    case = Case(split=(6,), channels=150, spatial=(3, 5), dtype=dtype, offset=offset)
    x, dy, *_ = case.batch()
    x = samplewise_contiguous(laid_out(x, x_layout))
    dy = samplewise_contiguous(laid_out(dy, dy_layout))
    lengths = None if lengths is None else torch.tensor(lengths)
    received = torch.stack([k.measure_samples(x, lengths), k.measure_samples(x[:0], None)])
    moments = k.merge_samples(received)
    count, mean, m2 = unpack(moments[0])
    expected = oracle.batch_norm(x, dy)
    room = 4 + offset / 1e3
    wide = {"dtype": torch.float64 if dtype == torch.float64 else torch.float32}
    oracle.assert_close(mean, expected.mean, **wide)
    oracle.assert_close(m2 / count, expected.var, **wide, factor=room)
    _, found = k.normalise(x, moments, eps=1e-5)
    represented = k.gradient_sums_samples(dy, x, found, lengths).unsqueeze(0)
    sums = k.total_samples(represented)
    oracle.assert_close(sums[0], expected.dbias, **wide, factor=10)
    oracle.assert_close(sums[1], expected.dweight, **wide, factor=10 * room)
    assert torch.equal(sums, composite.total_samples(represented))
    assert torch.equal(moments, composite.merge_samples(received))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@each_with_samples
def test_samples_of_rows_in_any_place(k, dtype):
    """Rows with gaps, columns apart, a gradient laid out otherwise; lengths that leave none out."""
    x, dy = torch.randn(2, 12, 5, dtype=dtype)
    wide = torch.empty(12, 10, 3, dtype=dtype)[:, ::2, 0].copy_(x)
    lengths = torch.tensor([5, 0, 1, 6])
    found = Statistics(*torch.rand(2, 5, dtype=torch.float64), count=torch.tensor(12.0))
    close = {"rtol": 1e-5, "atol": 1e-5}
    for place in map(samplewise_contiguous, (x, wide)):
        moments = k.merge_samples(k.measure_samples(place, lengths)[None])
        torch.testing.assert_close(moments[0], k.measure(x), **close)
        for gradient in (dy, dy.t().contiguous().t(), dy[:1].expand(12, 5)):
            apart = samplewise_contiguous(gradient)
            sent = k.gradient_sums_samples(apart, place, found, lengths)
            expected = k.gradient_sums(gradient.contiguous(), x, found)
            torch.testing.assert_close(k.total_samples(sent[None]), expected, **close)


@pytest.mark.parametrize("layout", ["strided", "transposed", "batch_inside"])
@each_with_samples
def test_samples_that_do_not_lie_apart_are_refused(k, layout):
    """Their bits might depend on how many there are."""
    x = torch.randn(4, 3, 5, 6)
    other = laid_out(x, layout)
    found = Statistics(*torch.rand(2, 3).double(), count=torch.tensor(120.0))
    words = r"expected samples that lie one after the other without gaps, got strides \(.*"
    words += r"samplewise_contiguous\(\)"
    with pytest.raises(ValueError, match="measure_samples: " + words):
        k.measure_samples(other, None)
    for pair in ((x, other), (other, x)):
        with pytest.raises(ValueError, match="gradient_sums_samples: " + words):
            k.gradient_sums_samples(*pair, found, None)
    assert torch.equal(samplewise_contiguous(other), x)
    k.measure_samples(samplewise_contiguous(other), None)


@needs_native
@pytest.mark.parametrize("lengths", [[2**62] * 4 + [4], [5, -1], [3], [4, 1]])
def test_lengths_that_do_not_add_up(lengths):
    with pytest.raises(RuntimeError, match="expected lengths that add up to 4"):
        native.measure_samples(torch.randn(4, 3), torch.tensor(lengths))


@needs_native
def test_represented_samples_are_the_same_bits_everywhere():
    powers = 10.0 ** torch.arange(-100, 100, dtype=torch.float64)
    x = torch.randn(5, 200, 1, dtype=torch.float64) * powers.view(200, 1)
    x[0, 3] = float("inf")
    x[1, 4] = float("nan")
    x[:, 5] = 0
    x[:, 6] = 1e200  # whose squares are infinite
    sent = [k.measure_samples(x, None) for k in WITH_SAMPLES]
    finite = [part[1:].view(2, 6, 200)[..., 7:] for part in sent]
    assert torch.equal(*finite)
    merged = [k.merge_samples(part[None]) for k, part in zip(WITH_SAMPLES, sent, strict=True)]
    assert torch.equal(*(part.nan_to_num(7e7, 7e7) for part in merged))
    mean, m2 = merged[0][0, 1:].view(2, 200)
    assert m2[3:5].isnan().all()
    assert (mean[6], m2[6]) == (1e200, float("inf"))


CHANGES = {  # by file
    "triton/__init__": ("def measure(x: Tensor)", "def measure(x: Tensor, more: int)"),
    "native": ("def measure(x: Tensor)", "def measure(x: Tensor, more: int)"),
    "composite": ("sums: Tensor\n) -> Tensor:", "total: Tensor\n) -> Tensor:"),
}


@pytest.mark.slow
def test_mypy_compares_every_signature_with_the_interface(tmp_path):
    """A parameter more, another name: neither passes for a kernel. Part of make lint."""
    pytest.importorskip("mypy")
    source = Path(kernels.__file__).parents[1]
    shutil.copytree(
        source, tmp_path / "syncbn", ignore=shutil.ignore_patterns("*.so", "__pycache__")
    )
    for name, (old, new) in CHANGES.items():
        path = tmp_path / "syncbn" / "kernels" / f"{name}.py"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
    command = [sys.executable, "-m", "mypy", "--strict", "--python-version", "3.10"]
    found = subprocess.run(
        [*command, tmp_path / "syncbn" / "kernels"], capture_output=True, text=True, timeout=600
    )
    for name in CHANGES:
        module = name.replace("/", ".").removesuffix(".__init__")
        expected = rf'Argument 1 to "Implementation" has .*\n.*Module "syncbn.kernels.{module}"'
        assert re.search(expected, found.stdout), found.stdout
