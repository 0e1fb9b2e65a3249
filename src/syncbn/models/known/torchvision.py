"""torchvision: https://github.com/pytorch/vision/blob/main/torchvision/ops/misc.py"""

from __future__ import annotations

RULES = ()
FROZEN = ("torchvision.ops.misc.FrozenBatchNorm2d",)
