"""accumulating(): micro-batches of one optimiser step move running statistics once, together."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakSet

import torch.nn as nn

from ..kernels import Running
from ..layers.modules import SyncBatchNorm
from ..numerics.moments import Merged
from ..step.accumulation import Accumulator
from ..step.tracking import follow_merged
from .measuring import check_statistics, layers_with_statistics, measuring, statistics_kept

_accumulating: WeakSet[nn.Module] = WeakSet()


@contextmanager
def accumulating(model: nn.Module) -> Iterator[None]:
    """Within the context, one optimiser step's micro-batches count as one batch in the statistics.

    Gradient accumulation makes one step of several forwards, each of which would move the running
    statistics. Here they move once, when the context ends, by the momentum, towards mean and
    unbiased variance of all micro-batches of all ranks together (their moments merged, so that
    every value weighs the same, in uneven micro-batches, too), and num_batches_tracked is one more.
    They are then what one forward with the whole batch would have left.

    Outputs and gradients are as without: **each micro-batch is still normalised by its own
    statistics**, and no accumulation of gradients changes that. No message is sent beside the
    layers' own. A checkpoint's second forward counts once, masks as in training, and a micro-batch
    that ``skip_nonfinite`` skips not at all. torch's layers in the model move by what this rank
    gives them, as they do without.

    After an error statistics are what they were before. A context inside another belongs to the
    outer one. Layers in eval mode, frozen ones, and those that are not called, move nothing.

    Args:
        model: the layers' model, wrapped in DistributedDataParallel or not. Without a BatchNorm
            nothing happens.

    Raises:
        TypeError: ``model`` is no Module, or has running statistics that are DTensors.
        ValueError: a lazy layer that has not seen its first input; a torch.nn.SyncBatchNorm, whose
            moments nobody else hears of: :func:`syncbn.convert` it.
        RuntimeError: within, a layer in a compiled or exported graph, a trace or a transform of
            torch.func, or with a DTensor as input. Of torch's layers, at the end.

    Source: the merging of moments is that of Chan, Golub & LeVeque 1979.

    Example:
        >>> layer = syncbn.SyncBatchNorm1d(1, momentum=1.0)
        >>> with syncbn.accumulating(layer):
        ...     for micro in torch.tensor([[[1.0], [2.0]], [[3.0], [6.0]]]):
        ...         layer(micro).sum().backward()
        >>> layer.running_mean, layer.running_var, int(layer.num_batches_tracked)
        (tensor([3.]), tensor([4.6667]), 1)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"accumulating: expected a torch.nn.Module, got {type(model).__name__}")
    found = layers_with_statistics(model)
    layers = {name: layer for name, layer in found.items() if layer not in _accumulating}
    check_statistics("accumulating", layers)
    ours = {name: layer for name, layer in layers.items() if isinstance(layer, SyncBatchNorm)}
    others = {name: layer for name, layer in layers.items() if name not in ours}
    _refuse_torchs(others)
    with ExitStack() as stack:
        for layer in layers.values():
            _accumulating.add(layer)
            stack.callback(_accumulating.discard, layer)
        heard = {name: stack.enter_context(_accumulated(layer)) for name, layer in ours.items()}
        with statistics_kept(others), measuring("accumulating", others) as measured:
            before = {name: _version(layer) for name, layer in others.items()}
            yield
            _refuse_graphs(others, before, measured)
    for name, layer in layers.items():
        buffers = layer._buffers
        running = Running(
            buffers.get("running_mean"),
            buffers.get("running_var"),
            buffers.get("num_batches_tracked"),
            layer.momentum,
        )
        if name in ours:
            follow_merged(running, heard[name], heard[name].kept)
        else:
            follow_merged(running, measured[name])


@contextmanager
def _accumulated(layer: SyncBatchNorm) -> Iterator[Accumulator]:
    mean, var = layer.running_mean, layer.running_var
    assert mean is not None
    assert var is not None
    skipped = layer._buffers.get("num_batches_skipped")
    layer._accumulator = accumulator = Accumulator(mean, var, skipped)
    try:
        yield accumulator
    finally:
        vars(layer).pop("_accumulator", None)  # none if it was reverted meanwhile


def refuse_accumulating(operation: str, layers: Mapping[str, Any]) -> None:
    """Refuse to touch statistics that wait: they would move from what they were before."""
    for name, layer in layers.items():
        if layer in _accumulating:
            raise RuntimeError(
                f"{operation}: expected running statistics that may move, got layer {name!r} in a "
                f"block of syncbn.accumulating; call {operation} after that block"
            )


def _refuse_torchs(others: Mapping[str, Any]) -> None:
    for name, layer in others.items():
        if isinstance(layer, nn.SyncBatchNorm):
            raise ValueError(
                f"accumulating: expected syncbn's synchronised layers, got {name!r} of torch's, "
                "which tells nobody what its ranks have measured; syncbn.convert(model) first"
            )


def _version(layer: nn.Module) -> int:
    """How often its buffers were written; torch's operator does not tell, the counter does."""
    return sum(buffer._version for buffer in layer._buffers.values() if buffer is not None)


def _refuse_graphs(
    others: Mapping[str, Any], before: Mapping[str, int], measured: Mapping[str, Merged]
) -> None:
    """Refuse what has moved without a hook: graphs don't know those that came after them."""
    for name, layer in others.items():
        if measured[name].packed is None and _version(layer) != before[name]:
            raise RuntimeError(
                f"accumulating: expected layer {name!r} to run as it is, got a compiled graph of "
                "it, which has moved its running statistics; leave accumulating or compile out"
            )
