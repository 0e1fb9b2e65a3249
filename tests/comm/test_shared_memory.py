"""Ranks that share memory: messages of any length, groups, forks, and nothing that is left."""

from __future__ import annotations

import gc
import os
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist

import syncbn
from support import oracle
from syncbn.comm import SharedMemory, memory


def test_layers_equal_one_process(ranks):
    generator = torch.Generator().manual_seed(0)
    x, dy = (torch.randn(5, 3, 4, generator=generator, dtype=torch.float64) for _ in range(2))

    def step(rank):
        layer = syncbn.SyncBatchNorm1d(3, process_group=SharedMemory(), dtype=torch.float64)
        mine = slice(4) if rank == 0 else slice(4, None)
        share = x[mine].clone().requires_grad_()
        y = layer(share)
        y.backward(dy[mine])
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


def test_tensors_that_are_not_what_lies_in_memory(ranks):
    def gather(rank):
        comm, z = SharedMemory(), torch.tensor([1 + 2j])
        for sent in (z.conj(), z.conj().imag, torch.ones(2, dtype=torch.int32)):
            assert torch.equal(comm.all_gather(sent), torch.stack([sent] * 2))
            total = comm.all_reduce(sent)
            assert torch.equal(total, sent + sent)
            assert total.dtype == sent.dtype

    ranks(2, gather)


def test_groups_of_ranks(ranks):
    def halves(rank):
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        own, whole = SharedMemory(groups[rank // 2]), SharedMemory()
        gathered = own.all_gather(torch.tensor(rank)).tolist()
        with pytest.raises(ValueError, match="is not in the group given"):
            SharedMemory(groups[1 - rank // 2])
        return gathered, whole.all_reduce(torch.tensor(rank)).item()

    assert ranks(4, halves) == [([0, 1], 6)] * 2 + [([2, 3], 6)] * 2


def test_what_ranks_sleep_on_is_aligned(ranks):
    """Else the system would not let them sleep."""

    def rest(rank):
        return SharedMemory()._channel.memory._where[0] % 128  # the alignment of a Line

    assert ranks(2, rest) == [0, 0]


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
        for home, name in ((memory.os, "posix_fallocate"), (memory.mmap, "mmap")):
            with mock.patch.object(home, name) as call:
                call.side_effect = lambda *_: os.close(-1)
                with pytest.raises(RuntimeError, match="Bad file descriptor"):
                    SharedMemory()
        gc.collect()
        assert held() == before

    ranks(2, make)
