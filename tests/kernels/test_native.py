"""The compiled CPU operators: exact, whatever the number of threads, or cleanly absent."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import syncbn
from support import oracle
from support.cases import laid_out, layouts
from support.kernels import needs_native
from support.scripts import execute
from syncbn import kernels
from syncbn.kernels import Affine, Running, composite, native
from syncbn.numerics.moments import unpack
from syncbn.tensors.prefix import Prefix


@st.composite
def tensors(draw):
    dims = draw(st.integers(2, 5))
    shape = [draw(st.integers(1, 5)), draw(st.sampled_from((1, 2, 3, 8, 17, 64)))]
    shape += draw(st.lists(st.integers(1, 19), min_size=dims - 2, max_size=dims - 2))
    dtype = draw(st.sampled_from((torch.float32, torch.float64, torch.bfloat16, torch.float16)))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 1000)))
    values = torch.randn(shape, generator=generator, dtype=torch.float64) + draw(
        st.sampled_from((0, 5))
    )
    return laid_out(values.to(dtype), draw(st.sampled_from(layouts(dims))))


@needs_native
@given(tensors())
def test_measure_equals_the_specification(x):
    expected = unpack(composite.measure(x.double()))
    count, mean, m2 = unpack(native.measure(x))
    assert count == expected.count
    scale = (expected.m2 / expected.count).sqrt().max().item() + 1e-3
    torch.testing.assert_close(mean, expected.mean, rtol=1e-7, atol=1e-6 * scale)
    torch.testing.assert_close(m2, expected.m2, rtol=2e-6, atol=1e-5 * scale)


@needs_native
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "transposed", "strided"])
@pytest.mark.parametrize("ratio", [0.0, 10.0, 1e3, 1e4])
def test_statistics_within_a_millionth(layout, ratio):
    """Of the float64 statistics of the same float32 data, half a million to ten million values."""
    values = (3, 1700, 1961) if layout == "contiguous" else (3, 400, 419)
    x = torch.randn(1, *values).add_(ratio)
    x = laid_out(x, layout)
    _, mean, m2 = unpack(native.measure(x))
    wide = x.double()
    expected = wide.mean((0, 2, 3))
    var = (wide - expected.view(1, -1, 1, 1)).square().mean((0, 2, 3))
    n = x.numel() // 3
    torch.testing.assert_close(m2 / n, var, rtol=1e-6, atol=0)
    torch.testing.assert_close(mean, expected, rtol=1e-9, atol=1e-6)


@needs_native
@pytest.mark.parametrize(
    "shape", [(2, 64, 56, 56), (1, 1, 700, 700), (3, 5, 1000), (5000, 24), (9, 300, 5, 5)], ids=str
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_number_of_threads_changes_no_bit(shape, dtype):
    x = torch.randn(shape).to(dtype)
    before = torch.get_num_threads()
    results = []
    for layout in layouts(len(shape)):
        share = laid_out(x, layout)
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            leaf = share.detach().requires_grad_()
            layer = syncbn.SyncBatchNorm(shape[1])
            y = layer(leaf)
            y.backward(share)
            tensors = (y, leaf.grad, layer.weight.grad, layer.bias.grad, layer.running_var)
            results.append([native.measure(share), *tensors])
        torch.set_num_threads(before)
        first, *others = results[-3:]
        for other in others:
            assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True)), layout


@needs_native
@pytest.mark.parametrize("shape", [(4, 3, 5, 6), (0, 3, 4), (7, 2)], ids=str)
def test_operators_pass_opcheck(shape):
    x = torch.randn(shape)
    ops = torch.ops.syncbn
    running = [torch.zeros(shape[1]), torch.ones(shape[1]), torch.tensor(0)]
    sets = native.measure(x).unsqueeze(0)
    _, statistics = native.normalise(x, sets, eps=1e-5)
    mean, invstd, count = statistics
    sums = native.gradient_sums(x, x, statistics)
    weight = torch.rand(shape[1])
    received = native.measure_samples(x, None).expand(2, -1).contiguous()
    totals = native.gradient_sums_samples(x, x, statistics, None).expand(2, -1, -1).contiguous()
    for op, args in (
        (ops.measure, (x,)),
        (ops.normalise, (x, sets, weight, None, *running, 0.1, 1e-5)),
        (ops.gradient_sums, (x, x, mean, invstd)),
        (ops.input_gradient, (x, x, weight, mean, invstd, sums, count)),
        (ops.measure_samples, (x, torch.tensor([len(x), 0]))),
        (ops.merge_samples, (received,)),
        (ops.gradient_sums_samples, (x, x, mean, invstd, None)),
        (ops.total_samples, (totals,)),
        (ops.batch_norm, (x, weight, None, *running, 0.1, 1e-5)),
        (ops.batch_norm_backward, (x, x, weight, weight.double(), torch.stack((mean, invstd)))),
        (ops.measure_checked, (x, weight, None, *running, 0.1)),
        (ops.gradient_sums_checked, (x, x, weight, weight.double(), mean, invstd)),
    ):
        if op in (ops.batch_norm, ops.batch_norm_backward) and not len(x):
            continue
        torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))


@needs_native
def test_the_operators_for_ranks_are_the_steps():
    dtype = torch.bfloat16
    x, dy = torch.randn(2, 4, 3, 5, 6, dtype=dtype)
    affine, running = Affine(torch.rand(3), torch.rand(3, dtype=dtype)), Running()
    packed = native.measure_checked(x, affine=affine, running=running)
    assert torch.equal(packed, native.measure(x))
    _, statistics = native.normalise(x, packed.unsqueeze(0), eps=1e-5)
    given = {"affine": affine, "statistics": statistics}
    sums, dweight, dbias = native.gradient_sums_checked(dy, x, **given)
    assert torch.equal(sums, native.gradient_sums(dy, x, statistics))
    assert torch.equal(dweight, sums[1].float())
    assert torch.equal(dbias, sums[0].to(dtype))
    prefix = Prefix((1.0, 2.0), at=1, room=4)
    message = native.measure_checked(x, affine=affine, running=running, prefix=prefix)
    assert torch.equal(message, torch.cat((torch.tensor([0.0, 1, 2, 0]).double(), packed)))
    message, *_ = native.gradient_sums_checked(dy, x, **given, prefix=prefix)
    assert torch.equal(message[4:].view(2, 3), sums)


@needs_native
def test_samples_that_reach_into_each_other_are_refused():
    """By the operators, too: views of them would reach past the last one."""
    x = torch.randn(8, 3, 2).permute(2, 0, 1)  # the two samples' values alternate
    mean = torch.zeros(8, dtype=torch.float64)
    for call in (
        lambda: torch.ops.syncbn.measure_samples(x, None),
        lambda: torch.ops.syncbn.gradient_sums_samples(x, x, mean, mean, None),
    ):
        with pytest.raises(RuntimeError, match="expected samples that lie one after the other"):
            call()


@needs_native
def test_operators_have_no_derivatives_of_their_own():
    """torch's stand-in for one would cost time in every call, and warn in backward."""
    assert not torch.ops.syncbn.measure(torch.randn(4, 3, requires_grad=True)).requires_grad


