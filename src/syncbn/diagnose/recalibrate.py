"""recalibrate(): running statistics that are those of all ranks' data."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence

from ..batches.uneven import Steps, until_all_done
from ..comm import Communicator, Framed, resolve
from ..models.accumulating import refuse_accumulating
from ..models.graphs import without_graphs
from ..models.measuring import (
    check_statistics,
    layers_with_statistics,
    measuring,
    statistics_kept,
)
from ..numerics.moments import Moments, merge, unpack
from ..progress import check_progress, step_bar
from .agreement import check_alike, check_model, rows_of_all


def recalibrate(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    process_group: Any = None,
    progress: bool = False,
) -> None:
    """Make running statistics those of data: the mean and variance of all that a layer is given.

    For weights that have moved since, or averages of weights, whose running statistics are of no
    model: one pass over ``batches``, without gradients. Of every BatchNorm layer, torch's or
    syncbn's, each rank measures what comes in. The moments of all batches and ranks are merged
    (Chan, Golub & LeVeque 1979), so that every value weighs the same: no average of averages.
    running_mean becomes the mean over all values of a channel, running_var their unbiased variance,
    as in training, num_batches_tracked the number of batches.

    What a layer is given depends on the layers before it. In the pass every BatchNorm layer
    normalises as in training: by its batch's statistics, a synchronised one by those of its group's
    batches together. So the result is that of one process which holds each step's batches of all
    ranks as one batch. All other modules stay in the mode that they are in: call ``model.eval()``
    before to measure without dropout, ``model.train()`` to measure with it, as torch's update_bn
    does. BatchNorm layers in eval mode are measured, too; those that :func:`syncbn.freeze` froze
    are left alone. A mask says which values count, here as in training. A batch that a layer with
    ``skip_nonfinite`` would skip is left out by the ranks that find it not finite.

    Afterwards, and after any error, every mode and hook is what it was; after an error running
    statistics and counters are, too. A layer that no value reached keeps its statistics, and is
    named in a warning.

    Args:
        model: the layers' model, wrapped in DistributedDataParallel or not. What torch.compile has
            compiled of it runs uncompiled, and so is measured.
        batches: what the model takes, this rank's share. Of a tuple or list the first element
            alone, as in torch's update_bn: loaders of (input, target) serve as they are. A mapping
            gives keyword arguments. All else, in a list of one if it is a list or mapping itself,
            is the one argument. Ranks may have different numbers of batches, one of them none: then
            they are in step by :func:`syncbn.until_all_done`; give that itself for batches that
            take its ``empty`` and ``count``.
        process_group: as for :class:`SyncBatchNorm`; the ranks whose data count.
        progress: show a bar on the first rank, on standard error (extra ``[cli]``).

    Raises:
        TypeError: ``model`` is no Module, ``batches`` no iterable; DTensors as statistics or input.
        RuntimeError: inside :func:`syncbn.accumulating`.
        ValueError: lazy layers without input; on every rank alike, layers that differ between
            ranks, or no batch on any rank.
        ImportError: ``progress`` without rich.
        Exception: whatever the model or ``batches`` raises; the other ranks then get an error that
            names this rank.

    Source: "precise BatchNorm", Wu & Johnson 2021, https://arxiv.org/abs/2105.07576;
    https://docs.pytorch.org/docs/stable/generated/torch.optim.swa_utils.update_bn.html

    Example:
        >>> model = torch.nn.Sequential(torch.nn.BatchNorm1d(1))
        >>> batches = torch.tensor([[1.0], [2.0]]), torch.tensor([[6.0], [6.0]])
        >>> syncbn.recalibrate(model, batches)
        >>> model[0].running_mean, model[0].running_var
        (tensor([3.7500]), tensor([6.9167]))
    """
    check_model("recalibrate", model)
    if not isinstance(batches, Iterable) or isinstance(batches, (Mapping, str)):
        raise TypeError(
            f"recalibrate: expected an iterable of batches, got {type(batches).__name__}; for one "
            "batch, [batch]"
        )
    if progress:
        check_progress("recalibrate")
    comm, layers = resolve(process_group), layers_with_statistics(model)
    check_statistics("recalibrate", layers)
    refuse_accumulating("recalibrate", layers)
    check_alike("recalibrate", comm, layers)
    if not layers:
        return
    try:
        with step_bar("recalibrate", _length(batches), progress and comm.rank == 0) as advance:
            steps, own = _measured(model, layers, _in_step(model, batches, comm), advance)
    except Exception as error:
        if isinstance(comm, Framed) and comm.size > 1:
            comm.give_up(error)  # the others wait for this rank
        raise
    counted, *rows = rows_of_all(comm, [torch.tensor([float(steps)]), *own])
    if not counted.sum():
        raise ValueError(
            f"recalibrate: expected at least one batch on one of {comm.size} ranks, got none; an "
            "iterator that was used before is empty: make it anew"
        )
    without = [
        name or "the module itself"
        for (name, layer), row in zip(layers.items(), rows, strict=True)
        if not _become(layer, merge(unpack(row[:, 1:])), row[:, 0].max())
    ]
    if without:
        warnings.warn(
            "recalibrate: left as they were, because no values came into them: "
            f"{', '.join(map(repr, without))}; freeze them, or give batches that they see",
            stacklevel=2,
        )


def _in_step(model: nn.Module, batches: Iterable[Any], comm: Communicator) -> Iterable[Any]:
    """(args, kwargs) for the model, as many on every rank."""
    calls = (_call(batch) for batch in batches)
    if comm.size == 1 or isinstance(batches, Steps):
        return calls
    return until_all_done(calls, comm, model=model)


def _call(batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments by which the model takes a batch."""
    if isinstance(batch, Mapping):
        return (), dict(batch)
    if isinstance(batch, (tuple, list)) and not isinstance(batch, PackedSequence):
        if not len(batch):
            raise ValueError(
                "recalibrate: expected the model's input as first element of a batch, got an empty "
                f"{type(batch).__name__}"
            )
        batch = batch[0]
    return (batch,), {}


