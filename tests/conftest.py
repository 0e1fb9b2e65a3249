from __future__ import annotations

import signal
from collections.abc import Iterator

import hypothesis
import pytest
import torch
from mpijob import Job, missing
from ranks import Worlds

pytest.register_assert_rewrite("cases", "compiling", "contract", "layers", "oracle", "replicas")
torch.set_num_threads(1)  # of this process; other runs on the machine make more threads slow

common = {"deadline": None, "print_blob": True}
hypothesis.settings.register_profile("quick", max_examples=200, derandomize=True, **common)
hypothesis.settings.register_profile("thorough", max_examples=3000, **common)
hypothesis.settings.load_profile("quick")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Worlds]:
    """``ranks(size, function, *args, timeout=60)``: run ``function(rank, *args)`` on every rank."""
    worlds = Worlds()
    yield worlds
    worlds.close()


@pytest.fixture(scope="session")
def mpi_ranks() -> Iterator[Worlds]:
    """The same on ranks that mpiexec starts, without torch.distributed."""
    if reason := missing():
        pytest.skip(reason)
    worlds = Worlds(Job)
    yield worlds
    worlds.close()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def no_hang() -> Iterator[None]:
    """For what waits in this process: an error after two minutes."""

    def fail(*_: object) -> None:
        raise TimeoutError("no end after two minutes")

    before = signal.signal(signal.SIGALRM, fail)
    signal.alarm(120)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
