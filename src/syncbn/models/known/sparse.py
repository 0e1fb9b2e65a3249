"""torchsparse and spconv, whose layers normalise the features (V, C) of a sparse tensor.

https://github.com/mit-han-lab/torchsparse/blob/master/torchsparse/nn/modules/norm.py
https://github.com/traveller59/spconv/blob/master/spconv/pytorch/modules.py
MinkowskiEngine's hold one of torch's layers, which converts by itself.
"""

from __future__ import annotations

from typing import Any

from ...layers.modules import SyncBatchNorm, SyncBatchNorm1d
from .fronts import OfFeatures
from .rules import Rule


def _features(layer: Any, input: Any) -> Any:
    names = (name for name in ("feats", "F", "features") if hasattr(input, name))
    return getattr(input, next(names, ""), input)


RULES = (
    Rule(
        ("torchsparse.nn.modules.norm.BatchNorm", "torchsparse.nn.modules.batchnorm.BatchNorm"),
        SyncBatchNorm1d,
        keeps=True,
        view=_features,
    ),
    Rule(("spconv.pytorch.modules.SparseBatchNorm",), SyncBatchNorm1d, keeps=True, view=_features),
    Rule(
        ("spconv.pytorch.modules.SparseSyncBatchNorm",),
        SyncBatchNorm,
        front=OfFeatures,
        view=_features,
    ),
)
