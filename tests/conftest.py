from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator

import hypothesis
import pytest
import torch

from support.mpijob import Job, missing, remove_segments
from support.ranks import Worlds
from syncbn import kernels

BEGAN = time.time()
torch.set_num_threads(1)  # of this process; other runs on the machine make more threads slow

common = {"deadline": None, "print_blob": True}
hypothesis.settings.register_profile("quick", max_examples=200, derandomize=True, **common)
hypothesis.settings.register_profile("thorough", max_examples=3000, **common)
hypothesis.settings.load_profile("quick")


@pytest.hookimpl(trylast=True)  # of what -m and -k have left
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files of few tests first: those are the long ones, and the last file has one worker."""
    tests = Counter(item.path for item in items)
    items.sort(key=lambda item: tests[item.path])


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):  # but in the end of all that run side by side
        remove_segments(BEGAN)


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


@pytest.fixture(params=[each.steps.NAME for each in kernels.IMPLEMENTATIONS])
def implementation(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each implementation of the kernels in turn."""
    steps = {each.steps.NAME: each.steps for each in kernels.IMPLEMENTATIONS}
    if why := steps[request.param].unavailable():
        pytest.skip(why)
    if not steps[request.param].supports(torch.empty(1, 1)):
        pytest.skip(f"{request.param} is for other devices")
    monkeypatch.setattr(kernels, "_usable", {request.param, "composite"})
