"""More ranks than hear each other: what each receives does not grow with their number."""

from __future__ import annotations

from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn

import syncbn
from support import in_threads as in_threads_room
from support import oracle
from support.cases import Case, check, step
from support.compiling import compiled
from support.contract import CHECKS
from support.groups import group_over
from support.in_threads import attempts, in_threads
from support.many import as_many
from syncbn.comm import Caller, Communicator, resolve, sums
from syncbn.comm.headers import MAY, WANTS
from syncbn.diagnose.monitor.exchanging import ExchangeTime, measure_exchange

CHANNELS = 5


def shares(size: int) -> tuple[torch.Tensor, list[int]]:
    """A batch far from zero, and how many samples of it each rank has: 0 to 3."""
    parts = [(rank * 7 + 3) % 4 for rank in range(size)]
    scale = torch.tensor([1.0, 10.0, 0.1, 1.0, 1.0]).view(-1, 1)
    mean = torch.tensor([0.0, 1e4, -3.0, 1e5, 7.0]).view(-1, 1)
    return torch.randn(sum(parts), CHANNELS, 2) * scale + mean, parts


@pytest.mark.parametrize("size", [65, 256, pytest.param(1024, marks=pytest.mark.slow)])
def test_threads_equal_the_whole_batch(size, monkeypatch):
    monkeypatch.setattr(in_threads_room, "LIMIT", 300.0)
    x, parts = shares(size)
    dy, weight, bias = torch.randn_like(x), torch.randn(CHANNELS), torch.randn(CHANNELS)
    xs, dys = x.split(parts), dy.split(parts)

    def train(comm):
        layer = syncbn.SyncBatchNorm1d(CHANNELS, process_group=comm)
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
        own = xs[comm.rank].clone().requires_grad_()
        y = layer(own)
        y.backward(dys[comm.rank])
        return y.detach(), own.grad, layer.weight.grad, layer.running_mean, layer.running_var

    ys, dxs, dweights, means, variances = zip(*in_threads(size, train), strict=True)
    expected = oracle.batch_norm(x, dy, weight, bias)
    mean, var = expected.running(0, 1, 0.1)
    for found, wanted in (
        (torch.cat(ys), expected.y),
        (torch.cat(dxs), expected.dx),
        (torch.stack(dweights).double().sum(0), expected.dweight),
        (means[0], mean),
        (variances[0], var),
    ):
        oracle.assert_close(found, wanted, dtype=torch.float32)
    for found in (means, variances):  # the same bits on all ranks
        assert all(torch.equal(each, found[0]) for each in found)


def test_reproducible_bits_are_those_of_few_ranks():
    x, parts = shares(80)
    dy, whole = torch.randn_like(x), [len(x)]

    def bits(size, split):
        xs, dys = x.split(split), dy.split(split)

        def train(comm):
            layer = syncbn.SyncBatchNorm1d(CHANNELS, process_group=comm, reproducible=True)
            own = xs[comm.rank].clone().requires_grad_()
            y = layer(own)
            y.backward(dys[comm.rank])
            return y.detach(), own.grad, layer.running_mean, layer.running_var

        ys, dxs, means, variances = zip(*in_threads(size, train), strict=True)
        return torch.cat(ys), torch.cat(dxs), means[-1], variances[-1]

    for found, expected in zip(bits(80, parts), bits(1, whole), strict=True):
        assert torch.equal(found, expected)


def received(size: int, steps: int = 3) -> list[int]:
    """Bytes that rank 0 receives in each of some steps, forward and backward."""
    came = [0] * steps
    plain = syncbn.comm.Threads._send, syncbn.comm.Threads._reduce

    def counting(message):
        def counted(self, tensor, operation):
            found = message(self, tensor, operation)
            if self.rank == 0:
                came[self.number_of_step] += found.nbytes
            return found

        return counted

    def train(comm):
        layer = syncbn.SyncBatchNorm1d(32, process_group=comm)
        for number in range(steps):
            comm.number_of_step = number
            layer(torch.randn(2, 32)).sum().backward()

    send, reduce = map(counting, plain)
    with mock.patch.multiple(syncbn.comm.Threads, _send=send, _reduce=reduce):
        in_threads(size, train)
    return came


