"""Synchronised batch normalisation, exact on any split of the batch.

    model = syncbn.convert(model)      # BatchNorm → SyncBatchNorm, nothing lost
    model = DistributedDataParallel(model)

Layers: SyncBatchNorm, SyncBatchNorm1d/2d/3d and their Lazy forms. Function: sync_batch_norm.
Models: convert, revert, register_conversion. Loaders of different lengths: until_all_done. Who
takes part: comm. Importing starts nothing.
"""

from . import comm
from ._version import __version__
from .convert import convert, revert
from .functional import sync_batch_norm
from .modules import (
    LazySyncBatchNorm,
    LazySyncBatchNorm1d,
    LazySyncBatchNorm2d,
    LazySyncBatchNorm3d,
    SyncBatchNorm,
    SyncBatchNorm1d,
    SyncBatchNorm2d,
    SyncBatchNorm3d,
)
from .registry import register_conversion
from .uneven import until_all_done

__all__ = [
    "LazySyncBatchNorm",
    "LazySyncBatchNorm1d",
    "LazySyncBatchNorm2d",
    "LazySyncBatchNorm3d",
    "SyncBatchNorm",
    "SyncBatchNorm1d",
    "SyncBatchNorm2d",
    "SyncBatchNorm3d",
    "__version__",
    "comm",
    "convert",
    "register_conversion",
    "revert",
    "sync_batch_norm",
    "until_all_done",
]
