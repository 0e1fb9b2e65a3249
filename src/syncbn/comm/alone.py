"""A process that trains as one of several ranks, and whose layers know of none of them."""

from __future__ import annotations

import os
import warnings
from functools import cache


@cache  # one warning, and no cost in the steps that follow
def warn_if_alone() -> None:
    """Warn where the launcher's variables name other ranks; the first rank alone does."""
    size = os.environ.get("WORLD_SIZE", "")
    if size.isdecimal() and int(size) > 1 and os.environ.get("RANK", "0") == "0":
        warnings.warn(
            f"sync_batch_norm: this process is one of {size} ranks (WORLD_SIZE), but normalises by "
            "its own batch alone, as torch.distributed is not initialised; call "
            "torch.distributed.init_process_group before the first training step, or pass "
            "process_group=syncbn.comm.Local() where it is meant",
            stacklevel=2,
        )