def test_bytes_do_not_grow_with_the_ranks():
    few, some, many = received(64), received(65), received(130)
    assert some == many
    # Two sums forward, of 1 + C and 2C numbers, and one backward: with headers, and no more room
    # than the largest of them needs.
    assert some[-1] <= 8 * 3 * (sums.HEADER + 64)
    assert some[-1] < few[-1] / 10


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
def test_contract(check):
    with as_many():
        in_threads(3, check)


@pytest.mark.parametrize("exchange", ["gloo", "shared memory"])
@pytest.mark.parametrize("reproducible", [False, True])
def test_processes(ranks, exchange, reproducible):
    case = Case((2, 0, 7), offset=1e3, reproducible=reproducible)

    def run(rank):
        with as_many():
            group = dist.new_group()
            comm = resolve(group) if exchange == "gloo" else syncbn.comm.SharedMemory(group)
            return step(rank, case, comm)

    check(case, ranks(3, run))


@pytest.mark.slow
@pytest.mark.parametrize("size", [16, 32])
def test_processes_in_number(ranks, size):
    """Over gloo: in rows, and in sums as if they were many."""
    case = Case(tuple((rank * 7 + 3) % 4 for rank in range(size)), offset=1e4, seed=size)

    def run(rank):
        rows = step(rank, case, group_over("torch"))
        with as_many():
            return rows, step(rank, case, group_over("torch"))

    for results in zip(*ranks(size, run, timeout=300), strict=True):
        check(case, results)


@pytest.mark.parametrize("size", [3, 300])
def test_no_gradient_flows_back_from_a_sum(size):
    """What a user adds up may want one; collectives have no derivative."""
    with as_many():
        found = in_threads(2, lambda comm: comm.all_reduce(torch.ones(size, requires_grad=True)))
    assert not any(total.requires_grad for total in found)


def test_integers_are_added_up_as_such():
    wide = torch.tensor([2**60 + 1, -3])
    with as_many():
        found = in_threads(3, lambda comm: comm.all_reduce(wide))
    assert all(torch.equal(total, 3 * wide) for total in found)


class Own(Communicator):
    """Somebody's own communicator, which keeps the contract and no more."""

    def __init__(self, comm):
        self.comm = comm

    rank = property(lambda self: self.comm.rank)
    size = property(lambda self: self.comm.size)

    def all_gather(self, tensor):
        raise AssertionError("rows of many ranks")

    def all_reduce(self, tensor):
        return self.comm.all_reduce(tensor)


def test_somebodys_own_communicator():
    """Of which a rank that wants no gradient takes part in the others' backward."""
    x = torch.randn(9, CHANNELS)
    xs = x.split([4, 0, 5])

    def train(comm):
        layer = syncbn.SyncBatchNorm1d(CHANNELS, affine=False, process_group=Own(comm))
        own = xs[comm.rank].clone().requires_grad_(comm.rank == 0)
        y = layer(own)
        y.square().mul(y).sum().backward()
        return y.detach(), own.grad

    with as_many():
        (_, dx), *_ = in_threads(3, train)
    whole = x.clone().double().requires_grad_()
    y = nn.functional.batch_norm(whole, None, None, training=True)
    y.pow(3).sum().backward()
    torch.testing.assert_close(dx.double(), whole.grad[:4], rtol=1e-5, atol=1e-5)


def test_derivatives_of_higher_order():
    x = torch.randn(6, 2, dtype=torch.float64)
    xs = x.split([1, 5])

    def hessian_of(y, given):
        (first,) = torch.autograd.grad(y.pow(3).sum(), given, create_graph=True)
        return torch.autograd.grad(first.square().sum(), given)[0]

    def differentiate(comm):
        layer = syncbn.SyncBatchNorm1d(2, process_group=comm, dtype=torch.float64)
        own = xs[comm.rank].clone().requires_grad_()
        return hessian_of(layer(own), own)

    with as_many():
        found = torch.cat(in_threads(2, differentiate))
    whole = x.clone().requires_grad_()
    expected = hessian_of(nn.functional.batch_norm(whole, None, None, training=True), whole)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("backend", "reproducible"),
    [
        ("aot_eager", False),
        ("aot_eager", True),
        pytest.param("inductor", True, marks=pytest.mark.slow),
    ],
)
def test_one_graph(ranks, backend, reproducible):
    x = torch.randn(8, 3)
    share = x.split([3, 5])

    def run(rank):
        with as_many():
            group = dist.new_group()
            layer = syncbn.SyncBatchNorm1d(3, process_group=group, reproducible=reproducible)
            own = share[rank].clone().requires_grad_()
            call, counter = compiled(layer, backend)
            y = call(own)
            y.pow(3).sum().backward()
            assert counter.frame_count == 1
            return y.detach(), own.grad, layer.running_var

    ys, dxs, (var, other) = zip(*ranks(2, run), strict=True)
    whole = x.clone().requires_grad_()
    expected = nn.BatchNorm1d(3)
    y = expected(whole)
    y.pow(3).sum().backward()
    for found, wanted in (
        (torch.cat(ys), y),
        (torch.cat(dxs), whole.grad),
        (var, expected.running_var),
        (other, var),
    ):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


