"""torch.compile: one graph with the collectives in it, and what comes out of it as eager."""

from __future__ import annotations

import copy

import pytest
import torch
import torch._dynamo
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import syncbn
from support import oracle
from support.compiling import (
    BACKENDS,
    CLOSE,
    EVERY,
    Network,
    assert_as_eager,
    compiled,
    one_graph_only,
    step,
)


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
        exchanges = {"syncbn.gather.default", "syncbn.reduce.default"}
        collectives = [str(node.target) for node in every if str(node.target) in exchanges]
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
        model = syncbn.convert(Network(options=EVERY))
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
        model = syncbn.convert(Network())
        call, _ = compiled(model, backend, dynamic=None if marked else True)
        batches = [torch.randn(6 + rank + 2 * i, 5, dtype=torch.float64) for i in range(3)]
        plain = copy.deepcopy(model)
        for batch in batches:
            x = batch.clone()
            if marked:
                torch._dynamo.mark_dynamic(x, 0)
            with one_graph_only():
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


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointing(ranks, inside, backend):
    """Statistics move once: checkpoints in a compiled model, compiled blocks in checkpoints."""

    def run(rank):
        model, plain = syncbn.convert(Network(reentrant=False)), syncbn.convert(Network())
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
        for make in (lambda: Network(options=EVERY).blocks[0], lambda: nn.BatchNorm1d(5).double()):
            model = make()
            call, _ = compiled(model)
            call(x), syncbn.convert(call), model.load_state_dict(make().state_dict())
            assert_as_eager(call, model, [(x + rank,)])
            layers = [part for part in model.modules() if isinstance(part, syncbn.SyncBatchNorm)]
            means.append([part.running_mean for part in layers if part.running_mean is not None])
        return means

    first, second = ranks(2, run)
    torch.testing.assert_close(first, second, rtol=0, atol=0)