@needs_native
def test_one_process_still_differentiates_twice():
    layer = syncbn.SyncBatchNorm(2, eps=1e-3, dtype=torch.float64)
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


@needs_native
@pytest.mark.slow
def test_indices_go_past_two_to_the_31():
    with open("/proc/meminfo") as lines:
        available = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    if available < 12 * 2**20:
        pytest.skip("needs 12 GiB of free memory")
    x = torch.zeros(2, 1, 2**30 + 8, dtype=torch.bfloat16)
    x[1, 0, -4:] = 8
    count, mean, _ = unpack(native.measure(x))
    assert count == x.numel()
    torch.testing.assert_close(mean[0] * count, torch.tensor(32.0, dtype=torch.float64))


WHICH = """
import torch
from syncbn import kernels
print(kernels.select_kernels(torch.ones(2, 2)).steps.NAME)
"""


def test_the_environment_chooses():
    (chosen,) = execute(WHICH, SYNCBN_KERNELS="composite")
    assert chosen.stdout.strip() == "composite"
    (chosen,) = execute(WHICH, SYNCBN_KERNELS="fast")
    assert chosen.code != 0
    assert "SYNCBN_KERNELS: expected native, triton or composite, got 'fast'" in chosen.stderr
    (chosen,) = execute(WHICH, SYNCBN_KERNELS="native")
    if native.available():
        assert chosen.stdout.strip() == "native"
    else:
        assert "was not built" in chosen.stderr


def test_other_tensors_are_served_by_the_composite():
    assert composite.supports(torch.empty(2, 2, device="meta"))
    assert kernels.select_kernels(torch.empty(2, 2, device="meta")).steps.NAME == "composite"


@needs_native
@pytest.mark.parametrize("shape", [(1039, 65), (1496, 15), (2, 3, 0)], ids=str)
def test_rows_that_do_not_fill_a_vector(shape):
    """Once overran a buffer, left the last rows unwritten, divided by zero."""
    x = torch.randn(shape)
    if x.numel() == 0:
        saved = torch.ones(2, 3, dtype=torch.float64)
        with pytest.raises(RuntimeError, match="expected a tensor with values"):
            torch.ops.syncbn.batch_norm_backward(x, x, None, None, saved)
        return
    y = syncbn.sync_batch_norm(x, None, None)
    oracle.assert_close(y, oracle.batch_norm(x, x).y)