# --- out of step -------------------------------------------------------------------------------


def test_ranks_out_of_step_say_who_calls_what():
    """And go on together, in frames of any size."""

    def train(comm):
        layers = syncbn.convert(
            nn.ModuleDict({"a": nn.BatchNorm1d(4), "b": nn.BatchNorm1d(4)}), comm
        )
        x = torch.randn(3, 4, requires_grad=True)
        layers["a"](x).sum().backward()
        with pytest.raises(syncbn.DesyncError) as caught:
            layers["b" if comm.rank == 40 else "a"](x)
        layers["b"](x).sum().backward()
        return str(caught.value), caught.value.ranks, caught.value.layer

    found = in_threads(70, train)
    (text,) = {text for text, *_ in found}
    assert "ranks 0–39, 41–69: all_reduce of (5,) float64, forward of layer 'a'" in text
    assert "; rank 40: all_reduce of (5,) float64, forward of layer 'b'" in text
    assert [layer for *_, layer in found] == ["b" if rank == 40 else "a" for rank in range(70)]
    assert "layer 'b'" in found[0][1][40]


@pytest.mark.parametrize(
    ("operation", "words"), [("all_gather", "all_gather of (3,)"), ("backward", "backward of")]
)
def test_different_collectives_meet(operation, words):
    """Whatever a rank calls begins with the same message."""

    def train(comm):
        layer = syncbn.SyncBatchNorm1d(4, process_group=comm)
        y = layer(torch.randn(3, 4, requires_grad=True)).sum()
        calls = {"all_gather": lambda: comm.all_gather(torch.ones(3)), "backward": y.backward}
        call = calls[operation] if comm.rank == 1 else lambda: layer(torch.randn(3, 4))
        with pytest.raises(syncbn.DesyncError) as caught:
            call()
        return caught.value.ranks

    with as_many():
        for said in in_threads(3, train):
            assert words in said[1]
            assert "forward of" in said[0]


def test_layers_of_other_models_are_one_where_rows_say_so():
    """Numbers that count different layers mean nothing to each other: asked once, then known."""

    def call(comm):
        caller = Caller("forward", "a layer", 3, number=comm.rank, trail=comm.rank)
        asked = []
        with mock.patch.object(comm, "_send", wraps=comm._send) as send:
            for _ in range(3):
                total = comm.reduce(torch.ones(3), caller, MAY).rows
                asked.append(send.call_count)
        return total.tolist(), asked

    with as_many():
        assert in_threads(3, call) == [([3.0] * 3, [1, 1, 1])] * 3


def test_a_gradient_that_some_cannot_follow():
    def call(comm):
        flags = WANTS | MAY if comm.rank else 0
        comm.reduce(torch.ones(3), Caller("forward", "a layer", 3, True), flags)

    with as_many():
        found = attempts(3, call)
    assert all(isinstance(error, syncbn.DesyncError) for error in found)
    assert "gradients off" in found[0].ranks[0]
    assert "wanted" in found[0].ranks[2]


def test_a_monitor_asks_what_sums_cost():
    """Of which a layer of many ranks takes three, of 5C numbers."""

    def measured(comm):
        with mock.patch.object(comm, "all_gather", side_effect=AssertionError):
            return measure_exchange(comm, torch.device("cpu"))

    with as_many():
        found = in_threads(3, measured)
    assert {each.forward for each in found} == {2}
    assert ExchangeTime(1.0, 0.1, forward=2).of_layer(10) == pytest.approx(3 + 0.1 * 50)
    assert ExchangeTime(1.0, 0.1).of_layer(10) == pytest.approx(2 + 0.1 * 40)
