"""Which path serves a call: a table of conditions, each with its reason."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, NamedTuple

import torch
import torch.nn as nn
from torch import Tensor
from torch.autograd import profiler

from ..comm import LOCAL, Framed, Replica, refuse_join, resolve, warn_if_alone
from ..comm.errors import DesyncError
from ..kernels import Affine, Running
from ..tensors.layout import (
    is_samplewise_contiguous,
    samplewise_contiguous,
    with_gradient_like,
)
from ..tensors.storages import PLAIN, is_dtensor
from ..tensors.transforms import check_movable
from .accumulation import find_accumulator
from .as_torch import needs_own_kernels, normalise_as_torch
from .checks import check_counter, check_input, check_options, check_tensors
from .dtensors import check_options_of_dtensor, normalise_dtensor
from .exchange import Exchange, ReproducibleExchange
from .function import normalise_parts
from .fused import find_fused, normalise_fused
from .identity import name_in_model, name_layer
from .masked import check_mask, scatter_valid, select_valid, zero_masked
from .mode import Mode, find_mode
from .nested import check_form, is_jagged, nested_like, packed_values
from .profiling import profiled
from .records import Call, Options, part_of
from .replicas import normalise_replica
from .speaker import speaking
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
        # In this order: a graph would be compiled anew when a profiler starts, had it looked.
        if not mode.compiling and profiler._is_profiler_enabled and not any(mode[:4]):
            with profiled(options.layer, (input, *affine)) as outputs:
                outputs.append(_normalise(input, affine, running, options, mode, mask, skipped))
            return outputs[0]
        return _normalise(input, affine, running, options, mode, mask, skipped)
    except Exception as error:
        if not mode.compiling:
            name_layer_of(error, options.layer)
            if not mode.silent:
                tell_others(options.group, error)
        raise


def name_layer_of(error: Exception, layer: nn.Module | None) -> None:
    """Let an error say in which layer of a model it is, where that is known."""
    if isinstance(error, (TypeError, ValueError, RuntimeError)) and not isinstance(
        error, DesyncError
    ):
        name_layer(error, name_in_model(layer))


def tell_others(group: Any, error: Exception) -> None:
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
    if options.layer is None:
        check_options(running.momentum, options.eps)
    else:
        mask = options.layer._checked_mask(input, mask)  # type: ignore[operator]
    if mask is not None:
        check_input(input)
        check_mask(mask, input)
    conclude = accumulator = nested = lengths = None
    if type(input) not in PLAIN and is_jagged(input):
        check_form(input)
        nested = input
        input, lengths = packed_values(nested, options.training, options.reproducible)
    comm = LOCAL if mode.silent else resolve(options.group)
    if not (mode.compiling or mode.silent) and comm is LOCAL and options.group is None:
        warn_if_alone()
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
    call = Call(input, affine, running, options, mode, comm, lengths, accumulator=accumulator)
    if mode.transforming:
        y = normalise_transformed(call, mask)
    elif mask is None:
        y = normalise_dense(call)
    else:
        y = normalise_masked(call, mask)
    if conclude is not None:
        conclude()
    return y if nested is None else nested_like(nested, y, input)


def normalise_masked(call: Call, mask: Tensor) -> Tensor:
    """Where a mask says what counts: those values alone, as if nothing else were."""
    input = call.input
    check_options_of_dtensor(is_dtensor(input), False)
    if not call.options.training:
        zeroed = zero_masked(with_gradient_like(input), mask)
        return zero_masked(normalise_dense(call._replace(input=zeroed)), mask)
    mask = mask.clone()  # to keep: its owner may free it
    if _is_packing_slow(input) and not call.options.reproducible:
        zeroed = zero_masked(with_gradient_like(input), mask)
        return zero_masked(normalise_dense(call._replace(input=zeroed, mask=mask)), mask)
    values, lengths = select_valid(with_gradient_like(input), mask)
    y = normalise_dense(call._replace(input=values, lengths=lengths))
    return scatter_valid(y, input, mask)


def _is_packing_slow(input: Tensor) -> bool:
    """Whether to know how many values count is to wait for the device."""
    return not input.is_cpu


def normalise_dense(call: Call) -> Tensor:
    """Where all of input counts."""
    input, affine, running, options, mode, *_ = call
    if not mode.tracing:  # a trace would record the checks, with warnings
        momentum = running.momentum
        check_options(0.0 if momentum is None else momentum, options.eps)
        try:
            # Before the table, and before the checks, which its operators make in no time.
            kernels = find_fused(call) if options.training else None
            if kernels is not None:
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
    accumulator, part = call.accumulator, part_of(call.input, call.affine, call.mask)
    exchange = (
        ReproducibleExchange(comm, call.lengths, accumulator)
        if reproducible
        else Exchange(comm, accumulator)
    )
    return normalise_parts([part], call.running, call.options.eps, exchange, compiling)[0]


PATHS = (
    Path(
        lambda call: is_dtensor(call.input),
        normalise_dtensor,
        "a DTensor is the whole batch: it sends by itself what its shards need",
    ),
    Path(
        lambda call: not call.options.training,
        normalise_as_torch,
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
        needs_own_kernels,
        _normalise_over_ranks,
        "one process, but a batch that torch's operator does not take",
    ),
    Path(
        lambda call: True,
        normalise_as_torch,
        "one process alone: graphs fuse torch's operator, and exports know it",
    ),
)
