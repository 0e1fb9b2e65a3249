"""Ranks out of step: each of them reads who called what; nothing is mixed, hung or ended."""

from __future__ import annotations

import time

import pytest
import torch
import torch._dynamo.testing
import torch.distributed as dist
from torch import nn

import syncbn
from support.groups import group_over
from support.in_threads import in_threads
from support.mpijob import needs_mpi
from syncbn.comm import waiting, words

WIDTH = 4


def model(group=None, **options):
    layers = {name: nn.BatchNorm1d(WIDTH) for name in ("first", "second")}
    return syncbn.convert(nn.ModuleDict(layers), group, **options)


def x(channels=WIDTH):
    return torch.randn(3, channels, requires_grad=True)


def run(layers, names, backward=True):
    y = x()
    for name in names:
        y = layers[name](y)
    if backward:
        y.sum().backward()


def skip(group, odd):
    run(model(group), ["second"] if odd else ["first", "second"])


def swap(group, odd):
    run(model(group), ["second", "first"] if odd else ["first", "second"])


def experts(group, odd):
    layers = [syncbn.SyncBatchNorm(WIDTH, process_group=group) for _ in range(2)]
    layers[odd](x())


def in_eval(group, odd):
    layers = model(group)
    layers["first"].train(not odd)
    run(layers, ["first", "second"])


def without_grad(group, odd):
    layers = model(group)
    with torch.set_grad_enabled(not odd):
        run(layers, ["first"], backward=not odd)


def backward_on_some(group, odd):
    layers = model(group)
    y = layers["first"](x())
    if not odd:
        y.sum().backward()
    layers["second"](x())


def differentiable(group, odd):
    layers, given = model(group), x()
    y = layers["first"](given)
    torch.autograd.grad(y.square().sum(), given, create_graph=odd)


def channels(group, odd):
    width = 5000 if odd else 1
    syncbn.SyncBatchNorm(width, process_group=group)(x(width))


def narrower(group, odd):
    width = 3 if odd else 4000
    syncbn.SyncBatchNorm(width, process_group=group)(x(width))


def reproducible(group, odd):
    run(model(group, reproducible=odd), ["first"])


def where(group, odd):
    def chosen(name, layer):
        return not odd or name != "first"

    run(model(group, where=chosen), ["first", "second"])


def mapped(group, odd):
    layers = model(group)
    layers["first"].track_running_stats = False
    given = torch.randn(2, 3, WIDTH) if odd else torch.randn(3, WIDTH)
    call = torch.func.vmap(layers["first"]) if odd else layers["first"]
    call(given)


def one_layer_more(group, odd):
    layers = model(group)
    for _ in range(2):
        run(layers, ["first"])
    if odd:
        run(layers, ["first"])
    run(layers, ["second"])


FIRST, SECOND = "forward of layer 'first'", "forward of layer 'second'"
# What the others call, and what the odd one does.
CASES = {
    skip: (FIRST, SECOND),
    swap: (FIRST, SECOND),
    experts: ("'SyncBatchNorm ", "'SyncBatchNorm "),
    in_eval: (FIRST, SECOND),
    without_grad: ("gradients wanted", "gradients off"),
    backward_on_some: ("backward of layer 'first'", SECOND),
    differentiable: ("backward of layer 'first'", "differentiable backward of layer 'first'"),
    channels: ("(1 channels)", "(5000 channels)"),
    narrower: ("(4000 channels)", "(3 channels)"),
    reproducible: ("(4 channels)", "(4 channels), reproducible"),
    where: (FIRST, SECOND),
    mapped: ("forward of", "forward within a transform"),
    one_layer_more: (SECOND, FIRST),
}
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)


def desync(case, group, odd):
    """A case's error on this rank, from which all go on together."""
    torch.manual_seed(0)
    with pytest.raises(syncbn.DesyncError) as caught:
        case(group, odd)
    run(model(group), ["first", "second"])
    error = caught.value
    return str(error), error.layer, error.ranks


def check(case, found, odd):
    (text,) = {text for text, _, _ in found}
    said = found[0][2]
    assert all(ranks == said for _, _, ranks in found)
    assert sorted(said) == list(range(len(found)))
    for rank, (_, layer, _) in enumerate(found):
        assert CASES[case][rank == odd] in said[rank], said
        assert f"'{layer}'" in said[rank]
    others = said[0 if odd else 1]
    assert all(each == others for rank, each in said.items() if rank != odd)
    assert f"{words.ranks(set(said) - {odd})}: {others}" in text
    assert f"rank {odd}: {said[odd]}" in text
    assert "look for a branch that some ranks take" in text


@cases
def test_threads(case):
    check(case, in_threads(3, lambda comm: desync(case, comm, comm.rank == 1)), 1)


