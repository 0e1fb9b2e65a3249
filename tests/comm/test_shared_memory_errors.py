"""Ranks that share memory: whatever ends ranks, makes them differ or keeps them apart."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import threading
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from support.scripts import execute
from syncbn import __version__ as VERSION
from syncbn import library
from syncbn.comm import SharedMemory, channel, memory


def refusal(call):
    with pytest.raises(RuntimeError) as error:
        call()
    assert "SharedMemory: " in str(error.value)
    return str(error.value)


def test_a_rank_that_is_late(ranks):
    def late(rank):
        comm = SharedMemory(dist.new_group(timeout=timedelta(seconds=0.5)))
        if rank == 0:
            return refusal(lambda: comm.all_gather(torch.ones(3)))
        while not comm._channel.memory.has_ended(0):  # rank 0 has told so
            os.sched_yield()
        return refusal(lambda: comm.all_gather(torch.ones(3)))

    first, second = ranks(2, late)
    assert "all_gather: rank 1 has not arrived within 0.5 s, the group's timeout" in first
    assert "all_gather: rank 0 has ended" in second


def test_a_rank_has_ended_while_another_is_late(ranks):
    def wait(rank):
        comm = SharedMemory(dist.new_group(timeout=timedelta(seconds=10)))
        if rank == 2:
            del comm
            return ""
        while rank == 1 and not comm._channel.memory.has_ended(0):  # it computes for long
            os.sched_yield()
        return refusal(lambda: comm.all_gather(torch.ones(3)))

    first, second, _ = ranks(3, wait)
    assert "rank 2 has ended" in first
    assert " has ended" in second


def test_a_rank_that_ends_with_its_last_message(ranks):
    """Both come after the other one's look at messages, and before its look at ends."""

    def last(rank):
        comm = SharedMemory()
        if rank == 1:
            return comm.all_reduce(torch.ones(1)).item()

        def nothing(*_):
            while not comm._channel.memory.has_ended(1):
                os.sched_yield()
            del comm._channel.memory.receive  # the next look is a real one
            return 1

        comm._channel.memory.receive = nothing
        return comm.all_reduce(torch.ones(1)).item()

    assert ranks(2, last) == [2.0] * 2


def test_a_call_that_raises_before_its_message_ends_the_others(ranks):
    """Else its next one would meet theirs."""

    def call(rank):
        comm = SharedMemory()
        if rank == 1:
            with pytest.raises(NotImplementedError):
                comm.all_gather(torch.ones(3, device="meta"))
            while not comm._channel.memory.has_ended(0):
                os.sched_yield()
        return refusal(lambda: comm.all_gather(torch.ones(3)))

    first, second = ranks(2, call)
    assert "rank 1 gave up in call 1: NotImplementedError" in first
    assert "rank 0 has ended" in second


def test_an_interrupt_while_waiting_ends_the_others(ranks):
    def interrupt(rank):
        comm = SharedMemory()
        if rank == 0:
            before = signal.signal(signal.SIGINT, signal.default_int_handler)
            main = threading.main_thread().ident

            def strike():
                while not comm._channel.number:  # its message is not on its way yet
                    os.sched_yield()
                signal.pthread_kill(main, signal.SIGINT)

            threading.Thread(target=strike).start()
            with pytest.raises(KeyboardInterrupt):
                comm.all_reduce(torch.ones(3))
            signal.signal(signal.SIGINT, before)
            return refusal(lambda: comm.all_reduce(torch.ones(3)))
        while not comm._channel.memory.has_ended(0):
            os.sched_yield()
        return refusal(lambda: comm.all_reduce(torch.ones(3)))

    first, second = ranks(2, interrupt)
    assert "rank 0 of 2: KeyboardInterrupt" in first
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


def test_the_number_of_a_process_of_another_container(ranks):
    """Where it is this one's, its files are left alone: whoever closes one loses its locks."""

    def look(rank):
        comm = SharedMemory()
        with pytest.raises(memory.Unmappable, match="another container"):
            memory.open_of(f"{os.getpid()} {comm._channel.memory._file} 0", 1, 2)
        dist.barrier()
        assert not comm._channel.memory.has_ended(1 - rank)
        dist.barrier()

    ranks(2, look)


def open_pipe(_, *rank):
    """One of another process."""
    with subprocess.Popen(["sleep", "60"], stdin=subprocess.PIPE) as child:
        try:
            return OPEN(f"{child.pid} 0 0", *rank)
        finally:
            child.kill()


OPEN, OLD = memory.open_of, AttributeError("no x")
ENOSPC, ENOMEM = (OSError(n, os.strerror(n)) for n in (errno.ENOSPC, errno.ENOMEM))
APART = {
    # what is patched, on which rank, and what is said
    "no process": (1, channel, "open_of", lambda _, *r: OPEN("999999999 3 0", *r), "opened"),
    "another's": (1, channel, "open_of", lambda p, *r: OPEN(p + "0", *r), "not rank 0's"),
    "a pipe": (1, channel, "open_of", open_pipe, "not rank 0's"),
    "map": (1, memory.mmap, "mmap", mock.Mock(side_effect=ENOMEM), "Cannot allocate memory"),
    "old library": (1, memory, "_library", mock.Mock(side_effect=OLD), "of another version (no x"),
    "version": (
        1,
        memory,
        "__version__",
        "0.0.1",
        f"0.0.1, and of version {VERSION} on rank 0",
    ),
    "memory": (0, memory.os, "posix_fallocate", mock.Mock(side_effect=ENOSPC), "No space left"),
    "system": (1, memory, "sys", SimpleNamespace(platform="darwin"), "the system is darwin"),
    "library": (0, library, "LIBRARY", Path("/nowhere/lib.so"), "lib.so was not built"),
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
