"""Ranks that raise, stall or die: the others read which, in which call, and don't wait long."""

from __future__ import annotations

import os
import time
import warnings
from contextlib import ExitStack
from functools import partial
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import syncbn
from support.in_threads import outcomes
from support.mpijob import needs_mpi
from support.scripts import execute
from syncbn.comm import waiting


def layer(comm):
    return syncbn.SyncBatchNorm1d(2, process_group=comm)


def x():
    return torch.randn(4, 2, requires_grad=True)


def refusal(call):
    with pytest.raises(RuntimeError) as caught:
        call()
    return str(caught.value)


def raises_in_forward(comm):
    """What the rank that is not 1 hears of the one that is given nonsense; and what follows."""
    step = layer(comm)
    step(x()).sum().backward()
    if comm.rank == 1:
        with pytest.raises(ValueError, match="expected running_mean"):
            step(torch.randn(4, 3))
        return ""
    return refusal(lambda: step(x()))


def raises_in_backward(comm):
    step = layer(comm)
    given = x()
    y = step(given)
    if comm.rank == 1:
        given.untyped_storage().resize_(0)
        return refusal(y.sum().backward) and ""
    return refusal(y.sum().backward)


HEARD = {
    raises_in_forward: ("gave up in call 3: ValueError", "for input of shape (4, 3)"),
    raises_in_backward: ("gave up in call 2: RuntimeError", "it was freed or shrunk"),
}
of_both = pytest.mark.parametrize("case", HEARD, ids=lambda case: case.__name__)


def check(case, texts):
    (text,) = filter(None, texts)
    assert all(part in text for part in HEARD[case]), text
    assert "rank 1" in text
    assert "in layer 'SyncBatchNorm1d" in text


def with_group(function, memory, rank):
    """The function of a communicator over a group of its own, which it may leave unusable."""
    with mock.patch.dict(os.environ, {} if memory else {"SYNCBN_EXCHANGE": "torch"}):
        group = dist.new_group([0, 1])
        comm = syncbn.comm.SharedMemory(group) if memory else syncbn.comm.resolve(group)
        return function(comm)


@of_both
@pytest.mark.parametrize("memory", [False, True])
def test_one_that_raises_says_so(ranks, case, memory):
    check(case, ranks(2, partial(with_group, case, memory)))


@of_both
def test_a_thread_that_raises_says_so(case):
    check(case, outcomes(case, [(comm,) for comm in syncbn.comm.threads(2)]))


REFUSED = {
    "dimensions": lambda comm: syncbn.SyncBatchNorm2d(2, process_group=comm)(x()),
    "mask": lambda comm: layer(comm)(x(), torch.ones(4)),
    "option": lambda comm: syncbn.sync_batch_norm(x(), None, None, eps=-1.0, group=comm),
    "lazy": lambda comm: syncbn.LazySyncBatchNorm2d(process_group=comm)(x()),
}


@pytest.mark.parametrize("what", REFUSED)
def test_others_are_told_of_every_refusal_of_a_layer(what):
    """However early it comes."""

    def step(comm):
        if comm.rank == 1:
            with pytest.raises((TypeError, ValueError)):
                REFUSED[what](comm)
            return ""
        return refusal(lambda: layer(comm)(x()))

    text, _ = outcomes(step, [(comm,) for comm in syncbn.comm.threads(2)])
    assert "rank 1 gave up in call 1" in text


@needs_mpi
@of_both
def test_a_process_of_mpi_that_raises_says_so(mpi_ranks, case):
    check(case, mpi_ranks(2, lambda rank: case(syncbn.comm.MPI())))


@pytest.mark.parametrize("memory", [False, True])
def test_ranks_that_all_raise_go_on(ranks, memory):
    """However late one is afterwards."""

    def alike(comm):
        step = layer(comm)
        for late in range(2):
            with pytest.raises(ValueError, match="expected running_mean"):
                step(torch.randn(4, 3))
            if comm.rank == late:
                time.sleep(1.5 * waiting.SLICE)
            step(x()).sum().backward()

    ranks(2, partial(with_group, alike, memory))


@pytest.mark.parametrize("memory", [False, True])
def test_a_shorter_timeout(ranks, memory):
    def late(comm):
        step = layer(comm)
        step(x())
        if comm.rank == 0:
            with syncbn.timeout(1.2):
                text = refusal(lambda: step(x()))
            again = refusal(lambda: step(x()))
            assert text.partition(";")[0] in again
            assert "has ended" in again
            return text
        while "failed" not in str(comm._frames.waiting._read().get(0)):
            time.sleep(0.01)
        return refusal(lambda: [step(x()) for _ in range(2)])  # one message has come

    first, second = ranks(2, partial(with_group, late, memory))
    assert "rank 1 has not arrived within 1.2 s, syncbn's timeout, in call 2" in first
    assert "rank 0" in second


def test_who_waits_long_is_told_what_for(ranks, monkeypatch):
    def slow(rank):
        waiting._WARN = 1.0
        comm = syncbn.comm.resolve(dist.new_group([0, 1]))
        step = layer(comm)
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                if rank == 1:
                    time.sleep(2.5)
                step(x())
        finally:
            waiting._WARN = 60.0
        texts = [str(warning.message) for warning in caught]
        return [text for text in texts if "has waited" in text]

    (text,), none = ranks(2, slow)
    assert not none
    for part in ("rank 0 of 2 has waited", "in call 1", "forward of layer 'SyncBatchNorm1d"):
        assert part in text
    assert "rank 1 has not arrived" in text
    assert "https://syncbn.github.io/syncbn/hangs.html" in text