def _measured(
    model: nn.Module,
    layers: Mapping[str, Any],
    calls: Iterable[Any],
    advance: Callable[[], Any],
) -> tuple[int, list[Tensor]]:
    """How many steps this rank took, and of each layer (2 + 2C,): its batches, its moments."""
    steps = 0
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(without_graphs)
        stack.enter_context(_training(layers))
        stack.enter_context(statistics_kept(layers))
        found = stack.enter_context(measuring("recalibrate", layers))
        before = {name: _tracked(layer) for name, layer in layers.items()}
        each = stack.enter_context(closing(_generated(calls)))
        for args, kwargs in each:
            model(*args, **kwargs)
            steps += 1
            advance()
        counts = [_tracked(layer) - before[name] for name, layer in layers.items()]
    own = []
    for (name, layer), count in zip(layers.items(), counts, strict=True):
        packed = found[name].packed
        if packed is None:
            packed = torch.zeros(1 + 2 * layer.running_mean.numel(), dtype=torch.float64)
        own.append(torch.cat((packed.new_tensor([count]), packed)))
    return steps, own


def _length(batches: Iterable[Any]) -> int | None:
    """How many there are, if they tell; a loader over an iterable dataset has no length."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:
        return None


def _generated(calls: Iterable[Any]) -> Any:
    """As a generator, which can be closed: until_all_done watches the model until then."""
    iterator = iter(calls)
    return iterator if hasattr(iterator, "close") else (call for call in iterator)


@contextmanager
def _training(layers: Mapping[str, Any]) -> Iterator[None]:
    """The layers in training mode, but nothing that they hold."""
    modes = {name: layer.training for name, layer in layers.items()}
    for layer in layers.values():
        layer.training = True
    try:
        yield
    finally:
        for name, layer in layers.items():
            layer.training = modes[name]


def _tracked(layer: nn.Module) -> int:
    counter = layer._buffers.get("num_batches_tracked")
    return 0 if counter is None else int(counter)


@torch.no_grad()
def _become(layer: Any, moments: Moments, batches: Tensor) -> bool:
    """Whether there are moments, which running statistics then become."""
    count, mean, m2 = moments
    if not count:
        return False
    layer.running_mean.copy_(mean)
    layer.running_var.copy_(m2 / (count - 1).clamp_min(1))
    counter = layer._buffers.get("num_batches_tracked")
    if counter is not None:
        counter.copy_(batches)
    return True
