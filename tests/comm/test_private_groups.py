"""Layers talk on a clone of the group they are given: others' messages on it never meet theirs."""

from __future__ import annotations

import datetime
import gc
import threading
import weakref
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import syncbn
from support.groups import group_over
from support.scripts import execute
from syncbn.comm import ProcessGroup, groups
from syncbn.comm.groups import private


class Headed(nn.Module):
    """A layer, and a head that only rank 0 uses."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.head = nn.Linear(8, 4, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.head.weight.copy_(torch.linspace(-1, 2, 32).view(4, 8))

    def loss(self, y: torch.Tensor, rank: int) -> torch.Tensor:
        return self.head(y).square().mean() if rank == 0 else y.pow(3).mean()

    def forward(self, x: torch.Tensor, rank: int) -> torch.Tensor:
        return self.loss(self.norm(x), rank)


def values(ranks: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(2 * ranks, 8, generator=generator, dtype=torch.float64) * 3 + 1


def whole(ranks: int) -> dict[str, torch.Tensor]:
    """Gradients of one process with the whole batch: the mean of all ranks' losses."""
    model = Headed(nn.BatchNorm1d(8, dtype=torch.float64))
    y = model.norm(values(ranks))
    sum(model.loss(y[2 * r : 2 * r + 2], r) for r in range(ranks)).div(ranks).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def headed(**options: object) -> Headed:
    return Headed(syncbn.SyncBatchNorm1d(8, dtype=torch.float64, **options))


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: parameter.grad for name, parameter in model.named_parameters()}
    return {
        name: grad.full_tensor() if hasattr(grad, "full_tensor") else grad
        for name, grad in found.items()
    }


