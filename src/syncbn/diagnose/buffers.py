"""sync_buffers(): ranks' running statistics agree, each weighted by what it has seen."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ..comm import resolve
from ..models.accumulating import refuse_accumulating
from ..models.measuring import check_statistics, layers_with_statistics
from ..numerics.moments import wide_dtype
from .agreement import check_alike, check_model, rows_of_all

_COUNTERS = "num_batches_tracked", "num_batches_skipped"


@torch.no_grad()
def sync_buffers(model: nn.Module, *, process_group: Any = None) -> None:
    """Let the ranks' running statistics agree, after training with statistics of their own.

    Of every BatchNorm layer, torch's, or syncbn's in groups that normalise apart, each rank r has
    mean mᵣ, variance vᵣ and num_batches_tracked wᵣ (where no rank has counted any, wᵣ = 1). Every
    rank's become those of what all ranks have seen together, by the law of total variance:

        mean = Σ wᵣ·mᵣ / Σ wᵣ        var = Σ wᵣ·(vᵣ + (mᵣ − mean)²) / Σ wᵣ

    Statistics by a momentum forget, and their counts don't: they are taken at their counts all the
    same. Counters become the largest of all ranks'. What is equal on all ranks stays as it is, to
    the bit, frozen layers (:func:`syncbn.freeze`) among it. No other buffer is touched. A few
    numbers are compared first; then all layers travel in one message, or in a few of 8 MB.
    Statistics of the data themselves: :func:`syncbn.recalibrate`.

    Args:
        model: the same on all ranks but for numbers.
        process_group: as for :class:`SyncBatchNorm`; the ranks that are to agree.

    Raises:
        TypeError: ``model`` is no Module; running statistics that are DTensors.
        RuntimeError: inside :func:`syncbn.accumulating`.
        ValueError: lazy layers without input; on every rank alike, layers that differ between
            ranks in names or sizes.

    Source: https://en.wikipedia.org/wiki/Law_of_total_variance

    Example:
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(2))  # trained on each rank by itself
        >>> syncbn.sync_buffers(model)
    """
    check_model("sync_buffers", model)
    comm, layers = resolve(process_group), layers_with_statistics(model, frozen=True)
    check_statistics("sync_buffers", layers)
    refuse_accumulating("sync_buffers", layers)
    check_alike("sync_buffers", comm, layers)
    if comm.size == 1:
        return
    rows = rows_of_all(comm, [_told(layer) for layer in layers.values()])
    for layer, row in zip(layers.values(), rows, strict=True):
        counts, statistics = row[:, : len(_COUNTERS)], row[:, len(_COUNTERS) :]
        mean, var = _together(counts[:, 0], *statistics.chunk(2, dim=1))
        layer.running_mean.copy_(mean)
        layer.running_var.copy_(var)
        for name, count in zip(_COUNTERS, counts.amax(0), strict=True):
            if layer._buffers.get(name) is not None:
                layer._buffers[name].copy_(count)


def _told(layer: Any) -> Tensor:
    """(2 + 2C,): the counters, 0 for none, the mean and the variance."""
    wide = wide_dtype(layer.running_mean.device)
    found = [layer._buffers.get(name) for name in _COUNTERS]
    counts = [layer.running_mean.new_zeros(()) if each is None else each for each in found]
    statistics = layer.running_mean.to(wide), layer.running_var.to(wide)
    return torch.cat((torch.stack([count.to(wide) for count in counts]), *statistics))


def _together(weights: Tensor, means: Tensor, variances: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance (C,) of ranks' (W, C) with weights (W,).

    What is equal stays so, infinite values among it.
    """
    weights = weights if weights.any() else torch.ones_like(weights)
    seen = weights > 0  # the others' may be infinite
    weights, means, variances = weights[seen].unsqueeze(1), means[seen], variances[seen]
    weights = weights / weights.sum()
    mean = _where_differ(means, (weights * means).sum(0))
    variance = _where_differ(variances, (weights * variances).sum(0))
    between = (weights * (means - mean).square()).sum(0)
    return mean, variance + torch.where((means == means[0]).all(0), 0.0, between)


def _where_differ(values: Tensor, merged: Tensor) -> Tensor:
    return torch.where((values == values[0]).all(0), values[0], merged)
