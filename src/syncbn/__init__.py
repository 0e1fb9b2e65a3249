"""Synchronised batch normalisation, exact on any split of the batch.

    model = syncbn.convert(model)      # BatchNorm → SyncBatchNorm, nothing lost
    model = DistributedDataParallel(model)

Layers: SyncBatchNorm, SyncBatchNorm1d/2d/3d and their Lazy forms. Function: sync_batch_norm.
Models: convert, revert, register_conversion; DataParallel, several devices in one process; freeze,
unfreeze. Which layers gain by it: Monitor. Statistics over all data, and over steps: recalibrate,
sync_buffers, accumulating.
Padding: masking, mask_from_lengths. Loaders of different lengths: until_all_done. Who takes part,
and how they talk (through memory, where they are processes of one host): comm. The arithmetic, and
its specification in plain torch operations (kernels.composite): kernels.
Importing starts nothing.
"""

import sys as _sys

from . import _interrupts as _interrupts  # before torch
from . import comm, kernels
from ._version import __version__
from .batches.uneven import until_all_done
from .comm.errors import DesyncError
from .comm.tracing import trace
from .comm.waiting import timeout
from .diagnose.buffers import sync_buffers
from .diagnose.check.run import check
from .diagnose.monitor import observing as _observing
from .diagnose.monitor.monitor import Monitor
from .diagnose.recalibrate import recalibrate
from .layers import lazy as _lazy
from .layers import modules as _modules
from .layers.functional import sync_batch_norm
from .layers.lazy import (
    LazySyncBatchNorm,
    LazySyncBatchNorm1d,
    LazySyncBatchNorm2d,
    LazySyncBatchNorm3d,
)
from .layers.modules import SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d
from .models import data_parallel as _data_parallel
from .models import registry as _registry
from .models.accumulating import accumulating
from .models.convert import convert
from .models.data_parallel import DataParallel
from .models.freezing import Frozen as _Frozen
from .models.freezing import freeze, unfreeze
from .models.known import table as _table
from .models.masking import masking
from .models.measuring import ignore as _ignore
from .models.registry import register_conversion
from .models.revert import revert
from .step.masked import mask_from_lengths

__all__ = [
    "DataParallel",
    "DesyncError",
    "LazySyncBatchNorm",
    "LazySyncBatchNorm1d",
    "LazySyncBatchNorm2d",
    "LazySyncBatchNorm3d",
    "Monitor",
    "SyncBatchNorm",
    "SyncBatchNorm1d",
    "SyncBatchNorm2d",
    "SyncBatchNorm3d",
    "__version__",
    "accumulating",
    "check",
    "comm",
    "convert",
    "freeze",
    "kernels",
    "mask_from_lengths",
    "masking",
    "recalibrate",
    "register_conversion",
    "revert",
    "sync_batch_norm",
    "sync_buffers",
    "timeout",
    "trace",
    "unfreeze",
    "until_all_done",
]

# In which file a public name lives is nobody's business: not a pickle's, nor a traceback's.
for _name in __all__:
    if hasattr(globals()[_name], "__module__"):
        globals()[_name].__module__ = __name__
# What a converted layer keeps of the class that it had: its pickles name this.
_Origin = _registry.Origin
_Origin.__module__, _Origin.__qualname__ = __name__, "_Origin"
_Frozen.__module__, _Frozen.__qualname__ = __name__, "_Frozen"  # and what froze one
_ignore.__module__, _ignore.__qualname__, _ignore.__name__ = __name__, "_ignore", "_ignore"
# What a monitored model's pickles name in place of its Monitor.
_Hook = _observing.Hook
_Hook.__module__, _Hook.__qualname__ = __name__, "_Hook"
# Pickles of 0.1.0 name files.
for _name, _module in (
    ("data_parallel", _data_parallel),
    ("lazy", _lazy),
    ("modules", _modules),
    ("registry", _registry),
):
    _sys.modules[f"{__name__}.{_name}"] = _module


def __getattr__(name: str) -> object:
    """Classes that layers of other libraries become: pickles of such layers name them."""
    target = _table.target_named(name)
    if target is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return target
