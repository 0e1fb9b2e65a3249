"""detectron2, and those that took its layers: https://github.com/facebookresearch/detectron2

NaiveSyncBatchNorm weighs each rank's mean alike, or by its samples; ours weighs every value alike.
"""

from __future__ import annotations

from ...layers.modules import SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d
from .rules import Rule

_MOBILE = "mobile_cv.arch.layers.batch_norm"
_MMDET3D = "mmdet3d.models.layers.norm", "mmdet3d.ops.norm"

RULES = (
    Rule(("detectron2.layers.batch_norm.NaiveSyncBatchNorm",), SyncBatchNorm2d),
    # Of the first versions: BatchNorm2d for torch that did not take empty batches.
    Rule(("detectron2.layers.wrappers.BatchNorm2d",), SyncBatchNorm2d),
    Rule((f"{_MOBILE}.NaiveSyncBatchNorm",), SyncBatchNorm2d),
    Rule((f"{_MOBILE}.NaiveSyncBatchNorm1d",), SyncBatchNorm1d),
    Rule((f"{_MOBILE}.NaiveSyncBatchNorm3d",), SyncBatchNorm3d),
    Rule((f"{_MOBILE}.SyncBatchNormWrapper",), SyncBatchNorm2d),
    Rule(tuple(f"{path}.NaiveSyncBatchNorm1d" for path in _MMDET3D), SyncBatchNorm1d),
    Rule(tuple(f"{path}.NaiveSyncBatchNorm2d" for path in _MMDET3D), SyncBatchNorm2d),
)
FROZEN = ("detectron2.layers.batch_norm.FrozenBatchNorm2d", f"{_MOBILE}.FrozenBatchNorm2d")
