"""torch.compile: one graph with the collectives in it, and what comes out of it as eager."""

from __future__ import annotations

import copy
import importlib
import itertools
from concurrent.futures import ThreadPoolExecutor

import oracle
import pytest
import torch
import torch._dynamo
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import syncbn
from syncbn import kernels
from syncbn.kernels import native

BACKENDS = ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)]
CLOSE = {"rtol": 1e-9, "atol": 1e-11}


class Network(nn.Module):
    """BatchNorm of every kind of momentum and statistics."""

    def __init__(self, width: int = 5, checkpointed: bool = False) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.checkpointed = checkpointed
        options = {}, {"momentum": None}, {"track_running_stats": False}, {"affine": False}
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(width, width), nn.BatchNorm1d(width, **some), nn.Tanh())
            for some in options
        )
        self.double()

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


def compiled(model, backend="aot_eager", **options):
    """The compiled model, and a counter of the graphs that the backend is given."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, backend=counter, **{"fullgraph": True, **options}), counter


def step(call, model, x, *args):
    """Everything that one forward and, where there is one, backward show."""
    model.zero_grad()
    x = x.detach().clone().requires_grad_(x.requires_grad)
    y = call(x, *args)
    if y.requires_grad:
        y.sin().sum().backward()
    seen = [y.detach(), x.grad, y.requires_grad, *(p.grad for p in model.parameters())]
    return seen, {name: value.clone() for name, value in model.state_dict().items()}


def assert_as_eager(call, model, batches, **tolerance):
    """``call``, a compiled ``model``, does what a copy of ``model`` does, batch by batch."""
    plain = copy.deepcopy(model)
    for batch in batches:
        actual, expected = step(call, model, *batch), step(plain, plain, *batch)
        torch.testing.assert_close(actual, expected, **{**CLOSE, **tolerance})


@pytest.mark.parametrize(
    ("world", "backend"),
    [(3, "aot_eager"), (2, "inductor"), pytest.param(3, "inductor", marks=pytest.mark.slow)],
)
def test_one_graph_is_exact(ranks, world, backend):
    """Against one process with the whole batch; its collectives are in the graph, one each way."""
    x, dy = torch.randn(2, 2 * world + 1, 3, 4, dtype=torch.float64) + 1

    def run(rank):
        layer = syncbn.SyncBatchNorm(3, dtype=torch.float64)
        call, counter = compiled(layer, backend)
        mine = slice(2 * rank, 2 * rank + (3 if rank == world - 1 else 2))
        share = x[mine].clone().requires_grad_()
        y = call(share)
        y.backward(dy[mine])
        (graph,) = counter.graphs
        every = (
            node for part in graph.modules() if hasattr(part, "graph") for node in part.graph.nodes
        )
        collectives = [str(node.target) for node in every if "all_to_all" in str(node.target)]
        assert len(collectives) == 2, collectives
        return y, share.grad, layer.weight.grad, layer.running_mean, layer.running_var

    results = ranks(world, run, timeout=180)
    expected = oracle.batch_norm(x, dy)
    y, dx = (torch.cat([result[i] for result in results]) for i in range(2))
    oracle.assert_close(y, expected.y, factor=4)
    oracle.assert_close(dx, expected.dx, factor=4)
    oracle.assert_close(sum(result[2] for result in results), expected.dweight, factor=4)
    for *_, mean, var in results:
        oracle.assert_close(mean, expected.running(0, 1, 0.1)[0])
        oracle.assert_close(var, expected.running(0, 1, 0.1)[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("world", [1, 2])
def test_training_and_eval_of_a_network(ranks, world, backend):
    """Other values need no other graph: one for training, one for eval."""

    def run(rank):
        model = syncbn.convert(Network())
        call, counter = compiled(model, backend)
        x = torch.randn(3, 3 + rank, 5, dtype=torch.float64)
        assert_as_eager(call, model, [(batch,) for batch in x])
        model.eval()
        assert_as_eager(call, model, [(batch,) for batch in x])
        return counter.frame_count, dict(torch._dynamo.utils.counters["graph_break"])

    results = ranks(world, run, timeout=180) if world > 1 else [run(0)]
    assert results == [(2, {})] * world


@pytest.mark.parametrize("marked", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_dynamic_batch_sizes(ranks, marked, backend):
    def run(rank):
        config = importlib.import_module("torch._dynamo.config")  # cannot travel with this function
        model = syncbn.convert(Network())
        call, _ = compiled(model, backend, dynamic=None if marked else True)
        batches = [torch.randn(6 + rank + 2 * i, 5, dtype=torch.float64) for i in range(3)]
        plain = copy.deepcopy(model)
        for batch in batches:
            x = batch.clone()
            if marked:
                torch._dynamo.mark_dynamic(x, 0)
            with config.patch(error_on_recompile=True):
                actual, expected = call(x), plain(batch)
            torch.testing.assert_close(actual, expected, **CLOSE)
            actual.sin().sum().backward(), expected.sin().sum().backward()
        for mine, its in zip(model.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, its.grad, **CLOSE)
        torch.testing.assert_close(model.state_dict(), plain.state_dict(), **CLOSE)

    ranks(2, run, timeout=180)


@pytest.mark.parametrize("outside", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_ddp(ranks, outside, backend):
    """DDP's optimizer gives each bucket a graph of its own; dynamo's is whole within DDP."""

    def run(rank):
        model = syncbn.convert(Network(400))
        plain = DistributedDataParallel(copy.deepcopy(model))
        if outside:
            call, counter = compiled(
                DistributedDataParallel(model, bucket_cap_mb=1), backend, fullgraph=False
            )
        else:
            call, counter = compiled(model, backend)
            call = DistributedDataParallel(call, bucket_cap_mb=1)
        optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (call, plain)]
        for _ in range(2):
            x = torch.randn(3 + rank, 400, dtype=torch.float64)
            for optimizer, m in zip(optimizers, (call, plain), strict=True):
                optimizer.zero_grad()
                m(x).square().mean().backward()
                optimizer.step()
        torch.testing.assert_close(model.state_dict(), plain.module.state_dict(), **CLOSE)
        breaks = torch._dynamo.utils.counters["graph_break"]
        return counter.frame_count > 1, any("DDP" in why or "Logger" in why for why in breaks)

    assert ranks(2, run, timeout=180) == [(True, outside)] * 2


def layer(rank, requires_grad=True, **options):
    return syncbn.SyncBatchNorm(3, dtype=torch.float64, **options).requires_grad_(requires_grad)


def batch(size, requires_grad=True):
    return (torch.randn(size, dtype=torch.float64, requires_grad=requires_grad),)


def masked(rank):
    return *batch((2, 3, 5)), torch.rand(2, 5) > (0.3 if rank else 1)


CORNERS = {
    "frozen": lambda rank: (layer(rank, False), batch((2, 3, 4), False)),
    "input that wants no gradient": lambda rank: (layer(rank), batch((2, 3, 4), rank == 1)),
    "one value per rank": lambda rank: (layer(rank), batch((1, 3))),
    "empty rank": lambda rank: (layer(rank), batch((2 * rank, 3, 4))),
    "empty, stateless": lambda rank: (
        layer(rank, track_running_stats=False, affine=False),
        batch((2 * rank, 3, 4)),
    ),
    "reproducible": lambda rank: (layer(rank, reproducible=True), batch((2 * rank, 3))),
    "mask": lambda rank: (layer(rank), masked(rank)),
    "alone": lambda rank: (layer(rank, process_group=syncbn.comm.LOCAL, momentum=None), masked(1)),
    "local groups": lambda rank: (
        syncbn.convert(nn.BatchNorm1d(3).double(), group_size=1),
        batch((2, 3, 4)),
    ),
}
SLOW = [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in itertools.product(CORNERS, ["aot_eager", "inductor"], ["native", "composite"])
    if case[1:] != ("aot_eager", "native")
]


@pytest.mark.parametrize(
    ("corner", "backend", "chosen"), [*((name, "aot_eager", None) for name in CORNERS), *SLOW]
)
def test_corners(ranks, corner, backend, chosen):
    """On one rank or the other."""
    exact = {"rtol": 0, "atol": 0} if "reproducible" in corner else {}
    if chosen == "native" and native.unavailable():
        pytest.skip(native.unavailable())

    def run(rank):
        kernels._choice = chosen
        try:
            model, batch = CORNERS[corner](rank)
            call, counter = compiled(model, backend)
            assert_as_eager(call, model, [batch, batch], **exact)
            return counter.frame_count
        finally:
            kernels._choice = None

    assert ranks(2, run, timeout=300) == [1, 1]


def test_a_rank_in_no_grad_and_one_in_autocast(ranks):
    def run(rank):
        model = syncbn.convert(Network().float())
        plain = copy.deepcopy(model)
        call, _ = compiled(model)
        x = torch.randn(6, 5)
        with torch.autocast("cpu", enabled=rank == 1), torch.set_grad_enabled(rank == 1):
            actual, expected = call(x), plain(x)
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-3, atol=1e-3)
        return actual.requires_grad

    assert ranks(2, run) == [False, True]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_graph_cannot_do_is_refused(ranks, backend):
    """A single value, on every rank alike; a gradient that only others want, where it is not."""

    def run(rank):
        call, _ = compiled(layer(rank), backend)
        with pytest.raises(RuntimeError, match="Expected more than 1 value per channel"):
            call(*batch((rank, 3, 1)))
        call, _ = compiled(layer(rank, rank == 1), backend)
        if rank == 1:
            return call(*batch((2, 3), False)).requires_grad
        with pytest.raises(RuntimeError, match="to want a gradient on all ranks or none"):
            call(*batch((2, 3), False))

    assert ranks(2, run) == [None, True]


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing(ranks, inside, backend):
    """Statistics move once: checkpoints in a compiled model, compiled blocks in checkpoints."""

    def run(rank):
        model, plain = syncbn.convert(Network(checkpointed=True)), syncbn.convert(Network())
        call = model
        if inside:
            call, _ = compiled(model, backend)
        else:
            torch._dynamo.reset()
            for block in model.blocks:
                block.compile(backend=backend, fullgraph=True)
        for _ in range(2):
            x = torch.randn(3 + rank, 5, dtype=torch.float64, requires_grad=True)
            torch.testing.assert_close(step(call, model, x), step(plain, plain, x), **CLOSE)

    ranks(2, run, timeout=180)


def test_converting_what_is_compiled(ranks):
    """As a network and as a layer: what has run before is traced anew."""

    def run(rank):
        x, means = torch.randn(4, 5, dtype=torch.float64), []
        for make in (
            lambda: nn.Sequential(nn.BatchNorm1d(5), nn.Tanh(), nn.BatchNorm1d(5)).double(),
            lambda: nn.BatchNorm1d(5).double(),
        ):
            model = make()
            call, _ = compiled(model)
            call(x), syncbn.convert(call), model.load_state_dict(make().state_dict())
            assert_as_eager(call, model, [(x + rank,)])
            layers = [part for part in model.modules() if isinstance(part, syncbn.SyncBatchNorm)]
            means.append([part.running_mean for part in layers if part.running_mean is not None])
        return means

    first, second = ranks(2, run)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_threads(no_hang):
    """A communicator of locks breaks the graph, and works."""
    x = torch.randn(4, 3, dtype=torch.float64)

    def run(comm, fullgraph):
        with comm:
            model = layer(comm.rank, process_group=comm)
            call = torch.compile(model, backend="aot_eager", fullgraph=fullgraph)
            share = x[2 * comm.rank : 2 * comm.rank + 2].clone().requires_grad_()
            y = call(share)
            y.backward(y.detach().cos())
            return y, share.grad

    for fullgraph in (True, False):
        torch._dynamo.reset()
        with ThreadPoolExecutor(2) as pool:
            results = pool.map(run, syncbn.comm.threads(2), [fullgraph] * 2)
            if fullgraph:
                with pytest.raises(torch._dynamo.exc.Unsupported):
                    list(results)
            else:
                y, dx = map(torch.cat, zip(*results, strict=True))
    expected = oracle.batch_norm(x, y.cos())
    oracle.assert_close(y, expected.y, factor=4)
    oracle.assert_close(dx, expected.dx, factor=4)
