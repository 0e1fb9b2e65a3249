"""torch.compile together with what changes around a graph: masks, loaders that end, join(), DDP."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import syncbn
from support.cases import CLOSE
from support.compiling import Network, compiled, step
from support.sequences import speech
from syncbn import masking


@pytest.mark.parametrize("first_within", [True, False])
def test_masking_around_a_graph(first_within):
    """Entering, leaving and changing the mask each show at once, whatever was traced first."""
    x, _, mask = speech(size=8)
    other = mask.clone()
    other[0] = False
    model, plain = (syncbn.convert(nn.Sequential(nn.BatchNorm1d(3).double())) for _ in range(2))
    call, _ = compiled(model)
    masks = [mask, None, other, lambda name, input: mask]
    for given in masks if first_within else [None, *masks]:
        if given is None:
            torch.testing.assert_close(call(x), plain(x))
            continue
        with masking(model, given), masking(plain, given):
            torch.testing.assert_close(call(x), plain(x))
            if given is mask:  # a checkpoint's second forward is masked alike
                kept, expected = (x.clone().requires_grad_() for _ in range(2))
                checkpoint(call, kept, use_reentrant=False).square().sum().backward()
                plain(expected).square().sum().backward()
                torch.testing.assert_close(kept.grad, expected.grad)
    torch.testing.assert_close(model.state_dict(), plain.state_dict())


@pytest.mark.parametrize(
    "watched", ["model", *(pytest.param(name, marks=pytest.mark.slow) for name in ("graph", "ddp"))]
)
def test_until_all_done(ranks, watched):
    """``model=`` may be the model, its compiled form or what is around it."""
    data = torch.randn(4, 3, 5, dtype=torch.float64)
    loaders = [[data[0], data[1], data[2]], [data[3]]]

    def run(rank, compile):
        model = syncbn.convert(Network())
        call = compiled(model)[0] if compile else model
        ddp = DistributedDataParallel(call)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        steps = syncbn.until_all_done(
            loaders[rank], model={"model": model, "graph": call, "ddp": ddp}[watched]
        )
        for x in steps:
            optimizer.zero_grad()
            (ddp(x).sin().sum() * steps.scale).backward()
            optimizer.step()
        return model.state_dict()

    for graph, plain in zip(ranks(2, run, True), ranks(2, run, False), strict=True):
        torch.testing.assert_close(graph, plain, **CLOSE)


def forwards(model, x, number):
    for _ in range(number):
        model(x).sum().backward()


@pytest.mark.parametrize("before", [True, False])
def test_join_is_refused(ranks, before):
    """Whether the graph was traced before it or not."""

    def run(rank):
        ddp = DistributedDataParallel(compiled(syncbn.convert(Network()))[0])
        x = torch.randn(3, 5, dtype=torch.float64)
        if before:
            ddp(x).sum().backward()
        with pytest.raises(RuntimeError) as caught, ddp.join():
            forwards(ddp, x, 1 + rank)
        return str(caught.value)

    for text in ranks(2, run):
        assert "iterate over syncbn.until_all_done(loader) instead" in text


def test_ddp_with_other_sizes_and_eval(ranks):
    def run(rank):
        model = syncbn.convert(Network())
        plain = DistributedDataParallel(copy.deepcopy(model))
        call = DistributedDataParallel(compiled(model, dynamic=True)[0])
        for size in (4, 2, 7, 0, 1):
            x = torch.randn(size + 2 * rank, 5, dtype=torch.float64, requires_grad=True)
            torch.testing.assert_close(step(call, model, x), step(plain, plain.module, x), **CLOSE)
        x = torch.randn(3, 5, dtype=torch.float64)
        actual, expected = step(call.eval(), model, x), step(plain.eval(), plain.module, x)
        torch.testing.assert_close(actual, expected, **CLOSE)

    ranks(2, run, timeout=180)