def assert_all_whole(results: list[dict[str, torch.Tensor]]) -> None:
    for result in results:
        torch.testing.assert_close(result, whole(len(results)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("size", [2, 4, 9])
def test_heads_that_one_rank_uses_under_ddp(ranks, size):
    """On a shared group the head's bucket and the layer's backward come in another order there."""

    def run(rank):
        model = DistributedDataParallel(headed(), bucket_cap_mb=1e-5, find_unused_parameters=True)
        for _ in range(3):
            model.zero_grad()
            model(values(size)[2 * rank : 2 * rank + 2], rank).backward()
        return gradients(model.module)

    assert_all_whole(ranks(size, run, timeout=120))


def test_other_losses_on_each_rank_under_fsdp2(ranks):
    """The user's messages too. FSDP2 wants every parameter used on every rank, and has a group."""

    def run(rank):
        model, mesh = headed(), DeviceMesh.from_group(dist.new_group([0, 1]), "cpu")
        fully_shard(model.norm, mesh=mesh)
        fully_shard(model.head, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for _ in range(3):
            model.zero_grad()
            mine = torch.full((20,), float(rank))
            early = dist.all_reduce(mine, async_op=True) if rank else None
            y = model.norm(values(2)[2 * rank : 2 * rank + 2])
            (early or dist.all_reduce(mine, async_op=True)).wait()
            unused = 0 * model.head(y).sum() if rank else 0
            (model.loss(y, rank) + unused).backward()
            assert (mine == 1).all()
        return gradients(model)

    assert_all_whole(ranks(2, run))


@pytest.mark.parametrize(
    ("size", "compiled"),
    [(2, False), (2, True), (4, False), pytest.param(9, False, marks=pytest.mark.slow)],
)
def test_the_users_own_calls_between_the_layers(ranks, size, compiled):
    """Some ranks call before the layer's forward, others between it and its backward."""

    def run(rank):
        model = headed()
        if compiled:
            model.norm.compile(fullgraph=True, backend="aot_eager")
        for _ in range(3):
            model.zero_grad()
            mine = torch.full((20,), float(rank))
            early = dist.all_reduce(mine, async_op=True) if rank % 2 else None
            loss = model(values(size)[2 * rank : 2 * rank + 2], rank)
            (early or dist.all_reduce(mine, async_op=True)).wait()
            assert (mine == sum(range(size))).all()
            loss.backward()
            for parameter in model.parameters():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
                dist.all_reduce(parameter.grad)
                parameter.grad /= size
        return gradients(model)

    assert_all_whole(ranks(size, run, timeout=120))


def test_until_all_done_has_calls_of_its_own(ranks):
    def run(rank):
        mine = torch.ones(3)
        early = dist.all_reduce(mine, async_op=True) if rank else None
        steps = syncbn.until_all_done([torch.ones(2, 3)] * (1 + rank))
        counts = [(len(batch), steps.samples) for batch in steps]
        (early or dist.all_reduce(mine, async_op=True)).wait()
        assert (mine == 2).all()
        return counts

    assert ranks(2, run) == [[(2, 4), (0, 2)], [(2, 4), (2, 2)]]


def test_a_group_of_some_ranks_is_cloned_by_them_alone(ranks):
    def run(rank):
        known = dist.distributed_c10d._world.pg_names
        pairs = [dist.new_group([0, 1]), dist.new_group([2, 3])]
        layer = syncbn.SyncBatchNorm1d(2, momentum=1.0, process_group=pairs[rank // 2])
        if rank < 2:
            layer(torch.full((1, 2), float(rank)))
        assert len(dist.distributed_c10d._world.pg_config_info) == len(
            known
        )  # torch's tables agree
        return layer.running_mean.tolist()

    assert ranks(4, run) == [[0.5, 0.5]] * 2 + [[0.0, 0.0]] * 2


def test_one_clone_for_each_group_as_it_was_made(ranks):
    def run(rank):
        seconds = datetime.timedelta(seconds=41)
        group, mesh = dist.new_group([0, 1], timeout=seconds), init_device_mesh("cpu", (2,))
        for given in (None, group, mesh):
            layer = syncbn.SyncBatchNorm1d(2, process_group=given)
            repr(layer), layer.eval()(torch.randn(2, 2))  # no reason to make one
        given = [dist.group.WORLD, group, mesh.get_group()]
        names = dist.distributed_c10d._world.pg_map
        clones = []
        for parent in given:
            before = set(names)
            for _ in range(2):
                syncbn.SyncBatchNorm1d(2, process_group=parent)(torch.randn(2, 2))
            clone = private(parent)
            assert clone is private(parent)
            assert clone is not parent
            assert set(names) - before <= {clone}
            assert dist.get_process_group_ranks(clone) == dist.get_process_group_ranks(parent)
            assert dist.get_backend_config(clone) == dist.get_backend_config(parent)
            clones.append(clone)
        cpu = torch.device("cpu")
        assert clones[1]._get_backend(cpu).options._timeout == seconds
        assert clones[0]._get_backend(cpu).options._timeout != seconds
        assert len(set(clones)) == len(set(given))

    ranks(2, run)


def test_a_timeout_that_is_changed_later(ranks):
    def run(rank):
        group, cpu = dist.new_group([0, 1]), torch.device("cpu")
        layer, found = syncbn.SyncBatchNorm1d(2, process_group=group), []
        for seconds in (None, 43, None, 44):
            if seconds is not None:
                timeout = datetime.timedelta(seconds=seconds)
                dist.distributed_c10d._set_pg_timeout(timeout, group)
            layer(torch.randn(2, 2))
            clone = private(group)
            found.append(clone._get_backend(cpu).options._timeout.total_seconds())
        return found

    assert ranks(2, run) == [[1800, 43, 43, 44]] * 2


def test_a_part_of_a_group_on_a_device_is_cloned_as_if_on_none(ranks):
    """torch would split the whole group's communicator, which takes all of its ranks."""

    def run(rank):
        c10d, whole, seen = dist.distributed_c10d, dist.group.WORLD, []
        make, device = c10d._new_process_group_helper, torch.device("cuda", 0)

        def noticed(*arguments, **options):
            seen.append((whole.bound_device_id, options["device_id"]))
            return make(*arguments, **options)

        part = dist.new_group([0, 1])
        whole.bound_device_id = device
        try:
            with mock.patch.object(c10d, "_new_process_group_helper", noticed):
                private(part)
            return seen, whole.bound_device_id == device
        finally:
            whole.bound_device_id = None

    assert ranks(2, run) == [([(None, None)], True)] * 2


class Options:
    """What backends have that were never split, in a class that takes nothing else."""

    __slots__ = ("_timeout",)


def group_of(backend: SimpleNamespace) -> SimpleNamespace:
    """With another one for the CPU, that has no options."""
    backends = {"cpu": SimpleNamespace(), "cuda": backend}
    return SimpleNamespace(
        _device_types=[torch.device(name) for name in backends],
        _get_backend=lambda device: backends[device.type],
    )


def test_what_a_group_was_split_from_is_not_the_clones():
    """NCCL's options tell it; the parent's own stay as they are."""
    seconds = datetime.timedelta(seconds=5)
    split, whole = SimpleNamespace(split_from="a parent", _timeout=seconds), Options()
    whole._timeout = seconds
    for options in (split, whole):
        group = group_of(SimpleNamespace(options=options))
        assert groups.timeout_of(group)() == seconds.total_seconds()
        copied, timeout = groups._settings(group)
        assert type(copied) is type(options)
        assert timeout == copied._timeout == seconds
        assert getattr(copied, "split_from", None) is None
    assert split.split_from == "a parent"


def test_backends_without_options_keep_their_own_time():
    group = group_of(SimpleNamespace())
    assert groups._Clone(group, group).in_time() is group


def test_sub_groups_of_group_size_are_ours_already(ranks):
    def run(rank):
        model = syncbn.convert(nn.BatchNorm1d(2), group_size=2)
        before = len(dist.distributed_c10d._world.pg_map)
        model(torch.randn(2, 2))
        assert private(model.process_group) is model.process_group
        again = syncbn.convert(nn.BatchNorm1d(2), group_size=2)
        assert again.process_group is model.process_group
        return len(dist.distributed_c10d._world.pg_map) - before

    assert ranks(4, run) == [0] * 4


def test_a_clone_is_freed_with_its_group(ranks):
    def run(rank):
        known = dist.distributed_c10d._world
        tables = (known.pg_map, known.pg_group_ranks, known.pg_backend_config, known.pg_to_tag)
        sizes = [len(table) for table in tables]

        def clones_tags():
            return [tag for tag in known.tags_to_pg if "syncbn" in tag]

        tags = clones_tags()
        for _ in range(2):
            group = dist.new_group([0, 1])
            syncbn.SyncBatchNorm1d(2, process_group=group)(torch.randn(2, 2))
            clone, name = weakref.ref(private(group)), groups.name_in_graphs(group)
            assert clone() in known.pg_map
            dist.destroy_process_group(group)
            del group
            gc.collect()
            assert clone() is None
            assert [len(table) for table in tables] == sizes
            assert clones_tags() == tags
            with pytest.raises(RuntimeError, match="Could not resolve the process group"):
                dist.distributed_c10d._resolve_process_group(name)

    ranks(2, run)


BEGIN = """
import datetime, os, sys, torch, torch.distributed as dist, syncbn
rank, folder = int(os.environ["RANK"]), sys.argv[1]

def start(number, **options):
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store{number}", rank=rank, world_size=2,
        timeout=datetime.timedelta(seconds=60), **options,
    )

start(1)
"""
PROGRAM = """
def mean(layer):
    layer(torch.full((1, 2), float(rank)))
    return layer.running_mean.tolist()

group = dist.new_group([0, 1])
on_default = syncbn.SyncBatchNorm1d(2, momentum=1.0)
on_group = syncbn.SyncBatchNorm1d(2, momentum=1.0, process_group=group)
print(mean(on_default), mean(on_group))
dist.destroy_process_group()
start(2)
print(mean(on_default))
for use in (lambda: mean(on_group), lambda: syncbn.SyncBatchNorm1d(2, process_group=group)):
    try:
        print("no error", use())
    except ValueError as error:
        print(error)
print(on_group)
on_group.process_group = dist.new_group([0, 1])
print(mean(on_group))
dist.destroy_process_group()
"""


def test_after_destroy_and_initialisation(tmp_path):
    for ended in execute(BEGIN + PROGRAM, str(tmp_path), ranks=2):
        said = ended.stdout.splitlines()
        assert said[0] == "[0.5, 0.5] [0.5, 0.5]", ended
        assert said[1] == "[0.5, 0.5]", said
        for refused in said[2:4]:
            assert refused.startswith(
                "process_group: got a torch.distributed group of 2 ranks that was destroyed; "
                "make it anew after torch.distributed.init_process_group"
            ), said
        assert said[4].endswith("group_size=unavailable)"), said
        assert said[5] == "[0.5, 0.5]", said


def test_what_was_never_sent_is_nobody_elses_fault(ranks):
    """Only errors from the backend are blamed on another rank."""

    def run(rank):
        class Refused:
            def __call__(self, *_: object, **__: object) -> None:
                raise RuntimeError("no such tensor")

        comm = syncbn.comm.resolve(group_over("torch"))
        texts = []
        for name in ("all_to_all_single", "all_gather"):
            original = getattr(dist, name)
            setattr(dist, name, Refused())
            comm.direct_exchange_max_size = 8 if name == "all_to_all_single" else 0
            try:
                comm.all_gather(torch.ones(2))
            except RuntimeError as error:
                texts.append(str(error))
            finally:
                setattr(dist, name, original)
        return texts

    for rank, texts in enumerate(ranks(2, run)):
        said = (
            f"ProcessGroup: all_gather could not be sent on rank {rank} of 2 (gloo): no such tensor"
        )
        assert texts == [said] * 2


def test_a_rank_may_begin_in_a_compiled_graph(ranks):
    """The clone is made while it compiles, and by the other in its first call."""

    def step(rank):
        layer = syncbn.SyncBatchNorm1d(3, process_group=dist.new_group([0, 1]))
        call = layer if rank else torch.compile(layer, backend="eager", fullgraph=True)
        return call(torch.full((2, 3), float(rank))).mean().item()

    assert ranks(2, step) == pytest.approx([-1, 1], abs=1e-4)


def test_threads_may_begin_with_other_groups_on_each_rank(ranks):
    """Each group is cloned by itself: one that waits for its ranks keeps no other waiting."""

    def run(rank):
        both = [dist.new_group([0, 1]) for _ in range(2)]
        means = [None, None]

        def train(number):
            layer = syncbn.SyncBatchNorm1d(2, momentum=1.0, process_group=both[number])
            layer(torch.full((1, 2), float(rank)))
            means[number] = layer.running_mean.tolist()

        waiting, meet = threading.Event(), ProcessGroup.meet

        def noticed(comm, operation):
            waiting.set()
            meet(comm, operation)

        first = threading.Thread(target=train, args=(rank,), daemon=True)
        with mock.patch.object(ProcessGroup, "meet", noticed):
            first.start()
            assert waiting.wait(30)
            train(1 - rank)
        first.join(30)
        return means

    assert ranks(2, run) == [[[0.5, 0.5]] * 2] * 2


PROGRAMS = {
    "missing": """
store = dist.distributed_c10d._get_default_store()
dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=1))
if rank == 1:
    store.wait(["said"], datetime.timedelta(seconds=60))
    os._exit(0)
try:
    syncbn.SyncBatchNorm1d(2)(torch.randn(2, 2))
except RuntimeError as error:
    print(error, flush=True)
store.set("said", "")
os._exit(0)
""",
    "graph": """
group = dist.new_group([0, 1])
layer = syncbn.SyncBatchNorm1d(2, process_group=group)
layer.compile(backend="aot_eager", fullgraph=True)
layer(torch.randn(2, 2))
dist.destroy_process_group()
start(2)
other = dist.new_group([0, 1])
assert other.group_name == group.group_name
syncbn.SyncBatchNorm1d(2, process_group=other)(torch.randn(2, 2))
try:
    layer(torch.randn(2, 2))
except Exception as error:
    print(error)
dist.destroy_process_group()
""",
}


SAYS = {
    "missing": {0: ("rank 0 of 2: all_gather: rank 1 has not arrived within 1 s",)},
    "graph": dict.fromkeys((0, 1), ("if it was destroyed: set layer.process_group to a group",)),
}


@pytest.mark.parametrize("program", PROGRAMS)
def test_what_is_said_of_peers_and_groups_that_are_gone(tmp_path, program):
    heard = execute(BEGIN + PROGRAMS[program], str(tmp_path), ranks=2)
    for rank, texts in SAYS[program].items():
        assert all(text in heard[rank].stdout for text in texts), heard


# Wrapped, with a check of every call; bound to a device, which torch refuses where there is none.
OTHERWISE = {
    "debug": "dist.set_debug_level_from_env(); start(1)",
    "device": "start(1); dist.group.WORLD.bound_device_id = torch.device('cuda', 0)",
}
TRAINS = """
group = dist.new_group([0, 1])
for given in (None, group):
    layer = syncbn.SyncBatchNorm1d(2, momentum=1.0, process_group=given)
    layer(torch.full((2, 2), float(rank), requires_grad=True)).square().sum().backward()
    assert layer.running_mean.tolist() == [0.5] * 2
dist.distributed_c10d._set_pg_timeout(datetime.timedelta(seconds=40))
syncbn.SyncBatchNorm1d(2)(torch.randn(2, 2))
dist.destroy_process_group()
print("trained")
"""


@pytest.mark.slow
@pytest.mark.parametrize("otherwise", OTHERWISE)
def test_groups_that_torch_makes_otherwise(tmp_path, otherwise):
    program = BEGIN.replace("\nstart(1)\n", f"\n{OTHERWISE[otherwise]}\n") + TRAINS
    heard = execute(program, str(tmp_path), ranks=2, TORCH_DISTRIBUTED_DEBUG="DETAIL")
    assert ["trained" in rank.stdout for rank in heard] == [True, True], heard
