"""PyG: https://github.com/pyg-team/pytorch_geometric, torch_geometric/nn/norm/batch_norm.py

Its BatchNorm holds one of torch's layers, which converts by itself.
"""

from __future__ import annotations

from typing import Any

RULES = ()


def _skips(module: Any) -> str:
    if not getattr(module, "allow_single_element", False):
        return ""
    return (
        "because allow_single_element=True passes them by on a rank with a single node, for which "
        "others would wait (build with False: ranks together need two)"
    )


HOLDERS = {"torch_geometric.nn.norm.batch_norm.BatchNorm": _skips}
ALONE = {
    "torch_geometric.nn.norm.batch_norm.HeteroBatchNorm": (
        "because they keep statistics for each type of node"
    ),
}
