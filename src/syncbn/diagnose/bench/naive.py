"""The synchronised layer that a tutorial writes: to be timed against, not to be used."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm


class _AllReduce(torch.autograd.Function):
    """Sum over ranks, and of gradients over ranks."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _summed(gradient)


def _summed(tensor: Tensor) -> Tensor:
    total: Tensor = _AllReduce.apply(tensor)  # type: ignore[no-untyped-call]
    return total


class NaiveSyncBatchNorm(_BatchNorm):
    """Statistics as E[x] and E[x²] − E[x]² by two all_reduces of the default group.

    y = (x − mean)·(var + eps)^(−1/2)·weight + bias over x (N, C, *), every rank with equally many
    values; half precision is computed in float32. Inexact where the mean is large against the
    deviation, for var is a difference of two large numbers: :class:`syncbn.SyncBatchNorm` is not.

    Source: the layers of tutorials, and detectron2's NaiveSyncBatchNorm.

    Example:
        >>> y = NaiveSyncBatchNorm(3)(torch.randn(4, 3, 8, 8))
        >>> y.mean().abs().item() < 1e-6
        True
    """

    def _check_input_dim(self, input: Tensor) -> None:
        """Any shape (N, C, *) is taken."""

    def forward(self, input: Tensor) -> Tensor:
        """Normalise with the statistics of all ranks, and move the running ones."""
        x = input if input.dtype == torch.float64 else input.float()
        others = [dim for dim in range(x.dim()) if dim != 1]
        mean, square = x.mean(others), x.square().mean(others)
        if dist.is_initialized():
            mean = _summed(mean) / dist.get_world_size()
            square = _summed(square) / dist.get_world_size()
        var = square - mean.square()
        with torch.no_grad():
            assert self.running_mean is not None
            assert self.running_var is not None
            self.running_mean.lerp_(mean, self.momentum or 0.0)
            self.running_var.lerp_(var, self.momentum or 0.0)
        scale = self.weight * (var + self.eps).rsqrt()
        offset = self.bias - mean * scale
        shape = (1, -1, *(1,) * (x.dim() - 2))
        return (x * scale.view(shape) + offset.view(shape)).to(input.dtype)
