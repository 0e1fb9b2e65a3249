"""docs/communicators.md: the reader's own communicator works, and so does the MPI script."""

from __future__ import annotations

from datetime import timedelta

import pytest
import torch
from test_docs import BLOCK
from torch.distributed import PrefixStore, TCPStore

from support.cases import Case, check, step
from support.contract import CHECKS, check_interleaved
from support.mpijob import execute, needs_mpi
from support.paths import ROOT

(EXAMPLE,) = (
    text
    for language, text in BLOCK.findall((ROOT / "docs/communicators.md").read_text())
    if language == "python" and "(syncbn.comm.Communicator)" in text
)


@pytest.fixture
def on_two(ranks):
    """Runs ``function(rank, make)`` on two processes; ``make(name)`` is the page's communicator."""
    server = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = server.port  # the server lives until the test ends

    def run(function):
        def with_example(rank):
            page = {"__name__": "page"}
            exec(EXAMPLE, page)
            store = TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=5))
            return function(rank, lambda name: page["Meeting"](PrefixStore(name, store), rank, 2))

        return ranks(2, with_example)

    yield run
    del server


def test_the_example_keeps_the_contract(on_two):
    def contract(rank, make):
        comm = make("a")
        for promise in CHECKS:
            promise(comm)
        check_interleaved(make("b"), make("c"))

    on_two(contract)


def test_the_example_normalises_the_whole_batch(on_two):
    case = Case(split=(5, 2))
    check(case, on_two(lambda rank, make: step(rank, case, make("layer"))), factor=4)


def test_a_peer_that_is_gone_ends_the_examples_call(on_two):
    def alone(rank, make):
        if rank == 0:
            with pytest.raises(RuntimeError, match="all_gather: rank 0 misses a peer"):
                make("alone").all_reduce(torch.ones(3))

    on_two(alone)


@pytest.mark.slow  # test_mpi.py runs it on ranks that are there
@needs_mpi
def test_the_script_runs_under_mpiexec():
    ended = execute(2, "-m", "mpi4py", str(ROOT / "examples/train_mpi.py"))
    assert ended.code == 0, ended.stderr
    assert "running_var equal on all 2 ranks: True" in ended.stdout
