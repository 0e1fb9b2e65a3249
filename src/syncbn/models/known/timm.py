"""timm: https://github.com/huggingface/pytorch-image-models/tree/main/timm/layers"""

from __future__ import annotations

from typing import Any

import torch.nn as nn

from ...layers.modules import SyncBatchNorm, SyncBatchNorm2d
from .fronts import DropAndAct, Invertible
from .rules import Rule


class InplaceAbn(Invertible):
    """timm's own module around inplace_abn's function: no num_batches_tracked, no option for it."""

    track_running_stats = True
    activation = property(lambda self: self.act_name)
    activation_param = property(lambda self: self.act_param)
    _load_from_state_dict = nn.Module._load_from_state_dict

    def extra_repr(self) -> str:
        return f"{self.num_features}, eps={self.eps}, momentum={self.momentum}, act={self.act_name}"


def _paths(file: str, name: str) -> tuple[str, ...]:
    return f"timm.layers.{file}.{name}", f"timm.models.layers.{file}.{name}"


def _first_split(layer: Any, input: Any) -> Any:
    """What the layer normalises itself; its aux_bn, torch's layers, have the rest."""
    return input[: len(input) // layer.num_splits] if layer.training else input


RULES = (
    Rule(
        _paths("norm_act", "BatchNormAct2d"),
        SyncBatchNorm2d,
        keeps=True,
        front=DropAndAct,
        needs=("drop", "act"),
    ),
    # Of torch's SyncBatchNorm, which ours must not derive from. Only timm's conversion makes it,
    # and gives it drop and act.
    Rule(_paths("norm_act", "SyncBatchNormAct"), SyncBatchNorm, front=DropAndAct),
    Rule(
        _paths("split_batchnorm", "SplitBatchNorm2d"),
        SyncBatchNorm2d,
        keeps=True,
        needs=("num_splits", "aux_bn"),
        view=_first_split,
    ),
    Rule(
        _paths("inplace_abn", "InplaceAbn"),
        SyncBatchNorm,
        keeps=True,
        front=InplaceAbn,
        needs=("act_name", "act_param"),
    ),
)
FROZEN = _paths("norm_act", "FrozenBatchNormAct2d")
