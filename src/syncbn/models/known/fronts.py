"""Methods of layers that do more than normalise; they stand before SyncBatchNorm's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor

from ...layers.modules import SyncBatchNorm

if TYPE_CHECKING:  # each front is a part of a SyncBatchNorm, in classes that the rules make
    _Front = SyncBatchNorm
else:
    _Front = object


class DropAndAct(_Front):
    """y = act(drop(normalised)), with whichever of the two the layer has."""

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        y = SyncBatchNorm.forward(self, input, mask)
        for name in ("drop", "act"):
            part = getattr(self, name, None)
            y = y if part is None else part(y)
        return y


class Activated(_Front):
    """y = activation(normalised), by name."""

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        own: Any = self
        y = SyncBatchNorm.forward(self, input, mask)
        return activate(y, own.activation, own.activation_param)

    def set_group(self, group: Any) -> None:
        self.group = self.process_group = group


class Invertible(Activated):
    """The same, with the weight |weight| + eps, which can be inverted."""

    def _tensors(self) -> tuple[Tensor | None, ...]:
        *statistics, weight, bias = SyncBatchNorm._tensors(self)
        return *statistics, None if weight is None else weight.abs() + self.eps, bias


class ChannelLast(_Front):
    """y = relu(normalised + z), of (N, *, C) or (N, C, *), as the layer's flags say."""

    def forward(  # type: ignore[override]
        self, input: Tensor, z: Tensor | None = None, mask: Tensor | None = None
    ) -> Tensor:
        x = channels_second(self, input)
        y = SyncBatchNorm.forward(self, x, mask)
        y = y if x is input else y.movedim(1, -1)
        y = y if z is None else y + z
        return y.relu() if getattr(self, "fuse_relu", False) else y


def channels_second(layer: Any, input: Tensor) -> Tensor:
    """(N, *, C) as (N, C, *), where the layer takes channels last and there are positions."""
    last = getattr(layer, "channel_last", False) and input.dim() > 2
    return input.movedim(-1, 1) if last else input


class OfFeatures(_Front):
    """What has features (V, C), a sparse tensor, with those normalised; or a plain tensor."""

    def forward(self, input: Any, mask: Tensor | None = None) -> Any:
        if isinstance(input, Tensor):
            return SyncBatchNorm.forward(self, input, mask)
        return input.replace_feature(SyncBatchNorm.forward(self, input.features, mask))


ACTIVATIONS = ("relu", "leaky_relu", "elu", "identity")


def activate(y: Tensor, name: str, parameter: float) -> Tensor:
    if name == "relu":
        return F.relu(y, inplace=True)
    if name == "leaky_relu":
        return F.leaky_relu(y, parameter, inplace=True)
    return F.elu(y, parameter, inplace=True) if name == "elu" else y
