"""torch.compile where ranks, options and communicators differ: as eager, or refused in words."""

from __future__ import annotations

import copy
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch._dynamo
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh

import syncbn
from support import oracle
from support.compiling import (
    BACKENDS,
    Network,
    assert_as_eager,
    batch,
    compiled,
    layer,
    masked,
    one_graph_only,
)
from syncbn import kernels
from syncbn.kernels import native

CORNERS = {
    "frozen": lambda rank: (layer(rank, False), batch((2, 3, 4), False)),
    "input that wants no gradient": lambda rank: (layer(rank), batch((2, 3, 4), rank == 1)),
    "no gradient for the input, reproducible": lambda rank: (
        layer(rank, reproducible=True),
        batch((2, 3), rank == 1),
    ),
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
    if case[0] == "reproducible" or case[1:] != ("aot_eager", "native")
]


def test_reproducible_for_any_layout(ranks):
    """The batch may lie inside other dimensions, with symbols for strides, in one graph."""
    whole = torch.randn(2, 13, 11, 3).permute(2, 3, 1, 0)  # no size twice: it would be one symbol

    def run(rank):
        call, _ = compiled(syncbn.SyncBatchNorm2d(3, reproducible=True), dynamic=True)
        results = []
        for start in (4, 5, 6):
            share = (whole[start:] if rank else whole[:start]).detach().requires_grad_()
            with one_graph_only():
                y = call(share)
            y.backward(share.detach().cos())
            assert y.stride() == torch.empty_like(share).stride()
            results.append((y.detach(), share.grad))
        return results

    splits = zip(*ranks(2, run, timeout=180), strict=True)
    first, *others = [[torch.cat(part) for part in zip(*split, strict=True)] for split in splits]
    assert all(torch.equal(a, b) for other in others for a, b in zip(other, first, strict=True))


@pytest.mark.parametrize(
    ("corner", "backend", "chosen"),
    [*((name, "aot_eager", None) for name in CORNERS if name != "reproducible"), *SLOW],
)
def test_corners(ranks, corner, backend, chosen):
    """On one rank or the other."""
    exact = {"rtol": 0, "atol": 0} if "reproducible" in corner else {}
    if chosen == "native" and native.unavailable():
        pytest.skip(native.unavailable())

    def run(rank):
        kernels._usable = chosen and {chosen, "composite"}
        try:
            model, batch = CORNERS[corner](rank)
            call, counter = compiled(model, backend)
            assert_as_eager(call, model, [batch, batch], **exact)
            return counter.frame_count
        finally:
            kernels._usable = None

    assert ranks(2, run, timeout=300) == [1, 1]


def test_groups(ranks):
    """Of ranks, or as meshes; a layer given another group is traced anew."""

    def run(rank):
        both, *own = (dist.new_group(members) for members in ([0, 1], [0], [1]))
        mesh = init_device_mesh("cpu", (2,))
        model = nn.Sequential(layer(rank))
        call, counter = compiled(model)
        for process_group in (both, own[rank], None, mesh):
            model[0].process_group = process_group
            assert_as_eager(call, model, [batch((3 + rank, 3))])
        return counter.frame_count

    assert ranks(2, run, timeout=180) == [4, 4]


def test_a_rank_in_autocast(ranks):
    def run(rank):
        model = syncbn.convert(Network().float())
        plain = copy.deepcopy(model)
        call, _ = compiled(model)
        x = torch.randn(6, 5)
        with torch.autocast("cpu", enabled=rank == 1):
            actual, expected = call(x), plain(x)
        torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2)
        torch.testing.assert_close(model.state_dict(), plain.state_dict(), rtol=1e-3, atol=1e-3)

    ranks(2, run)


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_a_graph_cannot_do_is_refused(ranks, backend):
    """A single value, on every rank alike; a gradient that only others want, where it is not."""

    def run(rank):
        call, _ = compiled(layer(rank), backend)
        with pytest.raises(RuntimeError, match="Expected more than 1 value per channel"):
            call(*batch((rank, 3, 1)))
        call, _ = compiled(layer(rank, rank == 1), backend)
        with pytest.raises(syncbn.DesyncError) as caught:
            call(*batch((2, 3), False))
        return caught.value.ranks

    for said in ranks(2, run):
        assert "of layer 'SyncBatchNorm" in said[0]
        assert said[0].endswith("(3 channels), gradients off")
        assert "gradients wanted" in said[1]


class Branches(nn.Module):
    """Layers of which none waits for another's result."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.Linear(6, width), nn.BatchNorm1d(width)) for width in (64, 4)
        )

    def forward(self, x):
        return sum(torch.relu(layer(x)).sum(1) for layer in self.layers)


def test_inductor_keeps_the_order_of_branches(ranks):
    """Which it would choose by sizes, and those differ between ranks."""

    def run(rank):
        call = torch.compile(syncbn.convert(Branches()), backend="inductor", fullgraph=True)
        call(torch.randn(1 if rank else 1600, 6)).sum().backward()

    ranks(2, run, timeout=300)


def test_threads():
    """A communicator of locks is opaque to the graph."""
    x = torch.randn(4, 3, dtype=torch.float64)

    def run(comm):
        with comm:
            model = layer(comm.rank, process_group=comm)
            call = torch.compile(model, backend="aot_eager", fullgraph=True)
            share = x[2 * comm.rank : 2 * comm.rank + 2].clone().requires_grad_()
            y = call(share)
            y.backward(y.detach().cos())
            return y, share.grad

    torch._dynamo.reset()
    with ThreadPoolExecutor(2) as pool:
        y, dx = map(torch.cat, zip(*pool.map(run, syncbn.comm.threads(2)), strict=True))
    expected = oracle.batch_norm(x, y.cos())
    oracle.assert_close(y, expected.y, factor=4)
    oracle.assert_close(dx, expected.dx, factor=4)