@cases
def test_processes(ranks, case):
    """By themselves, in memory that they share; or over gloo, which a message of another size would
    end.
    """

    def over_gloo(rank):
        return desync(case, group_over("torch"), rank == 0)

    check(case, ranks(2, lambda rank: desync(case, None, rank == 0)), 0)
    check(case, ranks(2, over_gloo), 0)


@cases
def test_shared_memory(ranks, case):
    def in_memory(rank):
        return desync(case, syncbn.comm.SharedMemory(), rank == 1)

    check(case, ranks(3, in_memory), 1)


@needs_mpi
def test_mpi(mpi_ranks):
    def all_cases(rank):
        comm = syncbn.comm.MPI()
        return [desync(case, comm, rank == 2) for case in CASES]

    for case, *found in zip(CASES, *mpi_ranks(3, all_cases), strict=True):
        check(case, found, 2)


def test_many_processes(ranks):
    """More than exchange directly: gloo reduces."""
    ranks(9, lambda rank: desync(backward_on_some, group_over("torch"), rank == 8))


def layers_beside(rank):
    """Each rank makes another layer, of the same kind, at another time."""
    if rank == 0:
        syncbn.SyncBatchNorm1d(WIDTH)
    layer = syncbn.SyncBatchNorm1d(WIDTH)
    for _ in range(2):
        layer(x()).sum().backward()
        if rank == 1:
            syncbn.SyncBatchNorm1d(WIDTH)


def wrapped_on_one_rank(rank):
    class Logged(nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def forward(self, given):
            return self.model(given)

    model = nn.Sequential(nn.Linear(WIDTH, WIDTH), syncbn.SyncBatchNorm1d(WIDTH))
    model = Logged(model) if rank else model
    model(x()).sum().backward()


def replicas_on_one_rank(rank):
    model = nn.Sequential(syncbn.SyncBatchNorm1d(WIDTH))
    syncbn.DataParallel(model, ["cpu"] * (1 + rank))(x()).sum().backward()


def another_default_device(rank):
    layer, given = syncbn.SyncBatchNorm1d(WIDTH), x()
    with torch.device("meta"):
        layer(given).sum().backward()
    assert given.grad.device.type == "cpu"


def desync_beside_a_bare_call(rank):
    comm = syncbn.comm.resolve(dist.new_group([0, 1]))
    layer = syncbn.SyncBatchNorm1d(WIDTH, process_group=comm)
    with pytest.raises(syncbn.DesyncError):
        layer(x()) if rank else comm.all_gather(torch.ones(1))
    if rank:
        time.sleep(1.5 * waiting.SLICE)
    layer(x())


RIGHT = [
    layers_beside,
    wrapped_on_one_rank,
    replicas_on_one_rank,
    another_default_device,
    desync_beside_a_bare_call,
]


@pytest.mark.parametrize("program", RIGHT, ids=lambda program: program.__name__)
def test_right_programs(ranks, program):
    ranks(2, program)


def test_memory_on_one_rank_and_a_layer_on_the_other(ranks):
    def step(rank):
        group = group_over("torch")
        layer = syncbn.SyncBatchNorm1d(WIDTH, process_group=group)
        with pytest.raises(syncbn.DesyncError):
            syncbn.comm.SharedMemory(group) if rank else layer(x())

    ranks(2, step)


def test_a_layer_has_the_name_that_it_has_in_the_model_that_runs_it(ranks):
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = nn.ModuleList(syncbn.SyncBatchNorm1d(WIDTH) for _ in range(2))

        def forward(self, given, chosen):
            return self.parts[chosen](given)

    def step(rank):
        with pytest.raises(syncbn.DesyncError) as caught:
            Experts()(x(), rank)
        return caught.value.layer

    assert ranks(2, step) == ["parts.0", "parts.1"]


def compiled(odd, mixed, backend):
    """A swap in blocks that share one graph; on one rank, if mixed, the same blocks without."""

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear, self.norm = nn.Linear(WIDTH, WIDTH), nn.BatchNorm1d(WIDTH)

        def forward(self, given):
            return self.norm(self.linear(given)).relu()

    counted = torch._dynamo.testing.CompileCounterWithBackend(backend)
    blocks = syncbn.convert(nn.ModuleDict({name: Block() for name in ("first", "second")}))
    if not (mixed and odd):
        for block in blocks.values():
            block.compile(backend=counted, fullgraph=True)
    run(blocks, ["first", "second"])
    with pytest.raises(syncbn.DesyncError) as caught:
        run(blocks, ["second", "first"] if odd else ["first", "second"])
    return caught.value.ranks, counted.frame_count


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_layers_in_graphs_have_names(ranks, backend, mixed):
    for said, graphs in ranks(2, lambda rank: compiled(rank == 1, mixed, backend)):
        assert "forward of layer 'first.norm'" in said[0]
        assert "forward of layer 'second.norm'" in said[1]
        assert graphs <= 1
