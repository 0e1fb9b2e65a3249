"""The contract of communicators, one suite for all of them, and what process_group may be."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import syncbn
from support.contract import CHECKS, check_interleaved
from support.groups import group_over
from support.in_threads import in_threads
from support.layers import Pair
from support.scripts import execute
from syncbn.comm import LOCAL, ProcessGroup, resolve


class Ring(ProcessGroup):
    """What more ranks than those of a direct exchange use: torch's own collectives."""

    direct_exchange_max_size = 0


def on_workers(size, communicator):
    """Runs a function of a communicator on ``size`` processes of a gloo group."""
    return lambda ranks, function: ranks(size, lambda rank: function(communicator()))


# To add a communicator: how to run function(communicator) on each of its ranks.
WORLDS = {
    "local": lambda ranks, function: function(LOCAL),
    "default group": on_workers(3, lambda: resolve(None)),
    "process group": on_workers(3, lambda: ProcessGroup(dist.group.WORLD)),
    "two ranks": on_workers(2, lambda: resolve(None)),
    "gloo": on_workers(3, lambda: resolve(group_over("torch"))),
    "many ranks": on_workers(3, lambda: Ring(group_over("torch"))),
    "shared memory": on_workers(3, syncbn.comm.SharedMemory),
    "threads": lambda _, function: in_threads(3, function),
    "many threads": lambda _, function: in_threads(12, function),
    "mesh": on_workers(2, lambda: resolve(init_device_mesh("cpu", (dist.get_world_size(),)))),
}


@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.__name__)
@pytest.mark.parametrize("world", WORLDS.values(), ids=WORLDS)
def test_contract(ranks, world, check):
    world(ranks, check)


def test_two_communicators_interleave(ranks):
    def interleaved(rank):
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        check_interleaved(resolve(pairs[rank // 2]), resolve(None))

    ranks(4, interleaved)


def test_a_peer_that_is_gone_ends_the_call(tmp_path):
    """Two processes of their own: one leaves between two collectives."""
    program = """
import os, sys, torch, torch.distributed as dist, syncbn
rank, store = int(os.environ["RANK"]), sys.argv[1]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
comm = syncbn.comm.resolve(None)
comm.all_gather(torch.ones(3))
if rank == 1:
    os._exit(0)
try:
    comm.all_gather(torch.ones(3))
except RuntimeError as error:
    print("ended", error, type(error.__cause__).__name__, flush=True)
    os._exit(0)
"""
    stays, _ = execute(program, str(tmp_path / "store"), ranks=2, SYNCBN_EXCHANGE="torch")
    assert "ended ProcessGroup: all_gather failed on rank 0 of 2 (gloo): " in stays.stdout, stays
    assert "syncbn.until_all_done(loader) RuntimeError" in stays.stdout


def test_what_process_group_may_be(ranks):
    def kinds(rank):
        group = dist.new_group([0, 1, 2, 3])
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
        own = ProcessGroup(group)
        return [resolve(g).size for g in (None, group, mesh["shard"], own, dist.group.WORLD)]

    assert ranks(4, kinds) == [[4, 4, 2, 4, 4]] * 4


def test_a_subgroup_normalises_by_itself(ranks):
    def halves(rank):
        groups = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        x = torch.full((1, 2, 3), float(rank)) + torch.arange(3.0)
        layer = syncbn.SyncBatchNorm(2, process_group=groups[rank // 2], momentum=1.0)
        layer(x)
        return layer.running_mean[0].item(), repr(layer)

    results = ranks(4, halves)
    assert [mean for mean, _ in results] == [1.5, 1.5, 3.5, 3.5]
    assert all("world_size=4, group_size=2" in text for _, text in results)


def test_groups_that_cannot_be(ranks):
    def errors(rank):
        left_out = dist.new_group([0])
        mesh = init_device_mesh("cpu", (2, 1), mesh_dim_names=("replicate", "shard"))
        elsewhere = DeviceMesh("cpu", [0])
        texts = []
        for group in (mesh, *([left_out, elsewhere] if rank == 1 else [])):
            for use in (
                lambda g: syncbn.SyncBatchNorm(3, process_group=g),
                lambda g: syncbn.LazySyncBatchNorm(process_group=g),
                lambda g: syncbn.convert(torch.nn.BatchNorm2d(3), g),
                lambda g: syncbn.sync_batch_norm(torch.randn(2, 3), None, None, group=g),
            ):
                with pytest.raises(ValueError, match="process_group") as error:
                    use(group)
                texts.append(str(error.value))
        return texts

    first, second = ranks(2, errors)
    assert all("one-dimensional DeviceMesh, got 2" in text for text in first)
    assert all("mesh['dp']" in text for text in first)
    assert all("rank 1 is not in the group given" in text for text in second[4:8])
    assert all("rank 1 is not in the DeviceMesh given" in text for text in second[8:])


@pytest.mark.parametrize("group", [2, "gloo", [0, 1], object()])
def test_other_types_are_refused(group):
    with pytest.raises(TypeError, match=f"process_group: got {type(group).__name__}; pass None"):
        resolve(group)


def test_any_communicator_will_do():
    x = torch.randn(4, 3)
    layer = syncbn.SyncBatchNorm(3, process_group=Pair(), momentum=1.0)
    torch.testing.assert_close(layer(x), torch.nn.BatchNorm1d(3)(x))
    torch.testing.assert_close(layer.running_var, torch.cat((x, x)).var(0))
    assert "group_size=2" in repr(layer)
