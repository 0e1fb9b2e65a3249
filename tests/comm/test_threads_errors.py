"""Ranks that are threads: whatever one of them does, none is left waiting."""

from __future__ import annotations

import re
import signal
import threading

import pytest
import torch

import syncbn
from support.in_threads import LIMIT, attempts, outcomes, watch_arrivals
from syncbn.comm import threads

PATIENCE = 60.0  # of ranks that are not to wait: longer than a test's threads may take


def only_text(results, ranks=None):
    """The one text that these ranks' RuntimeErrors have."""
    results = results if ranks is None else [results[rank] for rank in ranks]
    assert all(type(error) is RuntimeError for error in results), results
    (text,) = {str(error) for error in results}
    assert "make another with syncbn.comm.threads" in text
    return text


def test_a_rank_that_never_arrives():
    comms = threads(3, timeout=0.3)
    results = outcomes(lambda comm: comm.all_gather(torch.ones(5)), [(comms[0],), (comms[2],)])
    text = only_text(results)
    assert "all_gather: rank 1 has not arrived within 0.3 s" in text
    assert "ranks 0, 2: all_gather of (5,) float32; rank 1: no call" in text
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

    results = attempts(3, run, timeout=PATIENCE)
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

    results = attempts(2, run, timeout=PATIENCE)
    assert type(results[0]) is ArithmeticError
    assert "rank 0 raised ArithmeticError: overflow" in only_text(results, (1,))


def test_abort_ends_every_rank_now_and_later():
    comms = threads(3, timeout=PATIENCE)
    until = watch_arrivals(comms)

    def run(comm):
        if comm.rank == 0:
            until(2)
            comm.abort("the loss is not finite")
        comm.all_reduce(torch.ones(2))

    text = only_text(outcomes(run, [(comm,) for comm in comms]))
    assert "rank 0 aborted: the loss is not finite" in text
    comms[1].abort("another reason")
    for use in (lambda: comms[2].all_gather(torch.ones(9)), comms[1].__enter__):
        with pytest.raises(RuntimeError, match="the loss is not finite"):
            use()


@pytest.mark.parametrize("leaver_is_first", [True, False])
def test_a_rank_that_leaves_early_ends_the_others_at_once(leaver_is_first):
    comms = threads(3, timeout=PATIENCE)
    until, left = watch_arrivals(comms), threading.Event()

    def run(comm):
        with comm:
            comm.all_gather(torch.ones(2))
            if comm.rank != 2:
                assert not leaver_is_first or left.wait(LIMIT)
                comm.all_reduce(torch.ones(2))
            elif not leaver_is_first:
                until(2)
        left.set()

    results = outcomes(run, [(comm,) for comm in comms])
    assert results[2] is None
    text = only_text(results, (0, 1))
    assert text.startswith("syncbn.comm.threads: all_reduce")
    assert ": rank 2 left the 'with comm:' block before the others" in text


def test_blocks_may_follow_each_other():
    comms = threads(3, timeout=PATIENCE)

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
    comms = threads(2, timeout=PATIENCE)
    until = watch_arrivals(comms)

    def run(comm):
        if comm.rank == order:
            until(1)
        calls[comm.rank](comm)

    errors = outcomes(run, [(comm,) for comm in comms])
    assert all(type(error) is syncbn.DesyncError for error in errors), errors
    (text,) = {str(error) for error in errors}
    assert f"ranks call different collectives: {listed} (call 1); every rank must" in text


def test_two_threads_with_one_ranks_communicator():
    comm, _, _ = threads(3, timeout=PATIENCE)
    text = only_text(outcomes(lambda c: c.all_gather(torch.ones(1)), [(comm,), (comm,)]))
    assert "rank 0 is in all_gather of (1,) float32 already, in another thread" in text


def test_tensors_elsewhere_are_refused_on_every_rank():
    def run(comm):
        comm.all_reduce(torch.ones(3, device="meta" if comm.rank == 1 else "cpu"))

    text = only_text(attempts(2, run, timeout=PATIENCE))
    assert (
        "expected a tensor on the CPU, got one on meta on rank 1; torch runs the backward" in text
    )
    assert "Move the model to the CPU, or run a process per device" in text


def test_an_interrupt_while_waiting_ends_the_others():
    """Ctrl-C reaches the main thread, here rank 0 of three."""
    comms = threads(3, timeout=PATIENCE)
    until, main = watch_arrivals(comms), threading.main_thread().ident
    found = []
    other = threading.Thread(
        target=lambda: found.extend(outcomes(comms[1].all_gather, [(torch.ones(2),)])), daemon=True
    )
    other.start()

    def interrupt():
        until(2)
        signal.pthread_kill(main, signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell may ignore
    try:
        threading.Thread(target=interrupt, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            comms[0].all_gather(torch.ones(2))
    finally:
        signal.signal(signal.SIGINT, before)
    other.join(PATIENCE)
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
        ({"world_size": 2, "timeout": None}, TypeError, "seconds as timeout, got NoneType"),
        ({"world_size": 2, "timeout": "3"}, TypeError, "seconds as timeout, got str"),
    ],
)
def test_options(arguments, error, text):
    with pytest.raises(error, match=f"threads: .*{text}"):
        threads(**arguments)
