"""sync_batch_norm(): validates, picks the path. The one public function."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..comm import LOCAL, Replica, refuse_join, resolve
from ..kernels import serving
from ..step import dtensors, local
from ..step.autograd import synchronised
from ..step.checks import (
    check_counter,
    check_input,
    check_not_reproducible,
    check_options,
    check_tensors,
)
from ..step.joint import together
from ..step.masks import blank, check_mask, pack, unpack
from ..step.share import ReproducibleShare, Share
from ..step.tracking import begin_update
from ..step.transformed import transformed
from ..tensors.layout import lie_apart, samples_apart, torchs_batch_norm, with_gradient_like
from ..tensors.storages import is_dtensor
from ..tensors.transforms import check_movable, transforming


def sync_batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *,
    group: Any = None,
    mask: Tensor | None = None,
    reproducible: bool = False,
) -> Tensor:
    """Batch normalisation with the statistics of the whole batch, however it is split over ranks.

    ``y = (x − mean) / sqrt(var + eps) · weight + bias`` per channel, where mean and biased
    variance are those of all ranks' values together. Gradients with respect to ``input`` account
    for the statistics' dependence on every rank's input; gradients of ``weight`` and ``bias`` stay
    local sums, which DistributedDataParallel averages as it does for every parameter.

    In the forward of a replica of :class:`syncbn.DataParallel` the ranks are the replicas. Without
    a group of more than one rank, with ``training=False``, while tracing or exporting and on the
    meta device this is :func:`torch.nn.functional.batch_norm` and nothing is communicated.

    ``input`` and each of the four (C,) tensors may be of float16, bfloat16, float32 or float64, in
    any mixture. Per-channel numbers are computed in float64, elements in float32, or in float64 for
    float64 input. Output and gradients have the dtype of what they belong to; running statistics
    keep theirs.

    Args:
        input: (N, C, *) of any strides; N may be 0 and may differ between ranks. A DTensor is the
            whole batch, without a mask and not ``reproducible``.
        running_mean, running_var: (C,) or None. In training they become, in place,
            ``(1 − momentum)·old + momentum·new``, where new are the mean and the *unbiased*
            variance of the whole batch.
        weight, bias: (C,) or None.
        training: normalise with the batch's statistics (True) or the running ones (False).
        momentum: in [0, 1], the weight of this batch in the running statistics.
        eps: > 0, added to the variance.
        group: None (the replicas, or the default group, if one is initialised), a
            torch.distributed group, a one-dimensional DeviceMesh or a
            :class:`syncbn.comm.Communicator`.
        mask: (N, *) bool or None. Only positions where it is True count, over all ranks; elsewhere
            output and gradient are zero, whatever ``input`` holds there. One mask for all channels
            (:func:`syncbn.mask_from_lengths` makes one of padded sequences); may be all False, and
            may be None on other ranks.
        reproducible: make outputs, gradients with respect to ``input`` and running statistics the
            same to the bit for every split of a batch over ranks, on the CPU. Give it, and a mask
            or none, on every rank alike. Costs little for images, some three times as much for
            rows of features; proof: :mod:`syncbn.numerics.reproducible`.

    Returns:
        A tensor of ``input``'s shape, dtype and memory format.

    Raises:
        TypeError: tensors of other dtypes, or none, or a ``group`` of another type.
        ValueError: fewer than two dimensions or more than 64, no channels, sizes or devices that
            don't match, ``momentum`` or ``eps`` out of range, a group without this rank; on every
            rank alike, a single value per channel over all ranks.
        RuntimeError: a tensor whose storage was freed, here or in backward; training inside
            DistributedDataParallel's ``join()``.

    Source: Ioffe & Szegedy 2015, https://arxiv.org/abs/1502.03167;
    https://docs.pytorch.org/docs/stable/generated/torch.nn.SyncBatchNorm.html

    Example:
        >>> x = torch.randn(4, 3, 8, 8)
        >>> y = syncbn.sync_batch_norm(x, None, None)
        >>> bool(y.mean((0, 2, 3)).abs().max() < 1e-6)
        True
    """
    check_options(momentum, eps)
    return batch_norm(
        *(input, running_mean, running_var, None, weight, bias, training, momentum, eps, group),
        *(mask, reproducible),
    )


def batch_norm(
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    group: Any,
    mask: Tensor | None = None,
    reproducible: bool = False,
    num_batches_skipped: Tensor | None = None,
) -> Tensor:
    """:func:`sync_batch_norm` for layers: counts batches, over which momentum None averages.

    num_batches_skipped: where given, counts those whose statistics are not finite and move nothing.
    """
    moved = (running_mean, running_var, num_batches_tracked)
    conclude, transform = None, False
    if training:
        transform = transforming()
        if transform or num_batches_skipped is not None:  # others may stand in for these below
            check_tensors(input, *moved, weight, bias, momentum)
        if num_batches_skipped is not None:
            check_counter("num_batches_skipped", num_batches_skipped, input.device)
        if transform:
            check_movable(*moved, num_batches_skipped, input, mask)
        moved, momentum, conclude = begin_update(moved, momentum, num_batches_skipped)
    rest: tuple[Any, ...] = (*moved, weight, bias, training, momentum, eps, group, reproducible)
    if transform:
        y = transformed(input, mask, *moved, weight, bias, momentum, eps, group)
    elif mask is None:
        y = _whole(input, None, *rest)
    else:
        y = _where_it_counts(input, mask, training, *rest)
    if conclude is not None:
        conclude()
    return y


def _where_it_counts(input: Tensor, mask: Tensor, training: bool, *rest: Any) -> Tensor:
    check_input(input)
    check_mask(mask, input)
    dtensors.check_options_of_dtensor(is_dtensor(input), False)
    if not training:
        return blank(_whole(blank(with_gradient_like(input), mask), None, *rest), mask)
    mask = mask.clone()  # to keep: its owner may free it
    values, lengths = pack(with_gradient_like(input), mask)
    return unpack(_whole(values, lengths, *rest), input, mask)


def _whole(
    input: Tensor,
    lengths: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    training: bool,
    momentum: float | None,
    eps: float,
    group: Any,
    reproducible: bool,
) -> Tensor:
    """Batch normalisation where all of input counts; ``lengths`` of samples: see share.py."""
    tracing: bool = torch.jit.is_tracing()  # type: ignore[attr-defined, no-untyped-call]
    compiling = torch.compiler.is_compiling()
    silent = not training or tracing or (compiling and torch.compiler.is_exporting())
    silent = silent or (isinstance(input, Tensor) and input.is_meta)
    comm = LOCAL if silent else resolve(group)
    alone = comm.size == 1 and (silent or not reproducible)
    if not tracing:  # a trace would record the checks, with warnings
        check_options(0.0 if momentum is None else momentum, eps)
        given = (running_mean, running_var, num_batches_tracked, weight, bias, momentum)
        serves = training and alone and not compiling  # which fuses torch's own operator
        if serves and local.serves(input, *given[:-1]):
            try:
                return local.batch_norm(
                    *(input, weight, bias, running_mean, running_var, num_batches_tracked),
                    *(momentum, eps),
                )
            except RuntimeError:  # the operator checks in no time; the words follow here
                check_tensors(input, *given)
                raise
        check_tensors(input, *given)
    if is_dtensor(input):
        dtensors.check_options_of_dtensor(lengths is not None, reproducible)
        dtensors.check_group_of_dtensor(input, comm)
        rest = (running_mean, running_var, num_batches_tracked, weight, bias, momentum, eps)
        return dtensors.batch_norm(input, *rest, training)
    mixed = _mixed(input, running_mean, running_var, weight, bias)
    if training and not compiling:
        # A view that reads with the opposite sign: torch's operator would move a copy.
        mixed = mixed or any(t is not None and t.is_neg() for t in (running_mean, running_var))
    elif training and not silent:
        # torch's operator wants numbers that a graph does not have: a momentum, how many values.
        counting = momentum is None and num_batches_tracked is not None
        mixed = mixed or counting or lengths is not None
    if not alone or (mixed and training):
        rest = (running_mean, running_var, num_batches_tracked, weight, bias, momentum, eps)
        if isinstance(comm, Replica):
            check_not_reproducible(reproducible)
            return together(input, *rest, comm)
        if comm.size > 1:
            refuse_join()
        kernels = serving(input)
        if reproducible:
            share = ReproducibleShare(comm, kernels, lengths)
            if lie_apart(input):
                return synchronised(input, *rest, share)
            y = synchronised(samples_apart(with_gradient_like(input)), *rest, share)
            return torch.empty_like(input).copy_(y)
        return synchronised(input, *rest, Share(comm, kernels))
    if mixed:
        wide = torch.float64 if input.dtype == torch.float64 else torch.float32
        tensors = (running_mean, running_var, weight, bias)
        running_mean, running_var, weight, bias = (t if t is None else t.to(wide) for t in tensors)
    if momentum is None:
        momentum = 0.0 if num_batches_tracked is None else 1 / float(num_batches_tracked + 1)
    options = (training, momentum, eps)
    y = torchs_batch_norm(input, running_mean, running_var, weight, bias, *options)
    if num_batches_tracked is not None:
        num_batches_tracked.add_(1)
    return y


def _mixed(input: Tensor, *tensors: Tensor | None) -> bool:
    """Whether torch's operator refuses this mixture of dtypes, which our kernels take."""
    common = None
    for tensor in tensors:
        if tensor is not None:
            if common is not None and tensor.dtype != common:
                return True
            common = tensor.dtype
    if common is None or common == input.dtype:
        return False
    return common != torch.float32 or input.dtype == torch.float64
