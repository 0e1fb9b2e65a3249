"""Processes that start in no time: forked from one that has imported what tests use.

Importing torch and what DDP, FSDP and torch.compile need takes seconds of a core in each process.
"""

from __future__ import annotations

import multiprocessing

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(
    [
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
)
