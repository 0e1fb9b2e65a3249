"""syncbn.comm.MPI: ranks that mpiexec starts, without torch.distributed."""

from __future__ import annotations

import contextlib
import copy
import io
import os
import pickle
import runpy
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import syncbn
from support import oracle, ranked_transforms
from support.cases import Case, check, share_of, step
from support.contract import CHECKS, check_interleaved
from support.paths import ROOT
from support.ranks import RankFailure
from support.training import assert_same_state, batches, network, train_in_shares
from syncbn.comm import MPI


class Tree(MPI):
    """What more ranks than those of a direct exchange use: a reduction and a broadcast."""

    direct_exchange_max_size = 0


def check_contract(rank, kind):
    comm = kind()
    for promise in CHECKS:
        promise(comm)
    assert not dist.is_initialized()
    return comm.rank


@pytest.mark.parametrize(
    ("size", "kind"), [(1, MPI), (2, MPI), (3, MPI), (3, Tree)], ids=["1", "2", "3", "many ranks"]
)
def test_contract(mpi_ranks, size, kind):
    assert mpi_ranks(size, check_contract, kind) == list(range(size))


CALLS = {
    "operation": (("all_gather", 4, torch.float32), ("all_reduce", 4, torch.float32)),
    "shape": (("all_gather", 3, torch.float64), ("all_gather", 4, torch.float64)),
    "dtype": (("all_reduce", 4, torch.float32), ("all_reduce", 2, torch.float64)),
}


