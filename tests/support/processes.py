"""Processes that start in no time: forked from one that has imported what tests use.

Importing torch and what DDP, FSDP and torch.compile need takes seconds of a core in each process.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from unittest import mock

PRELOADED = [
    "cloudpickle",
    "hypothesis",
    "pytest",
    "syncbn",
    "torch._dynamo.testing",
    "torch._dynamo.repro.after_aot",
    "torch._functorch.aot_autograd",
    "torch._inductor.compile_fx",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.nn",
]
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(PRELOADED)


@contextmanager
def forked_launches() -> Iterator[None]:
    """Within it syncbn.launch starts its ranks like this, too."""
    forkserver.ensure_running()  # launch() blocks signals, which what it starts would inherit
    with mock.patch.object(multiprocessing, "get_context", return_value=CONTEXT):
        yield


def fork_on() -> None:
    """What this process, which is forked, starts itself is forked from it in turn."""
    fork = multiprocessing.get_context("fork")  # it has imported everything, and has no threads
    multiprocessing.get_context = lambda method: fork  # type: ignore[assignment]
