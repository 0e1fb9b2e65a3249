"""Ranks that are threads: what they compute is one process's, and none is ever left waiting."""

from __future__ import annotations

import copy
import re
import signal
import threading
import time

import oracle
import pytest
import torch
from contract import check_interleaved
from in_threads import attempts, in_threads, outcomes, share
from torch import nn

import syncbn
from syncbn.comm import threads

SOON = 5.0  # seconds: what "at once" may take on a busy machine


def only_text(results, ranks=None):
    """The one text that these ranks' RuntimeErrors have."""
    results = results if ranks is None else [results[rank] for rank in ranks]
    assert all(type(error) is RuntimeError for error in results), results
    (text,) = {str(error) for error in results}
    assert "make another with syncbn.comm.threads" in text
    return text


def late(comm):
    """Ranks arrive in an order that changes from call to call."""
    time.sleep(0.001 * ((7 * comm.rank + threading.get_ident()) % 5))


# What they compute


def test_a_rank_knows_itself():
    comms = threads(3)
    assert [(comm.rank, comm.size) for comm in comms] == [(0, 3), (1, 3), (2, 3)]
    assert repr(comms[1]) == "Threads(rank=1, size=3)"
    layer = syncbn.SyncBatchNorm2d(3, process_group=comms[0])
    assert "world_size=1, group_size=3" in repr(layer)
    assert copy.deepcopy(layer).process_group is comms[0]


def test_groups_start_no_threads():
    before = threading.active_count()
    comms = threads(3)
    assert threading.active_count() == before
    outcomes(lambda comm: comm.all_reduce(torch.ones(2)), [(comm,) for comm in comms])
    assert threading.active_count() == before


def test_one_rank_is_alone():
    (comm,) = threads(1)
    x = torch.randn(4, 3)
    with comm:
        assert torch.equal(comm.all_gather(x), x.unsqueeze(0))
        assert torch.equal(comm.all_reduce(x), x)


def test_sums_are_taken_in_the_order_of_ranks():
    """float32 addition isn't associative: the order of arrival would show."""

    def total(comm):
        generator = torch.Generator().manual_seed(comm.rank)
        mine = torch.randn(500, generator=generator) * 10.0 ** (comm.rank - 2)
        sums = []
        for _ in range(10):
            late(comm)
            sums.append(comm.all_reduce(mine))
        return sums

    first, *others = [sum for sums in in_threads(5, total) for sum in sums]
    assert all(torch.equal(first, other) for other in others)


