from __future__ import annotations

from collections.abc import Iterator

import hypothesis
import pytest
import torch
from ranks import Worlds

hypothesis.settings.register_profile("syncbn", deadline=None, derandomize=True, print_blob=True)
hypothesis.settings.load_profile("syncbn")


@pytest.fixture(scope="session")
def ranks() -> Iterator[Worlds]:
    """``ranks(size, function, *args, timeout=60)``: run ``function(rank, *args)`` on every rank."""
    worlds = Worlds()
    yield worlds
    worlds.close()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
