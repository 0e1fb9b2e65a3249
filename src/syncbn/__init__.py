"""Synchronised batch normalisation, exact on any split of the batch.

    model = syncbn.convert(model)      # BatchNorm → SyncBatchNorm, nothing lost
    model = DistributedDataParallel(model)

Layers: SyncBatchNorm, SyncBatchNorm1d/2d/3d and their Lazy forms. Function: sync_batch_norm.
Models: convert, revert, register_conversion; DataParallel, several devices in one process.
Padding: masking, mask_from_lengths. Loaders of different lengths: until_all_done. Who takes part,
and how they talk (through memory, where they are processes of one host): comm. The arithmetic, and
its specification in plain torch operations (kernels.composite): kernels.
Importing starts nothing.
"""

import sys as _sys

from . import comm, kernels
from ._version import __version__
from .batches.uneven import until_all_done
from .comm.frames import DesyncError
from .comm.tracing import trace
from .comm.waiting import timeout
from .diagnose.check.run import check
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
from .models.convert import convert, revert
from .models.data_parallel import DataParallel
from .models.masking import masking
from .models.registry import register_conversion
from .step.masked import mask_from_lengths

__all__ = [
    "DataParallel",
    "DesyncError",
    "LazySyncBatchNorm",
    "LazySyncBatchNorm1d",
    "LazySyncBatchNorm2d",
    "LazySyncBatchNorm3d",
    "SyncBatchNorm",
    "SyncBatchNorm1d",
    "SyncBatchNorm2d",
    "SyncBatchNorm3d",
    "__version__",
    "check",
    "comm",
    "convert",
    "kernels",
    "mask_from_lengths",
    "masking",
    "register_conversion",
    "revert",
    "sync_batch_norm",
    "timeout",
    "trace",
    "until_all_done",
]

# In which file a public name lives is nobody's business: not a pickle's, nor a traceback's.
for _name in __all__:
    if hasattr(globals()[_name], "__module__"):
        globals()[_name].__module__ = __name__
# What a converted layer keeps of the class that it had: its pickles name this.
_Origin = _registry.Origin
_Origin.__module__, _Origin.__qualname__ = __name__, "_Origin"
# Pickles of 0.1.0 name files.
for _name, _module in (
    ("data_parallel", _data_parallel),
    ("lazy", _lazy),
    ("modules", _modules),
    ("registry", _registry),
):
    _sys.modules[f"{__name__}.{_name}"] = _module