@pytest.mark.parametrize("kind", [MPI, Tree])
@pytest.mark.parametrize("calls", CALLS.values(), ids=CALLS)
def test_calls_that_differ_are_named_on_every_rank(mpi_ranks, calls, kind):
    def differ(rank):
        comm = kind()
        name, length, dtype = calls[rank // 2]  # the last of three ranks is another
        with pytest.raises(RuntimeError) as error:
            getattr(comm, name)(torch.ones(length, dtype=dtype))
        assert comm.all_reduce(torch.ones(1)) == 3, "ranks that agree again go on"
        return str(error.value)

    (text,) = set(mpi_ranks(3, differ))
    named = [f"{name} of ({n},) {str(dtype)[6:]}" for name, n, dtype in calls]
    listed = f"ranks 0, 1: {named[0]}; rank 2: {named[1]} (call 1); every"
    assert text.startswith(f"{kind.__name__}: ranks call different collectives: {listed}")


def test_communicators_interleave(mpi_ranks):
    """Clones of one communicator, and of its parts; a rank that is left out is told."""

    def interleaved(rank):
        from mpi4py import MPI as engine

        world = engine.COMM_WORLD
        check_interleaved(MPI(), MPI(world))
        pair = MPI(world.Split(rank // 2, -rank))
        assert (pair.rank, pair.size) == ((0, 1) if rank == 2 else (1 - rank, 2))
        check_interleaved(pair, MPI())
        part = world.Split(0 if rank else engine.UNDEFINED)
        if rank:
            check_interleaved(MPI(part), MPI(engine.COMM_SELF))
        else:
            with pytest.raises(ValueError, match="rank 0 of COMM_WORLD got COMM_NULL"):
                MPI(part)

    mpi_ranks(3, interleaved)


def test_messages_never_meet_the_callers(mpi_ranks):
    """The caller's own messages are under way on the same communicator, of the same sizes."""

    def crowded(rank):
        from mpi4py import MPI as engine

        world, comm = engine.COMM_WORLD, MPI()
        own, received = bytes([100 + rank] * 8), bytearray(16)
        request = world.Iallgather(own, received)
        letter = world.irecv(source=1 - rank)
        gathered = comm.all_gather(torch.tensor([float(rank)], dtype=torch.float64))
        world.send("hello", dest=1 - rank)
        request.Wait()
        assert letter.wait() == "hello"
        return gathered.flatten().tolist(), received

    assert mpi_ranks(2, crowded) == [([0.0, 1.0], bytes([100] * 8 + [101] * 8))] * 2


def test_memory_is_kept_until_mpi_is_done_with_it(mpi_ranks):
    """Where a wait is interrupted MPI may yet write to it; afterwards nothing is kept."""

    def run(rank):
        comm, kept = Tree(), []
        wait = comm._wait
        comm._wait = lambda *arguments: (kept.append(comm._in_flight), wait(*arguments))
        comm.all_reduce(torch.ones(2))
        comm.all_gather(torch.ones(2))
        return [len(memory) for memory in kept], comm._in_flight

    assert mpi_ranks(2, run) == [([2, 1, 1, 2], ())] * 2


def test_threads_in_turns_where_mpi_is_told_of_them(mpi_ranks):
    """At the thread level SERIALIZED, the lowest of those at which any thread may call."""

    def run(rank):
        from mpi4py import MPI as engine

        with mock.patch.object(engine, "Query_thread", return_value=engine.THREAD_SERIALIZED):
            comm = MPI()
        with ThreadPoolExecutor(1) as pool:
            return pool.submit(comm.all_reduce, torch.ones(1)).result().item()

    assert mpi_ranks(2, run) == [2, 2]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("split", [(5, 2), (1, 0, 6)], ids=str)
def test_a_step_equals_the_oracle(mpi_ranks, split, dtype):
    case = Case(split=split, dtype=dtype, param_dtype=dtype, offset=3.0)
    check(case, mpi_ranks(len(split), lambda rank: step(rank, case, MPI())), factor=4)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_tensors_of_a_gpu_pass_through_the_cpu(mpi_ranks):
    """Backward too, which runs in a thread of autograd's own there."""
    case = Case(split=(3, 2))
    x, dy, *_ = case.batch()

    def on_gpu(rank):
        mine = slice(0, 3) if rank == 0 else slice(3, 5)
        layer = syncbn.SyncBatchNorm(case.channels, process_group=MPI(), device="cuda")
        input = x[mine].cuda().requires_grad_()
        layer(input).backward(dy[mine].cuda())
        return input.grad.cpu()

    expected = oracle.batch_norm(x, dy)
    oracle.assert_close(torch.cat(mpi_ranks(2, on_gpu)), expected.dx, factor=4)


@pytest.mark.parametrize("split", [(5, 2), (1, 0, 6)], ids=str)
def test_training_equals_one_process(mpi_ranks, split):
    """Uneven and empty shares in float64, gradients summed by MPI too, running statistics."""
    data = batches(sum(split))

    def training(rank):
        comm = MPI()
        model = syncbn.convert(network(), comm)
        mine = share_of(split, rank)
        train_in_shares(model, [(x[mine], y[mine]) for x, y in data], sum(split), comm.all_reduce)
        return model.state_dict()

    alone = network()
    train_in_shares(alone, data, sum(split), lambda gradient: gradient)
    assert_same_state(mpi_ranks(len(split), training), alone.state_dict())


@pytest.mark.parametrize("name", ["vmap_of_grad", "is_grads_batched_create_graph", "jvp_of_grad"])
def test_transforms_over_ranks(mpi_ranks, name):
    """What torch's distributed package and threads show, in test_transforms_ranks.py."""
    transform, split = ranked_transforms.STEPS[name], (2, 1)

    def run(rank):
        return ranked_transforms.outcome(transform, "plain", MPI(), rank, split)

    ranked_transforms.check(transform, "plain", mpi_ranks(2, run))


def test_the_script_of_the_docs(mpi_ranks):
    """As ``mpiexec -n 2 python -m mpi4py`` would run it."""

    def run(rank):
        with contextlib.redirect_stdout(io.StringIO()) as said:
            runpy.run_path(str(ROOT / "examples/train_mpi.py"), run_name="__main__")
        return said.getvalue()

    assert mpi_ranks(2, run) == ["running_var equal on all 2 ranks: True\n", ""]


def test_more_ranks_than_cores(mpi_ranks):
    size = max(3, min((os.cpu_count() or 1) + 1, 8))
    case = Case(split=(1,) * size)
    check(case, mpi_ranks(size, lambda rank: step(rank, case, MPI())), factor=4)


def test_waiting_leaves_the_core_to_others(mpi_ranks):
    """It sleeps: only then does the other rank arrive."""

    def late(rank):
        comm, sleep, slept = MPI(timeout=30), time.sleep, threading.Event()

        def noticed(seconds):
            if not slept.is_set():
                comm.comm.send(None, dest=1)
            slept.set()
            sleep(seconds)

        if rank == 1:
            comm.comm.recv(source=0)
        with mock.patch.object(time, "sleep", noticed):
            return comm.all_reduce(torch.ones(1)).item(), rank == 1 or slept.is_set()

    assert mpi_ranks(2, late) == [(2, True)] * 2


def test_a_rank_that_dies_fails_its_test(mpi_ranks):
    with pytest.raises(RankFailure, match="rank 0: died with exit code 3"):
        mpi_ranks(1, lambda rank: os._exit(3))
    assert mpi_ranks(1, lambda rank: rank) == [0]


def test_copies_keep_the_communicator_and_pickles_leave_it_out(mpi_ranks):
    def copies(rank):
        comm = MPI()
        layer = syncbn.SyncBatchNorm(3, process_group=comm)
        assert copy.deepcopy(layer).process_group is comm
        with pytest.warns(UserWarning, match="without its process group"):
            assert pickle.loads(pickle.dumps(layer)).process_group is None
        return repr(layer)

    assert all("group_size=2" in text for text in mpi_ranks(2, copies))


def test_what_cannot_be_is_refused(mpi_ranks):
    def refused(rank):
        from mpi4py import MPI as engine

        for wrong in ("world", 0, engine.INFO_NULL):
            with pytest.raises(TypeError, match="expected an intracommunicator of mpi4py or None"):
                MPI(wrong)
        with pytest.raises(ValueError, match="MPI: expected 0 < timeout"):
            MPI(timeout=0)
        comm = MPI()
        comm.comm.Free()
        with pytest.raises(engine.Exception, match=r"(?i)communicator"):
            comm.all_gather(torch.ones(3))

    mpi_ranks(2, refused)
