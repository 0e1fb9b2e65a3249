"""apex: https://github.com/NVIDIA/apex/tree/22.04-dev/apex/parallel"""

from __future__ import annotations

from ...layers.modules import SyncBatchNorm
from .fronts import ChannelLast, channels_second
from .rules import Rule

RULES = (
    Rule(
        (
            "apex.parallel.optimized_sync_batchnorm.SyncBatchNorm",
            "apex.parallel.sync_batchnorm.SyncBatchNorm",  # in Python, without the flags
        ),
        SyncBatchNorm,
        keeps=True,
        front=ChannelLast,
        inputs=2,
        group="process_group",
        view=channels_second,
    ),
)
ALONE = {
    "apex.contrib.groupbn.batch_norm.BatchNorm2d_NHWC": (
        "because they exchange statistics in kernels of their own, between the GPUs of bn_group"
    ),
    "apex.contrib.cudnn_gbn.batch_norm.GroupBatchNorm2d": (
        "because they exchange statistics in kernels of their own, between the GPUs of group_size"
    ),
}
