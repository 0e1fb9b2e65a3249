"""sync_batch_norm(), the one public function of a step."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..kernels import Affine, Running
from ..step.dispatch import normalise, tell_others
from ..step.records import Options


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
    process_group: Any = None,
    mask: Tensor | None = None,
    reproducible: bool = False,
) -> Tensor:
    """Batch normalisation with the statistics of the whole batch, however it is split over ranks.

    ``y = (x − mean) / sqrt(var + eps) · weight + bias`` per channel, where mean and biased
    variance are those of all ranks' values together. Gradients with respect to ``input`` account
    for the statistics' dependence on every rank's input; gradients of ``weight`` and ``bias`` stay
    local sums, which DistributedDataParallel averages as it does for every parameter.

    In the forward of a replica of :class:`syncbn.DataParallel` all ranks' replicas count. Without
    a group of more than one rank, with ``training=False``, while tracing or exporting and on the
    meta device this is :func:`torch.nn.functional.batch_norm` and nothing is communicated.

    ``input`` and each of the four (C,) tensors may be of float16, bfloat16, float32 or float64, in
    any mixture. Per-channel numbers are computed in float64, elements in float32, or in float64 for
    float64 input. Output and gradients have the dtype of what they belong to; running statistics
    keep theirs.

    Args:
        input: (N, C, *) of any strides; N may be 0 and may differ between ranks. A DTensor is the
            whole batch, without a mask and not ``reproducible``. A nested tensor of layout
            torch.jagged, (N, C, *) with a ragged dimension after the channels, counts as its
            values, of all samples together; it takes no mask.
        running_mean, running_var: (C,) or None. In training they become, in place,
            ``(1 − momentum)·old + momentum·new``, where new are the mean and the *unbiased*
            variance of the whole batch.
        weight, bias: (C,) or None.
        training: normalise with the batch's statistics (True) or the running ones (False).
        momentum: in [0, 1], the weight of this batch in the running statistics.
        eps: > 0, added to the variance.
        group: None (the default group, if one is initialised), a torch.distributed group, a
            one-dimensional DeviceMesh or a :class:`syncbn.comm.Communicator`.
        process_group: the layers' name for ``group``; one of the two.
        mask: (N, *) bool or None. Only positions where it is True count, over all ranks; elsewhere
            output and gradient are zero, whatever ``input`` holds there. One mask for all channels
            (:func:`syncbn.mask_from_lengths` makes one of padded sequences); may be all False, and
            may be None on other ranks.
        reproducible: make outputs, gradients with respect to ``input`` and running statistics the
            same to the bit for every split of a batch over ranks, on the CPU. Give it, and a mask
            or none, on every rank alike. Costs little for images, some three times as much for
            rows of features; proof: :mod:`syncbn.numerics.reproducible`.

    Returns:
        A tensor of ``input``'s shape, dtype and memory format; nested where that is, with the same
        offsets.

    Raises:
        TypeError: tensors of other dtypes or layouts, or none, or a ``group`` of another type.
        ValueError: fewer than two dimensions or more than 64, no channels, sizes or devices that
            don't match, ``momentum`` or ``eps`` out of range, a group without this rank, ``group``
            and ``process_group`` both, a mask beside a nested tensor; on every rank alike, a
            single value per channel over all ranks (on a device at a later call).
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
    if process_group is not None:
        if group is not None:
            error = ValueError(
                "sync_batch_norm: expected group or process_group, two names of one option, got "
                "both; leave one of them out"
            )
            tell_others(group, error)
            raise error
        group = process_group
    affine, running = Affine(weight, bias), Running(running_mean, running_var, None, momentum)
    return normalise(input, affine, running, Options(training, eps, group, reproducible), mask)
