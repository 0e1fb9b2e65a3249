"""Running statistics: how they move, what counts the batches, views that read with another sign."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import syncbn
from support import oracle
from support.layers import Pair, Silent
from syncbn import kernels

PATHS = ["alone", "of two", "reproducible", "replicas", "masked"]


@pytest.fixture(params=PATHS)
def path(request, implementation):
    """How a layer is made and called."""

    def make(**options):
        name = request.param
        options |= {"process_group": Pair()} if name == "of two" else {}
        layer = syncbn.SyncBatchNorm(3, reproducible=name == "reproducible", **options)
        call = syncbn.DataParallel(layer, ["cpu"] * 2) if name == "replicas" else layer
        if name == "masked":
            return layer, lambda x: layer(x, torch.ones(x.shape[0], x.shape[2]) > 0)
        return layer, call

    make.torchs = request.param in ("alone", "masked") and "native" not in kernels._usable
    make.batch = lambda x: torch.cat((x, x)) if request.param == "of two" else x
    return make


@pytest.mark.parametrize(("momentum", "rate"), [(None, 1.0), (1.0, 1.0), (0.1, 0.1)])
def test_what_is_small_beside_the_old_value_is_kept(path, momentum, rate):
    layer, call = path(momentum=momentum, statistics_dtype=torch.float64)
    x = torch.randn(8, 3, 5) * 1e-7
    call(x)
    expected = oracle.batch_norm(path.batch(x), path.batch(x))
    var = (1 - rate) + rate * expected.unbiased_var
    torch.testing.assert_close(layer.running_var, var, rtol=1e-6, atol=0)
    torch.testing.assert_close(layer.running_mean, rate * expected.mean, rtol=1e-5, atol=0)


def test_a_momentum_of_zero_moves_nothing(path):
    if path.torchs:
        pytest.skip("torch's operator multiplies the infinite by zero")
    layer, call = path(momentum=0.0)
    call(torch.full((4, 3, 5), torch.inf))
    assert layer.running_mean.tolist() == [0.0] * 3
    assert layer.running_var.tolist() == [1.0] * 3
    assert layer.num_batches_tracked == 1


COUNTERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
COUNTERS += [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("momentum", [0.1, None])
@pytest.mark.parametrize("start", [0, 127, 256, 2048])
def test_every_counter_counts_as_torchs(path, momentum, start):
    for dtype in COUNTERS:
        if momentum is None and torch.tensor(start).to(dtype) != start:
            continue
        layer, call = path(momentum=momentum)
        theirs = nn.BatchNorm1d(3, momentum=momentum)
        for each in (layer, theirs):
            each.num_batches_tracked = torch.tensor(start).to(dtype)
        for _ in range(2):
            if momentum is None and float(theirs.num_batches_tracked + 1) <= 0:
                break
            x = torch.randn(6, 3, 5)
            call(x), theirs(path.batch(x))
            assert layer.num_batches_tracked.dtype == dtype
            assert torch.equal(layer.num_batches_tracked, theirs.num_batches_tracked)
            torch.testing.assert_close(layer.running_mean, theirs.running_mean)
            torch.testing.assert_close(layer.running_var, theirs.running_var)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_a_counter_of_another_type_in_a_graph(momentum):
    for dtype in (torch.int32, torch.float32):
        layer = syncbn.SyncBatchNorm(3, momentum=momentum)
        layer.num_batches_tracked = torch.tensor(3).to(dtype)
        other = copy.deepcopy(layer)
        torch._dynamo.reset()
        compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
        x = torch.randn(6, 3, 5)
        layer(x), compiled(x)
        for mine, its in zip(layer.buffers(), other.buffers(), strict=True):
            assert mine.dtype == its.dtype
            torch.testing.assert_close(mine, its)


UNUSABLE = {
    "complex": (torch.tensor(0j), TypeError, "got torch.complex64"),
    "bool": (torch.tensor(False), TypeError, "got torch.bool"),
    "unsigned": (torch.tensor(0, dtype=torch.uint16), TypeError, "got torch.uint16"),
    "two numbers": (torch.tensor([0, 0]), ValueError, "got shape (2,) on cpu"),
    "no number": (torch.zeros(0).long(), ValueError, "got shape (0,) on cpu"),
    "elsewhere": (torch.tensor(0, device="meta"), ValueError, "got shape () on meta"),
    "no tensor": (3, TypeError, "got int"),
}


@pytest.mark.parametrize("case", UNUSABLE)
@pytest.mark.parametrize("group", [None, Silent()], ids=["alone", "in a group"])
@pytest.mark.usefixtures("implementation")
def test_what_cannot_count_is_refused_before_any_message(case, group):
    counter, error, got = UNUSABLE[case]
    layer = syncbn.SyncBatchNorm(3, process_group=group)
    del layer.num_batches_tracked
    layer.num_batches_tracked = counter
    with pytest.raises(
        error, match=r"^sync_batch_norm: expected num_batches_tracked as "
    ) as caught:
        layer(torch.randn(4, 3, 5))
    assert got in str(caught.value)
    assert "torch.tensor(0) is usual" in str(caught.value)
    assert layer.running_var.tolist() == [1.0] * 3


@pytest.mark.parametrize("counter", [torch.tensor(255, dtype=torch.uint8), torch.tensor(-1)])
@pytest.mark.parametrize("group", [None, Silent()], ids=["alone", "in a group"])
@pytest.mark.usefixtures("implementation")
def test_an_average_over_a_count_that_comes_to_nothing(counter, group):
    """torch's layer divides by zero, after it has counted."""
    layer = syncbn.SyncBatchNorm(3, momentum=None, process_group=group)
    layer.num_batches_tracked = counter.clone()
    text = (
        f"counts on to more than 0.*got {counter} of {counter.dtype}; torch.tensor.0. starts anew"
    )
    with pytest.raises(
        ValueError, match=rf"^sync_batch_norm: expected num_batches_tracked.*{text}"
    ):
        layer(torch.randn(4, 3, 5))
    assert layer.num_batches_tracked == counter
    assert layer.running_var.tolist() == [1.0] * 3


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_that_read_with_the_opposite_sign(path, momentum):
    layer, call = path(momentum=momentum)
    plain, _ = path(momentum=momentum)
    memory = torch.tensor([1.0, -2.0, 3.0])
    layer.running_mean, layer.running_var = torch._neg_view(memory), torch._neg_view(-torch.ones(3))
    plain.running_mean = -memory
    x = torch.randn(4, 3, 5)
    torch.testing.assert_close(call(x), plain(x))
    torch.testing.assert_close(layer.running_mean.resolve_neg(), plain.running_mean)
    torch.testing.assert_close(layer.running_var.resolve_neg(), plain.running_var)
    torch.testing.assert_close(memory, -plain.running_mean)
    assert layer.num_batches_tracked == 1
    torch.testing.assert_close(layer.eval()(x), plain.eval()(x))


def test_other_tensors_that_read_with_the_opposite_sign(path):
    layer, call = path()
    x, dy, weight, bias = torch.randn(4, 3, 5), torch.randn(4, 3, 5), torch.rand(3), torch.randn(3)
    results = []
    for sign in (torch.clone, lambda t: torch._neg_view(-t)):
        layer.reset_running_stats()
        layer.weight, layer.bias = nn.Parameter(sign(weight)), nn.Parameter(sign(bias))
        leaf = sign(x.detach()).requires_grad_()
        y = call(leaf)
        y.backward(sign(dy))
        tensors = (y, leaf.grad, layer.weight.grad, layer.bias.grad, layer.running_var)
        results.append([tensor.detach().clone() for tensor in tensors])
    for plain, viewed in zip(*results, strict=True):
        torch.testing.assert_close(plain, viewed)
