"""Ranks that share memory: messages of any length, and whatever ends ranks or keeps them apart."""

from __future__ import annotations

import errno
import gc
import os
import signal
import threading
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import syncbn
from support import oracle
from support.scripts import execute
from syncbn.comm import SharedMemory, memory, shared_memory


def test_layers_equal_one_process(ranks):
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(5, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))

    def step(rank):
        layer = syncbn.SyncBatchNorm1d(3, process_group=SharedMemory(), dtype=torch.float64)
        share = x[: 4 if rank == 0 else 1].clone() if rank == 0 else x[4:].clone()
        y = layer(share.requires_grad_())
        y.backward(dy[:4] if rank == 0 else dy[4:])
        return y.detach(), share.grad

    expected = oracle.batch_norm(x, dy)
    y, dx = map(torch.cat, zip(*ranks(2, step), strict=True))
    oracle.assert_close(y, expected.y)
    oracle.assert_close(dx, expected.dx)


def test_messages_longer_than_a_slot(ranks):
    def gather(rank):
        comm = SharedMemory()
        for count in (memory.Memory.capacity // 8 + k for k in (-1, 0, 1, 3 * comm.size * 1000)):
            sent = torch.arange(count, dtype=torch.float64) + rank
            for other, row in enumerate(comm.all_gather(sent)):
                assert torch.equal(row, torch.arange(count, dtype=torch.float64) + other)

    ranks(3, gather)


def test_groups_of_ranks(ranks):
    def halves(rank):
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        own, whole = SharedMemory(groups[rank // 2]), SharedMemory()
        gathered = own.all_gather(torch.tensor(rank)).tolist()
        with pytest.raises(ValueError, match="is not in the group given"):
            SharedMemory(groups[1 - rank // 2])
        return gathered, whole.all_reduce(torch.tensor(rank)).item()

    assert ranks(4, halves) == [([0, 1], 6)] * 2 + [([2, 3], 6)] * 2


def test_without_a_group():
    with pytest.raises(ValueError, match=r"SharedMemory: expected a torch\.distributed group"):
        SharedMemory()


def test_a_compiled_layer(ranks):
    def step(rank):
        layer = syncbn.SyncBatchNorm1d(3, process_group=SharedMemory())
        call, x = torch.compile(layer, backend="eager"), torch.arange(12.0).view(4, 3) * (rank + 1)
        return call(x), syncbn.sync_batch_norm(x, None, None)

    for compiled, eager in ranks(2, step):
        torch.testing.assert_close(compiled, eager)


def refusal(call):
    with pytest.raises(RuntimeError) as error:
        call()
    assert "SharedMemory: " in str(error.value)
    return str(error.value)


def test_calls_that_differ(ranks):
    def differ(rank):
        comm = SharedMemory()
        first = refusal(lambda: comm.all_gather(torch.ones(3 + rank)))
        assert refusal(lambda: comm.all_gather(torch.ones(3))) == first
        return first

    for text in ranks(2, differ):
        assert "rank 0: all_gather of (3,) float32; rank 1: all_gather of (4,) float32" in text
        assert "This communicator has ended" in text


def test_a_rank_that_is_late(ranks):
    def late(rank):
        comm = SharedMemory(dist.new_group(timeout=timedelta(seconds=0.5)))
        if rank == 0:
            return refusal(lambda: comm.all_gather(torch.ones(3)))
        while not comm._memory.has_ended(0):  # rank 0 has told so
            os.sched_yield()
        return refusal(lambda: comm.all_gather(torch.ones(3)))

    first, second = ranks(2, late)
    assert "all_gather: rank 1 has not arrived within 0.5 s, the group's timeout" in first
    assert "all_gather: rank 0 has ended" in second


def test_an_interrupt_while_waiting_ends_the_others(ranks):
    def interrupt(rank):
        comm = SharedMemory()
        if rank == 0:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            main = threading.main_thread().ident
            threading.Timer(0.1, signal.pthread_kill, (main, signal.SIGINT)).start()
            with pytest.raises(KeyboardInterrupt):
                comm.all_reduce(torch.ones(3))
            return refusal(lambda: comm.all_reduce(torch.ones(3)))
        while not comm._memory.has_ended(0):
            os.sched_yield()
        return refusal(lambda: comm.all_reduce(torch.ones(3)))

    first, second = ranks(2, interrupt)
    assert "all_reduce: rank 0 raised KeyboardInterrupt" in first
    assert "all_reduce: rank 0 has ended" in second


@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "sys.exit()"])
def test_a_process_that_ends(tmp_path, end):
    program = f"""
import os, signal, sys, torch, torch.distributed as dist, syncbn
rank = int(os.environ["RANK"])
dist.init_process_group("gloo", init_method="file://" + sys.argv[1], rank=rank, world_size=3)
comm = syncbn.comm.SharedMemory()
comm.all_gather(torch.ones(3))
if rank == 1:
    {end}
try:
    comm.all_gather(torch.ones(3))
except RuntimeError as error:
    print("ended", error, flush=True)
    os._exit(0)
"""
    before = set(os.listdir("/dev/shm"))
    first, _, last = execute(program, str(tmp_path / "store"), ranks=3)
    for said, rank in ((first, 0), (last, 2)):
        # the other one that waits may have told that it ends before this one looked
        start = f"ended SharedMemory: rank {rank} of 3: all_gather: rank "
        assert said.stdout.startswith(start), said
        assert " has ended; every rank" in said.stdout
    assert "rank 1 has ended" in first.stdout + last.stdout
    assert not [name for name in set(os.listdir("/dev/shm")) - before if "syncbn" in name]


def test_a_fork_is_another_process(ranks):
    def fork(rank):
        comm = SharedMemory()
        child = os.fork()
        if child == 0:
            try:
                comm.all_gather(torch.ones(3))
            except RuntimeError as error:
                os._exit(0 if "got one from its fork" in str(error) else 1)
            os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        return comm.all_reduce(torch.ones(1)).item()  # the ranks go on

    assert ranks(2, fork) == [2.0] * 2


def test_nothing_is_left_of_a_communicator(ranks):
    def held():
        maps = Path("/proc/self/maps").read_text()
        return len(os.listdir("/proc/self/fd")), maps.count("memfd:syncbn")

    def make(rank):
        gc.collect()
        before = held()
        for _ in range(20):
            SharedMemory().all_gather(torch.ones(3))
        gc.collect()
        assert held() == before

    ranks(2, make)


OPEN, ENOSPC = memory.open_of, OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
APART = {
    # what is patched, on which rank, and what is said
    "no process": (1, shared_memory, "open_of", lambda _, *r: OPEN("999999999 3 0", *r), "opened"),
    "another's": (1, shared_memory, "open_of", lambda p, *r: OPEN(p + "0", *r), "not rank 0's"),
    "version": (1, memory, "__version__", "0.0.1", "syncbn is of version 0.0.1, and of version "),
    "memory": (0, memory.os, "posix_fallocate", mock.Mock(side_effect=ENOSPC), "No space left"),
    "system": (1, memory, "sys", SimpleNamespace(platform="darwin"), "the system is darwin"),
    "library": (0, memory, "LIBRARY", memory.Path("/nowhere/lib.so"), "lib.so was not built"),
}


@pytest.mark.parametrize("why", APART)
def test_ranks_that_share_no_memory(ranks, why):
    who, home, name, value, words = APART[why]

    def construct(rank):
        if rank != who:
            text = refusal(SharedMemory)
        else:
            with mock.patch.object(home, name, value):
                text = refusal(SharedMemory)
        assert SharedMemory().all_reduce(torch.ones(1)).item() == 3  # the next one is another
        return text

    (text,) = set(ranks(3, construct))
    assert f"expected ranks that share memory, but on rank {who} of 3 " in text
    assert words in text
    assert "process_group=None" in text
