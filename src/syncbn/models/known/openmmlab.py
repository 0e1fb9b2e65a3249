"""mmengine, mmcv, and Lightning, whose _BatchNormXd is the same: BatchNorm of any dimensions.

https://github.com/open-mmlab/mmengine/blob/main/mmengine/model/utils.py
https://github.com/open-mmlab/mmcv/blob/main/mmcv/ops/sync_bn.py
https://github.com/Lightning-AI/pytorch-lightning/blob/master/src/lightning/pytorch/plugins/layer_sync.py
"""

from __future__ import annotations

from ...layers.modules import SyncBatchNorm
from .rules import Rule

RULES = (
    Rule(
        (
            "mmengine.model.utils._BatchNormXd",
            "mmcv.cnn.utils.sync_bn._BatchNormXd",
            "lightning.pytorch.plugins.layer_sync._BatchNormXd",
            "pytorch_lightning.plugins.layer_sync._BatchNormXd",
        ),
        SyncBatchNorm,
    ),
    Rule(
        (
            "mmengine.utils.dl_utils.parrots_wrapper.SyncBatchNorm",
            "mmcv.utils.parrots_wrapper.SyncBatchNorm",
        ),
        SyncBatchNorm,
    ),
    # mmcv's own operators, which weigh each rank's mean alike.
    Rule(("mmcv.ops.sync_bn.SyncBatchNorm",), SyncBatchNorm, group="group"),
)
