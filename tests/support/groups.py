"""Process groups whose messages travel as a test wants."""

from __future__ import annotations

import os
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

from syncbn.comm import resolve


def group_over(exchange: str, **options: Any) -> dist.ProcessGroup:
    """A new group of all ranks. exchange: as SYNCBN_EXCHANGE, "" to leave it to what is there."""
    group = dist.new_group(**options)
    with mock.patch.dict(os.environ, {"SYNCBN_EXCHANGE": exchange}):
        resolve(group).all_gather(torch.zeros(1))
    return group
