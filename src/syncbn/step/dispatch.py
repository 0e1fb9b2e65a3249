"""Which path serves a call: a table of conditions, each with its reason."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..comm import LOCAL, Framed, Replica, refuse_join, resolve
from ..kernels import Affine, Running
from ..tensors.layout import (
    is_samplewise_contiguous,
    samplewise_contiguous,
    torchs_batch_norm,
    with_gradient_like,
)
from ..tensors.storages import is_dtensor
from ..tensors.transforms import check_movable
from .accumulation import find_accumulator
from .checks import check_counter, check_input, check_options, check_tensors
from .dtensors import check_options_of_dtensor, normalise_dtensor
from .exchange import Exchange, ReproducibleExchange
from .function import normalise_parts
from .fused import find_fused, normalise_fused
from .identity import speaking
from .masked import check_mask, scatter_valid, select_valid, zero_masked
from .mode import Mode, find_mode
from .records import Call, Options, part_of
from .replicas import normalise_replica
from .tracking import begin_update
from .transformed import normalise_transformed


def normalise(
    input: Tensor,
    affine: Affine,
    running: Running,
    options: Options,
    mask: Tensor | None = None,
    skipped: Tensor | None = None,
) -> Tensor:
    """Batch normalisation as :func:`syncbn.sync_batch_norm` describes it.

    skipped: where given, counts batches whose statistics are not finite and move nothing.
    """
    mode = find_mode(input, options.training)
    try:
        return _normalise(input, affine, running, options, mode, mask, skipped)
    except Exception as error:
        if not (mode.silent or mode.compiling):
            _tell_others(options.group, error)
        raise


def _tell_others(group: Any, error: Exception) -> None:
    """That this rank raises: they wait for its message."""
    with suppress(Exception):  # a group that is none, or was destroyed: nobody waits there
        comm = resolve(group)
        if isinstance(comm, Framed) and comm.size > 1:
            comm.give_up(error)


def _normalise(
    input: Tensor,
    affine: Affine,
    running: Running,
    options: Options,
    mode: Mode,
    mask: Tensor | None,
    skipped: Tensor | None,
) -> Tensor:
    if mask is not None:
        check_input(input)
        check_mask(mask, input)
    conclude = accumulator = None
    comm = LOCAL if mode.silent else resolve(options.group)
    if options.training:
        accumulator = find_accumulator(options.layer, running, comm, mode, input)
        # Others may stand in for these below.
        if mode.transforming or skipped is not None or accumulator is not None:
            check_tensors(input, affine, running, mode.compiling)
        if skipped is not None:
            check_counter("num_batches_skipped", skipped, input.device)
        if mode.transforming:
            check_movable(*running[:3], skipped, input, mask)
        running, conclude = begin_update(running, mode, skipped, accumulator)
    call = Call(input, affine, running, options, mode, comm, accumulator=accumulator)
    if mode.transforming:
        y = normalise_transformed(call, mask)
    elif mask is None:
        y = normalise_dense(call)
    else:
        y = normalise_masked(call, mask)
    if conclude is not None:
        conclude()
    return y


def normalise_masked(call: Call, mask: Tensor) -> Tensor:
    """Where a mask says what counts: those values alone, as if nothing else were."""
    input = call.input
    check_options_of_dtensor(is_dtensor(input), False)
    if not call.options.training:
        zeroed = zero_masked(with_gradient_like(input), mask)
        return zero_masked(normalise_dense(call._replace(input=zeroed)), mask)
    mask = mask.clone()  # to keep: its owner may free it
    values, lengths = select_valid(with_gradient_like(input), mask)
    y = normalise_dense(call._replace(input=values, lengths=lengths))
    return scatter_valid(y, input, mask)


def normalise_dense(call: Call) -> Tensor:
    """Where all of input counts."""
    input, affine, running, options, mode, *_ = call
    if not mode.tracing:  # a trace would record the checks, with warnings
        momentum = running.momentum
        check_options(0.0 if momentum is None else momentum, options.eps)
        kernels = find_fused(call) if options.training else None
        if kernels is not None:
            # Before the table, and before the checks, which its operators make in no time.
            try:
                y = normalise_fused(call, kernels)
                if call.accumulator is not None:
                    call.accumulator.measure(input)
                return y
            except RuntimeError:  # the words follow here
                check_tensors(input, affine, running, mode.compiling)
                raise
        check_tensors(input, affine, running, mode.compiling)
    for path in PATHS:
        if path.serves(call):
            return path.run(call)
    raise AssertionError("the last path serves every call")


class Path(NamedTuple):
    serves: Callable[[Call], bool]
    run: Callable[[Call], Tensor]
    reason: str


def _needs_own_kernels(call: Call) -> bool:
    """Whether torch's operator would refuse a batch in training, or do it wrongly."""
    mean, var, batches, momentum = call.running
    if _mixes_dtypes(call.input, call.tensors):
        return True
    if not call.mode.compiling:
        # A view that reads with the opposite sign: torch's operator would move a copy.
        return any(t is not None and t.is_neg() for t in (mean, var))
    # torch's operator wants numbers that a graph does not have: a momentum, how many values.
    counting = momentum is None and batches is not None
    return not call.mode.silent and (counting or call.lengths is not None)