def test_groups_interleave():
    pairs, world = [threads(2), threads(2)], threads(4)

    def interleaved(rank):
        check_interleaved(pairs[rank // 2][rank % 2], world[rank])

    assert outcomes(interleaved, [(rank,) for rank in range(4)]) == [None] * 4


@pytest.mark.parametrize("split", [(2, 2), (3, 1), (4, 0, 1), (1, 1, 1, 1), (0, 5)], ids=str)
@pytest.mark.parametrize("offset", [0.0, 1e6])
def test_a_step_equals_the_whole_batchs(split, offset):
    x = torch.randn(sum(split), 3, 4, 5, dtype=torch.float64) + offset
    dy = torch.randn_like(x)

    def step(comm):
        layer = syncbn.SyncBatchNorm2d(3, dtype=torch.float64, process_group=comm)
        mine = share(x, split, comm.rank).clone().requires_grad_()
        y = layer(mine)
        y.backward(share(dy, split, comm.rank))
        return y.detach(), mine.grad, layer.weight.grad, layer.running_mean, layer.running_var

    y, dx, dweight, means, variances = zip(*in_threads(len(split), step), strict=True)
    expected = oracle.batch_norm(x, dy)
    room = 1 if offset == 0 else 1e4  # float64's own rounding of x − mean at this offset
    oracle.assert_close(torch.cat(y), expected.y, factor=room)
    oracle.assert_close(torch.cat(dx), expected.dx, factor=room)
    oracle.assert_close(sum(dweight), expected.dweight, factor=room)
    mean, var = expected.running(0.0, 1.0, 0.1)
    oracle.assert_close(means[0], mean)
    oracle.assert_close(variances[0], var, factor=room)
    assert all(torch.equal(means[0], other) for other in means)
    assert all(torch.equal(variances[0], other) for other in variances)


def network():
    torch.manual_seed(1)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Conv2d(4, 3, 2),
        nn.BatchNorm2d(3, momentum=None),
        nn.Flatten(),
        nn.Linear(3 * 3 * 3, 2),
    ).double()


def train(model, batches, whole, reduce):
    """Three steps of SGD on mean losses of the whole batch."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.3, momentum=0.9)
    for x, target in batches:
        optimiser.zero_grad()
        loss = nn.functional.cross_entropy(model(x), target, reduction="sum") / whole
        loss.backward()
        for parameter in model.parameters():
            parameter.grad = reduce(parameter.grad)
        optimiser.step()
    return model.state_dict()


@pytest.mark.parametrize("split", [(3, 2, 1), (4, 0, 2)], ids=str)
def test_training_in_three_threads_equals_one_process(split):
    batches = [(torch.randn(6, 2, 6, 6).double(), torch.randint(2, (6,))) for _ in range(3)]
    expected = train(network(), batches, 6, lambda gradient: gradient)
    model = network()

    def run(comm):
        mine = [tuple(share(tensor, split, comm.rank) for tensor in batch) for batch in batches]
        replica = syncbn.convert(copy.deepcopy(model), comm)
        return train(replica, mine, 6, comm.all_reduce)

    first, *others = in_threads(3, run)
    torch.testing.assert_close(first, expected, rtol=1e-9, atol=1e-11)
    for other in others:
        assert all(torch.equal(first[name], value) for name, value in other.items())


def test_layers_of_several_groups_in_one_net():
    """Pairs in the first layer, all four in the second; gradients as one graph has them."""
    x = torch.randn(8, 3, 5, dtype=torch.float64)
    pairs, world = [threads(2), threads(2)], threads(4)
    norm = nn.functional.batch_norm

    def net(x, first, second):
        return second(first(x).tanh()).pow(3)

    def run(rank):
        layers = [
            syncbn.SyncBatchNorm1d(3, dtype=torch.float64, process_group=comm)
            for comm in (pairs[rank // 2][rank % 2], world[rank])
        ]
        mine = x[2 * rank : 2 * rank + 2].clone().requires_grad_()
        net(mine, *layers).sum().backward()
        return mine.grad

    whole = x.clone().requires_grad_()
    halves = torch.cat([norm(half, None, None, training=True) for half in whole.chunk(2)])
    norm(halves.tanh(), None, None, training=True).pow(3).sum().backward()
    results = outcomes(run, [(rank,) for rank in range(4)])
    torch.testing.assert_close(torch.cat(results), whole.grad, rtol=1e-9, atol=1e-10)


# None is left waiting


def test_a_rank_that_never_arrives():
    comms = threads(3, timeout=0.3)
    start = time.monotonic()
    results = outcomes(lambda comm: comm.all_gather(torch.ones(5)), [(comms[0],), (comms[2],)])
    assert 0.2 < time.monotonic() - start < SOON
    text = only_text(results)
    assert "all_gather: rank 1 has not arrived within 0.3 s" in text
    assert "rank 0: all_gather of (5,) float32; rank 1: no call; rank 2: all_gather" in text
    assert "run every rank in a thread of its own, forward and backward" in text
    with pytest.raises(RuntimeError, match="rank 1 has not arrived"):
        comms[1].all_gather(torch.ones(5))  # too late: the others have gone


def test_one_thread_for_two_ranks():
    comms = threads(2, timeout=0.2)
    with pytest.raises(RuntimeError, match=r"rank 1 has not arrived.*in a thread of its own"):
        syncbn.sync_batch_norm(torch.randn(2, 3), None, None, group=comms[0])


def test_two_graphs_in_one_backward():
    """Threads run the forward, one thread the backward of all: it would wait for itself."""
    comms = threads(2, timeout=0.3)

    def forward(comm):
        x = torch.randn(2, 3, requires_grad=True)
        return syncbn.sync_batch_norm(x, None, None, group=comm).square().sum()

    losses = outcomes(forward, [(comm,) for comm in comms])
    (error,) = outcomes(lambda loss: loss.backward(), [(sum(losses),)])
    assert re.search(r"all_reduce: rank [01] has not arrived", only_text([error]))


def test_a_rank_that_raises_ends_the_others_at_once():
    def run(comm):
        comm.all_reduce(torch.ones(2))
        if comm.rank == 1:
            raise ZeroDivisionError("a bad batch")
        comm.all_reduce(torch.ones(2))

    start = time.monotonic()
    results = attempts(3, run, timeout=60)
    assert time.monotonic() - start < SOON
    assert type(results[1]) is ZeroDivisionError, "its own exception, untouched"
    assert "rank 1 raised ZeroDivisionError: a bad batch" in only_text(results, (0, 2))


def test_a_rank_that_raises_inside_backward():
    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, dy):
            raise ArithmeticError("overflow")

    def run(comm):
        x = torch.randn(2, 3, requires_grad=True)
        y = syncbn.sync_batch_norm(x, None, None, group=comm)
        (Failing.apply(y) if comm.rank == 0 else y).sum().backward()

    results = attempts(2, run, timeout=60)
    assert type(results[0]) is ArithmeticError
    assert "rank 0 raised ArithmeticError: overflow" in only_text(results, (1,))


def test_abort_ends_every_rank_now_and_later():
    comms = threads(3, timeout=60)

    def run(comm):
        if comm.rank == 0:
            time.sleep(0.1)
            comm.abort("the loss is not finite")
        comm.all_reduce(torch.ones(2))

    start = time.monotonic()
    text = only_text(outcomes(run, [(comm,) for comm in comms]))
    assert time.monotonic() - start < SOON
    assert "rank 0 aborted: the loss is not finite" in text
    comms[1].abort("another reason")
    for use in (lambda: comms[2].all_gather(torch.ones(9)), comms[1].__enter__):
        with pytest.raises(RuntimeError, match="the loss is not finite"):
            use()


@pytest.mark.parametrize("leaver_is_first", [True, False])
def test_a_rank_that_leaves_early_ends_the_others_at_once(leaver_is_first):
    def run(comm):
        comm.all_gather(torch.ones(2))
        if (comm.rank == 2) == leaver_is_first:
            time.sleep(0.1)
        if comm.rank != 2:
            comm.all_reduce(torch.ones(2))

    start = time.monotonic()
    results = attempts(3, run, timeout=60)
    assert time.monotonic() - start < SOON
    assert results[2] is None
    text = only_text(results, (0, 1))
    assert "all_reduce: rank 2 left the 'with comm:' block before the others" in text


def test_blocks_may_follow_each_other():
    comms = threads(3, timeout=SOON)

    def run(comm):
        for i in range(50):
            with comm:
                assert comm.all_reduce(torch.tensor(float(i))) == 3 * i

    for _ in range(2):
        assert outcomes(run, [(comm,) for comm in comms]) == [None] * 3


def test_a_block_that_only_one_rank_enters_again():
    comms = threads(2, timeout=0.2)
    with comms[0]:
        pass
    with pytest.raises(RuntimeError, match=r"rank 0 is back, but rank 1 has not left within 0\.2"):
        comms[0].__enter__()


CALLS = {
    "operation": (
        [lambda c: c.all_gather(torch.ones(4)), lambda c: c.all_reduce(torch.ones(4))],
        "rank 0: all_gather of (4,) float32; rank 1: all_reduce of (4,) float32",
    ),
    "shape": (
        [lambda c: c.all_gather(torch.ones(4)), lambda c: c.all_gather(torch.ones(2, 2))],
        "rank 0: all_gather of (4,) float32; rank 1: all_gather of (2, 2) float32",
    ),
    "dtype": (
        [lambda c: c.all_reduce(torch.ones(4)), lambda c: c.all_reduce(torch.ones(4).bfloat16())],
        "rank 0: all_reduce of (4,) float32; rank 1: all_reduce of (4,) bfloat16",
    ),
}


@pytest.mark.parametrize(("calls", "listed"), CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("order", [0, 1])
def test_calls_that_differ_are_named_on_every_rank(calls, listed, order):
    def run(comm):
        if comm.rank == order:
            time.sleep(0.05)
        calls[comm.rank](comm)

    start = time.monotonic()
    text = only_text(attempts(2, run, timeout=60))
    assert time.monotonic() - start < SOON
    assert f"ranks call different collectives: {listed}; every rank must" in text


def test_layers_that_differ_between_ranks():
    def run(comm):
        channels = 3 if comm.rank == 0 else 4
        syncbn.SyncBatchNorm(channels, process_group=comm)(torch.randn(2, channels))

    assert "all_gather of (8,) float64; rank 1: all_gather of (10,)" in only_text(attempts(2, run))


def test_two_threads_with_one_ranks_communicator():
    comm, _, _ = threads(3, timeout=60)
    text = only_text(outcomes(lambda c: c.all_gather(torch.ones(1)), [(comm,), (comm,)]))
    assert "rank 0 is in all_gather already, in another thread" in text


def test_tensors_elsewhere_are_refused_on_every_rank():
    def run(comm):
        comm.all_reduce(torch.ones(3, device="meta" if comm.rank == 1 else "cpu"))

    text = only_text(attempts(2, run, timeout=60))
    assert (
        "expected a tensor on the CPU, got one on meta on rank 1; torch runs the backward" in text
    )
    assert "Move the model to the CPU, or run a process per device" in text


def test_an_interrupt_while_waiting_ends_the_others():
    """Ctrl-C reaches the main thread, here rank 0 of three."""
    comms = threads(3, timeout=60)
    found = []
    other = threading.Thread(
        target=lambda: found.extend(outcomes(comms[1].all_gather, [(torch.ones(2),)])), daemon=True
    )
    other.start()
    main = threading.main_thread().ident
    timer = threading.Timer(0.2, signal.pthread_kill, (main, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        comms[0].all_gather(torch.ones(2))
    other.join(SOON)
    assert "all_gather: rank 0 raised KeyboardInterrupt" in only_text(found)


@pytest.mark.parametrize(
    ("arguments", "error", "text"),
    [
        ({"world_size": 0}, ValueError, "world_size of at least 1, got 0"),
        ({"world_size": 2.0}, TypeError, "expected an int as world_size, got float"),
        ({"world_size": True}, TypeError, "expected an int as world_size, got bool"),
        ({"world_size": 2, "timeout": 0}, ValueError, "expected 0 < timeout"),
        ({"world_size": 2, "timeout": float("inf")}, ValueError, "got inf; it is in seconds"),
        ({"world_size": 2, "timeout": float("nan")}, ValueError, "got nan"),
    ],
)
def test_options(arguments, error, text):
    with pytest.raises(error, match=f"threads: .*{text}"):
        threads(**arguments)


def test_first_layers_of_many_threads_load_the_kernels_once():
    """In a fresh process: nothing is loaded there, and a second registration would warn."""
    import subprocess
    import sys

    program = """
import sys, threading, torch, syncbn
sys.setswitchinterval(1e-6)
together, failed = threading.Barrier(8), []
def run():
    together.wait()
    try:
        syncbn.SyncBatchNorm(3)(torch.randn(4, 3))
    except Exception as error:
        failed.append(error)
ranks = [threading.Thread(target=run) for _ in range(8)]
[rank.start() for rank in ranks], [rank.join() for rank in ranks]
assert not failed, failed
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    assert "Overriding" not in result.stderr
