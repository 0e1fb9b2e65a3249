"""The contract of communicators, one suite for all of them, and what process_group may be."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

import syncbn
from syncbn.comm import LOCAL, Communicator, ProcessGroup, resolve


class Ring(ProcessGroup):
    """What more ranks than few use: torch's own collectives."""

    few = 0


FACTORIES = {
    "local": (1, lambda: LOCAL),
    "default group": (3, lambda: resolve(None)),
    "process group": (3, lambda: ProcessGroup(dist.group.WORLD)),
    "many ranks": (3, lambda: Ring(dist.group.WORLD)),
    "mesh": (2, lambda: resolve(init_device_mesh("cpu", (dist.get_world_size(),)))),
}


@pytest.fixture(params=FACTORIES, ids=str)
def on_every_rank(request, ranks):
    """Runs ``function(communicator)`` on every rank of one kind of communicator."""
    size, factory = FACTORIES[request.param]

    def run(function):
        return ranks(size, lambda rank: function(factory()))

    if request.param == "local":
        return lambda function: [function(LOCAL)]
    return run


def test_ranks_are_numbered_and_counted(on_every_rank):
    results = on_every_rank(lambda comm: (comm.rank, comm.size))
    assert results == [(rank, len(results)) for rank in range(len(results))]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (1,), ()])
def test_values_and_dtypes(on_every_rank, dtype, shape):
    def both(comm):
        mine = torch.full(shape, comm.rank + 1.0, dtype=dtype)
        return comm.all_gather(mine), comm.all_reduce(mine), mine

    results = on_every_rank(both)
    size = len(results)
    for rank, (gathered, total, mine) in enumerate(results):
        assert gathered.dtype == total.dtype == dtype
        assert gathered.shape == (size, *shape)
        assert total.shape == shape
        assert all((gathered[r] == r + 1).all() for r in range(size))
        assert (total == size * (size + 1) / 2).all()
        assert (mine == rank + 1).all(), "the argument is not modified"


def test_empty_tensors(on_every_rank):
    def both(comm):
        return comm.all_gather(torch.empty(0)), comm.all_reduce(torch.empty(0))

    results = on_every_rank(both)
    assert {tuple(gathered.shape) for gathered, _ in results} == {(len(results), 0)}
    assert {tuple(total.shape) for _, total in results} == {(0,)}


def test_arguments_need_not_be_contiguous(on_every_rank):
    def both(comm):
        mine = (torch.arange(12.0).view(3, 4) + comm.rank).t()[::2]
        return comm.all_gather(mine), comm.all_reduce(mine), mine

    results = on_every_rank(both)
    for gathered, total, _ in results:
        assert torch.equal(gathered, torch.stack([mine for *_, mine in results]))
        assert torch.equal(total, gathered.sum(0))


def test_the_result_belongs_to_the_caller(on_every_rank):
    def overwrite(comm):
        mine = torch.ones(4)
        comm.all_gather(mine).fill_(7)
        comm.all_reduce(mine).fill_(7)
        return comm.all_gather(mine), mine

    for gathered, mine in on_every_rank(overwrite):
        assert (gathered == 1).all()
        assert (mine == 1).all()


def test_many_in_a_row_stay_in_order(on_every_rank):
    def many(comm):
        for i in range(200):
            tensor = torch.tensor([float(i * comm.size + comm.rank)])
            expected = [float(i * comm.size + r) for r in range(comm.size)]
            assert comm.all_gather(tensor).flatten().tolist() == expected
            assert comm.all_reduce(tensor).item() == sum(expected)

    on_every_rank(many)


def test_two_communicators_interleave(ranks):
    def interleaved(rank):
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        mine, world = resolve(pairs[rank // 2]), resolve(None)
        sums = []
        for _ in range(20):
            sums.append(mine.all_reduce(torch.tensor([float(rank)])).item())
            sums.append(world.all_reduce(torch.tensor([float(rank)])).item())
        return set(sums[::2]), set(sums[1::2])

    assert ranks(4, interleaved) == [({1.0}, {6.0})] * 2 + [({5.0}, {6.0})] * 2


def test_every_rank_receives_the_same_bits(on_every_rank):
    def sums(comm):
        generator = torch.Generator().manual_seed(comm.rank)
        return comm.all_reduce(torch.randn(1000, generator=generator))

    first, *others = on_every_rank(sums)
    assert all(torch.equal(first, other) for other in others)


def test_a_peer_that_is_gone_ends_the_call(tmp_path):
    """Two processes of their own: one leaves between two collectives."""
    import subprocess
    import sys

    program = """
import sys, torch, torch.distributed as dist, syncbn
rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
comm = syncbn.comm.resolve(None)
comm.all_gather(torch.ones(3))
if rank == 1:
    import os; os._exit(0)
try:
    comm.all_gather(torch.ones(3))
except RuntimeError:
    print("ended")
    import os; os._exit(0)
"""
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", program, str(rank), str(tmp_path / "store")],
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        assert "ended" in processes[0].communicate(timeout=60)[0]
    finally:
        for process in processes:
            process.kill()
            process.wait()


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
    class Doubled(Communicator):
        """Two ranks with equal input."""

        rank, size = 0, 2

        def all_gather(self, tensor):
            return torch.stack((tensor, tensor))

        def all_reduce(self, tensor):
            return tensor * 2

    x = torch.randn(4, 3)
    layer = syncbn.SyncBatchNorm(3, process_group=Doubled(), momentum=1.0)
    torch.testing.assert_close(layer(x), torch.nn.BatchNorm1d(3)(x))
    torch.testing.assert_close(layer.running_var, torch.cat((x, x)).var(0))
    assert "group_size=2" in repr(layer)
