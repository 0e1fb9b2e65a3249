"""benchmarks/scale.py reckons with the bytes that ranks receive; what it prints is complete."""

from __future__ import annotations

import json
import math

import pytest
import torch

import scale
import syncbn
from support.in_threads import in_threads
from support.paths import ROOT
from support.scripts import execute

CHANNELS = 40
NETWORK = scale.Network(8, scale.Link(1e-6, 1e-11), scale.Link(5e-6, 4e-11), 7e-6)


@pytest.fixture
def step(monkeypatch):
    """``step(ranks)``: bytes of what each collective of a third step gives rank 0.

    By then frames have the size of what they hold (comm/frames.py): the second forward is the first
    one that follows a backward.
    """

    def run(ranks):
        received = []

        def counted(name):
            message = getattr(syncbn.comm.Threads, name)

            def call(comm, *arguments):
                result = message(comm, *arguments)
                if comm.rank == 0:
                    received.append(result.nbytes)
                return result

            return call

        def train(comm):
            torch.manual_seed(comm.rank)
            layer = syncbn.SyncBatchNorm(CHANNELS, process_group=comm)
            for _ in range(3):
                if comm.rank == 0:
                    received.clear()
                layer(torch.randn(2, CHANNELS)).square().sum().backward()

        with monkeypatch.context() as patch:
            for name in ("_send", "_reduce"):
                patch.setattr(syncbn.comm.Threads, name, counted(name))
            in_threads(ranks, train)
        return received

    return run


of_ranks = pytest.mark.parametrize("ranks", [8, 64, 65, 128])


def model(ranks):
    return [each.received for each in scale.as_syncbn(NETWORK, ranks, CHANNELS)]


@of_ranks
def test_bytes_as_on_devices(step, ranks, monkeypatch):
    """Messages as a GPU's: rows or sums, each with its header."""
    monkeypatch.setattr(syncbn.comm.Threads, "_takes_frames", lambda *_: False)
    assert step(ranks) == model(ranks)


@of_ranks
def test_bytes_on_the_cpu(step, ranks):
    """Frames have room for 64 numbers at least, and for an even number; threads reduce by rows up
    to 64. Sums have headers of six numbers more, and the same room.
    """
    rows, sums = (4 + 2 * CHANNELS + 2, 4 + 2 * CHANNELS), (64, 2 * CHANNELS, 2 * CHANNELS)
    expected = [10 + room for room in sums] if ranks > 64 else [ranks * row for row in rows]
    assert step(ranks) == [8 * numbers for numbers in expected]


def test_formulas():
    """Of 16 ranks on 2 hosts, by hand."""
    gather = scale.Collective(16, 2, 1000)
    assert math.isclose(
        scale.ring_gather(NETWORK, gather), 14 * 1e-6 + 5e-6 + 15 * 8000 * 4e-11, rel_tol=1e-12
    )
    doubling = 3 * 1e-6 + 5e-6 + 7 * 8000 * 1e-11 + 8 * 8000 * 4e-11
    assert math.isclose(scale.doubling_gather(NETWORK, gather), doubling, rel_tol=1e-12)
    tree = 2 * (7 * (1e-6 + 8000 * 1e-11) + 5e-6 + 8000 * 4e-11)
    assert math.isclose(scale.tree_sum(NETWORK, gather), tree, rel_tol=1e-12)
    ring = 2 * (14 * 1e-6 + 5e-6 + 15 / 16 * 8000 * 4e-11)
    assert math.isclose(scale.ring_sum(NETWORK, gather), ring, rel_tol=1e-12)


def test_ways():
    received = {
        name: sum(each.received for each in way(NETWORK, 4096, CHANNELS))
        for name, way in scale.ways_of(64, 2).items()
    }
    row, sums = 8 * (4 + 1 + 2 * CHANNELS), 8 * (4 + 2 * CHANNELS)
    assert received["hosts first"] == (8 + 512) * row + sums
    assert received["√W × √W"] == (64 + 64) * row + sums
    assert received["syncbn"] == received["sums"] == 2 * sums + 8 * (4 + 1 + CHANNELS)
    assert received["groups of 64 samples"] == sum(model(32))


def test_what_it_prints(tmp_path):
    picture = tmp_path / "scale.png"
    options = ("--quick", "--json", "--channels", "8", "--picture", str(picture))
    (ended,) = execute(ROOT / "benchmarks/scale.py", *options)
    assert ended.code == 0, ended.stderr
    rows = json.loads(ended.stdout)["rows"]
    assert {row["ranks"] for row in rows} == {2, 4, 8, 16, 32, 64, 96, 128}
    assert len({row["way"] for row in rows}) == 6
    assert picture.read_bytes().startswith(b"\x89PNG")