@pytest.mark.parametrize("seconds", [0, -1.0, float("nan"), "60", True])
def test_timeouts_that_are_none(seconds):
    with pytest.raises((TypeError, ValueError), match="timeout"):
        syncbn.timeout(seconds)


def test_timeouts_inside_each_other():
    with syncbn.timeout(60):
        with syncbn.timeout(None):
            assert waiting.limit_of(7.0) == 7.0
        assert waiting.limit_of(70.0) == 60.0
        assert waiting.limit_of(7.0) == 7.0
    assert waiting.limit_of(70.0) == 70.0


def test_timeouts_of_threads_end_in_any_order():
    first, second = syncbn.timeout(5), syncbn.timeout(6)
    with ExitStack() as one, ExitStack() as other:
        one.enter_context(first)
        other.enter_context(second)
        one.close()
        assert waiting.limit_of(70.0) == 6.0
    assert waiting.limit_of(70.0) == 70.0


def test_a_timeout_from_now_on():
    try:
        syncbn.timeout(60)
        with syncbn.timeout(600):
            assert waiting.limit_of(700.0) == 600.0
        assert waiting.limit_of(700.0) == 60.0
    finally:
        syncbn.timeout(None)
    assert waiting.limit_of(700.0) == 700.0


def test_a_checkpoint_that_stops_early_gives_nothing_up(ranks):
    """It ends the recomputed forward by an exception, once it has all that backward wants."""

    def step(rank):
        model = torch.nn.Sequential(torch.nn.Linear(2, 2), syncbn.SyncBatchNorm1d(2))
        checkpoint(model, x(), use_reentrant=False).sum().backward()
        return syncbn.comm.resolve(None)._frames.waiting._given_up

    assert ranks(2, lambda rank: (step(rank), step(rank))[1] - step(rank)) == [0, 0]


def test_what_is_silent_gives_nothing_up(ranks):
    """A probe of shapes on one rank, which raises, and no other rank waits for."""

    def probe(rank):
        comm = syncbn.comm.resolve(dist.new_group([0, 1]))
        step = layer(comm)
        if rank == 1:
            with pytest.raises(ValueError, match="expected running_mean"):
                step(torch.empty(4, 3, device="meta"))
            time.sleep(1.5 * waiting.SLICE)
        step(x())

    ranks(2, probe)


PROGRAM = """
import datetime, os, signal, sys, torch, torch.distributed as dist, syncbn
rank = int(os.environ["RANK"])
limit = datetime.timedelta(seconds=6)
store = "file://" + sys.argv[1] + "/store"
dist.init_process_group("gloo", init_method=store, rank=rank, world_size=3, timeout=limit)
layer = syncbn.SyncBatchNorm1d(2)
layer(torch.randn(4, 2))
if rank == 1:
    sys.stdout.flush()
    {end}
try:
    layer(torch.randn(4, 2))
except RuntimeError as error:
    print(error, flush=True)
os._exit(0)
"""


@pytest.mark.parametrize("engine", ["gloo", "memory"])
@pytest.mark.parametrize(
    "end",
    [
        "os.kill(os.getpid(), signal.SIGKILL)",
        "os.kill(os.getpid(), signal.SIGALRM)",
        # Stopped until the others have ended.
        "signal.signal(signal.SIGALRM, lambda *_: os._exit(0)); "
        "os.system(f'(sleep 9; kill -CONT {os.getpid()}) &'); signal.alarm(9); "
        "os.kill(os.getpid(), signal.SIGSTOP)",
    ],
    ids=["killed", "ended", "stopped"],
)
def test_one_that_is_gone_is_named(tmp_path, engine, end):
    exchange = "torch" if engine == "gloo" else ""
    program = PROGRAM.format(end=end)
    heard = execute(program, str(tmp_path), ranks=3, timeout=60, SYNCBN_EXCHANGE=exchange)
    for rank in (0, 2):
        text = heard[rank].stdout
        assert "rank 1" in text, heard
        assert "in layer 'SyncBatchNorm1d 1'" in text


STOPPED = """
import os, signal, sys
import torch
import torch.distributed as dist
import syncbn

rank, folder = int(os.environ["RANK"]), sys.argv[1]
dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
layer = syncbn.SyncBatchNorm1d(2)
layer(torch.randn(4, 2))
if rank == 0:
    open(folder + "/pid", "w").write(str(os.getpid()))
    with syncbn.timeout(1):
        layer(torch.randn(4, 2))
look = f"sleep 7; kill -0 $(cat {folder}/pid) && touch {folder}/hangs; kill -KILL {os.getpid()}"
os.system(f"({look}) &")
os.kill(os.getpid(), signal.SIGSTOP)
"""


def test_a_rank_that_has_waited_in_vain_can_end(tmp_path):
    """gloo, when it is freed, would wait for the message until the group's timeout of half an hour,
    or until the other rank has ended.
    """
    ended, _ = execute(STOPPED, str(tmp_path), ranks=2, timeout=60, SYNCBN_EXCHANGE="torch")
    assert "rank 1 has not arrived within 1 s" in ended.stderr
    assert ended.code == 1
    assert not (tmp_path / "hangs").exists()