def _mixes_dtypes(input: Tensor, tensors: Sequence[Tensor | None]) -> bool:
    """Whether torch's operator refuses this mixture of dtypes, which our kernels take."""
    common, own = None, input.dtype
    for tensor in tensors:
        if tensor is not None:
            if common is not None and tensor.dtype != common:
                return True
            common = tensor.dtype
    if common is None or common == own:
        return False
    return common != torch.float32 or own == torch.float64


def _normalise_reproducibly(call: Call) -> Tensor:
    input = call.input
    if is_samplewise_contiguous(input):
        return _normalise_over_ranks(call)
    apart = samplewise_contiguous(with_gradient_like(input))
    return torch.empty_like(input).copy_(_normalise_over_ranks(call._replace(input=apart)))


def _normalise_over_ranks(call: Call) -> Tensor:
    comm = call.comm
    if comm.size > 1:
        refuse_join()
    else:
        comm = LOCAL
    reproducible, compiling = call.options.reproducible, call.mode.compiling
    comm = speaking(comm, call.options.layer, call.input.shape[1], compiling, reproducible)
    accumulator, part = call.accumulator, part_of(call.input, call.affine)
    exchange = (
        ReproducibleExchange(comm, call.lengths, accumulator)
        if reproducible
        else Exchange(comm, accumulator)
    )
    return normalise_parts([part], call.running, call.options.eps, exchange, compiling)[0]


def _normalise_as_torch(call: Call) -> Tensor:
    input, _, running, options, *_ = call
    tensors = call.tensors
    if _mixes_dtypes(input, tensors):
        wide = torch.float64 if input.dtype == torch.float64 else torch.float32
        tensors = tuple(None if t is None else t.to(wide) for t in tensors)
    momentum, batches = running.momentum, running.batches
    if momentum is None:
        momentum = 0.0 if batches is None else 1 / float(batches + 1)
    visible = not (call.mode.tracing or call.mode.compiling)
    y = torchs_batch_norm(input, *tensors, options.training, momentum, options.eps, visible=visible)
    if batches is not None:
        batches.add_(1)
    if call.accumulator is not None:
        call.accumulator.measure(input)
    return y


PATHS = (
    Path(
        lambda call: is_dtensor(call.input),
        normalise_dtensor,
        "a DTensor is the whole batch: it sends by itself what its shards need",
    ),
    Path(
        lambda call: not call.options.training,
        _normalise_as_torch,
        "the running statistics are there: nothing is measured, nothing sent",
    ),
    Path(
        lambda call: isinstance(call.comm, Replica),
        normalise_replica,
        "the other parts of this process's batch are in other threads",
    ),
    Path(
        lambda call: call.options.reproducible and not call.mode.silent,
        _normalise_reproducibly,
        "samples are summed one by one, over ranks or not, and must lie apart",
    ),
    Path(
        lambda call: call.comm.size > 1,
        _normalise_over_ranks,
        "statistics come from all ranks",
    ),
    Path(
        _needs_own_kernels,
        _normalise_over_ranks,
        "one process, but a batch that torch's operator does not take",
    ),
    Path(
        lambda call: True,
        _normalise_as_torch,
        "one process alone: graphs fuse torch's operator, and exports know it",
    ),
)
