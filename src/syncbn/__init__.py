"""Synchronised batch normalisation, exact on any split of the batch.

    model = syncbn.convert(model)      # BatchNorm → SyncBatchNorm, nothing lost
    model = DistributedDataParallel(model)

Layers: SyncBatchNorm, SyncBatchNorm1d/2d/3d and their Lazy forms. Function: sync_batch_norm.
Models: convert, revert, register_conversion; DataParallel, several devices in one process.
Padding: masking, mask_from_lengths. Loaders of different lengths: until_all_done. Who takes part:
comm. The arithmetic, and its specification in plain torch operations (kernels.composite): kernels.
Importing starts nothing.
"""

from . import comm, kernels
from ._version import __version__
from .convert import convert, revert
from .data_parallel import DataParallel
from .functional import sync_batch_norm
from .lazy import (
    LazySyncBatchNorm,
    LazySyncBatchNorm1d,
    LazySyncBatchNorm2d,
    LazySyncBatchNorm3d,
)
from .masking import masking
from .masks import mask_from_lengths
from .modules import SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d
from .registry import register_conversion
from .uneven import until_all_done

__all__ = [
    "DataParallel",
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
    "kernels",
    "mask_from_lengths",
    "masking",
    "register_conversion",
    "revert",
    "sync_batch_norm",
    "until_all_done",
]
