"""Says so where another library's conversion replaces the layers that convert() has made."""

from __future__ import annotations

import functools
import warnings

import torch.nn as nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..layers.modules import SyncBatchNorm


@functools.cache  # one hook, from the first convert on
def watch_replacements() -> None:
    """Warn from now on where a torch.nn.SyncBatchNorm takes a syncbn layer's place and weights.

    torch's ``convert_sync_batchnorm`` takes ours for plain batch norms and asks nobody; so do
    timm's and Lightning's, which end in torch's class. A new layer with a new state is meant.
    """
    register_module_module_registration_hook(_look)


def _look(parent: nn.Module, name: str, new: nn.Module | None) -> None:
    if not isinstance(new, nn.SyncBatchNorm):
        return
    old = parent._modules.get(name)
    if isinstance(old, SyncBatchNorm) and any(
        mine is not None and mine is theirs
        for mine, theirs in ((old.weight, new.weight), (old.running_mean, new.running_mean))
    ):
        warnings.warn(
            "torch.nn.SyncBatchNorm: is replacing syncbn's layers in a converted model, as "
            "convert_sync_batchnorm and Trainer(sync_batchnorm=True) do; leave that call or flag "
            "out to keep syncbn's, or syncbn.revert the model first for torch's",
            stacklevel=3,  # torch's line: one location, so that many layers warn once
        )
