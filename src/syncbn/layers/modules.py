"""The layers, but for their Lazy forms: state and shape checks only. step/ computes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NoReturn, cast

import torch.nn as nn
from torch import Tensor

from ..comm import LOCAL, Unplaced, default_group, resolve
from ..kernels import Affine, Running
from ..step.accumulation import Accumulator
from ..step.checks import check_dims, check_input, check_options, check_shape, checked_dtype
from ..step.dispatch import normalise
from ..step.identity import Number, take_number
from ..step.masked import resolve_mask
from ..step.records import Options
from ..step.tracking import skip_nonfinite, skips_nonfinite
from ..tensors.recomputation import withhold
from .copies import Copied
from .replaced import watch_replacements

if TYPE_CHECKING:
    from typing_extensions import Self


class SyncBatchNorm(Copied):
    """Batch normalisation of (N, C, *) with the statistics of all ranks' batches together.

    A drop-in for torch's BatchNorm and SyncBatchNorm: same arguments, attributes, state dict.
    Formula, gradients and when ranks communicate: :func:`syncbn.sync_batch_norm`.

    Args:
        num_features: C, the size of the input's dimension 1.
        eps: > 0, added to the variance.
        momentum: weight of a new batch in running statistics, in [0, 1]; None for their average.
        affine: learn a weight and a bias (C,) per channel.
        track_running_stats: keep running_mean, running_var (C,) and num_batches_tracked () for
            eval mode; otherwise eval mode too uses the statistics of its (local) batch.
        process_group: None (the default group, if one is initialised when the layer runs), a
            torch.distributed group, a one-dimensional DeviceMesh or a Communicator. Kept by
            ``copy.deepcopy``; left out, with a warning, by pickle.
        device, dtype: of parameters and running statistics.
        bias: False for a weight without a bias.
        reproducible: in training, the same bits for every split of a batch over ranks.
        statistics_dtype: of running_mean and running_var, if another than ``dtype``. In
            torch.float64 small steps aren't rounded off. ``layer.to(dtype)`` changes it, too.
        skip_nonfinite: a training batch whose mean or variance, over all ranks, is infinite or nan
            in any channel moves neither running statistics nor num_batches_tracked, on any rank.
            Its output and gradients are as without. The buffer num_batches_skipped () counts such
            batches; state dicts leave it out. Traced and exported layers don't have the option.

    Shape:
        input: (N, C, *), N may be 0 on some ranks; jagged nested tensors with a ragged dimension
        after the channels, too. mask, optional: (N, *), bool, True where a
        position counts. Output: (N, C, *), of the input's dtype and memory format.

    Raises:
        ValueError, TypeError: as :func:`syncbn.sync_batch_norm`, for options at construction.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.SyncBatchNorm.html

    Example:
        >>> layer = syncbn.SyncBatchNorm(3)
        >>> layer(torch.randn(4, 3, 8, 8)).shape
        torch.Size([4, 3, 8, 8])
    """

    # On the class too: a converted or unpickled layer may have none of its own.
    process_group = cast(Any, None)
    reproducible: bool = False
    skip_nonfinite = property(skips_nonfinite, skip_nonfinite)
    _bn_momentum_patched = True  # pytorch-pfn-extras' checkpoint asks: one move is one move here
    _identity: Number | str  # see step/identity.py
    _accumulator: Accumulator | None = None  # accumulating()'s
    _mask_sources = cast(tuple[tuple[list[str], Any], ...], ())  # masking()'s, from the outermost
    _shapes: str = "(N, C, *)"
    _dims: tuple[int, ...] = ()

    def __init__(
        self,
        num_features: int,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        reproducible: bool = False,
        statistics_dtype: Any = None,
        skip_nonfinite: bool = False,
    ) -> None:
        check_options(0.0 if momentum is None else momentum, eps)
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        self._take_options(process_group, bias, reproducible, statistics_dtype, skip_nonfinite)

    def _take_options(
        self,
        process_group: Any,
        bias: bool,
        reproducible: bool,
        statistics_dtype: Any,
        skip_nonfinite: bool,
    ) -> None:
        resolve(process_group)
        self.process_group = process_group
        take_number(self)
        watch_replacements()
        if not bias:  # not passed on: torch before 2.13 does not know it
            self.register_parameter("bias", None)
        self.reproducible = reproducible
        for buffer in (self.running_mean, self.running_var):
            if buffer is not None and statistics_dtype is not None:
                buffer.data = buffer.data.to(checked_dtype("statistics_dtype", statistics_dtype))
        self.skip_nonfinite = skip_nonfinite

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        mean, var, counter, weight, bias = self._tensors()
        training = self.training or (mean is None and var is None)
        if not self.training:
            counter = None
        elif not self.track_running_stats:
            if mean is not None:
                withhold(mean, counter)
            mean = var = counter = None
        affine, running = Affine(weight, bias), Running(mean, var, counter, self.momentum)
        group = self.process_group if self.training else LOCAL
        options = Options(training, self.eps, group, self.reproducible, self)
        skipped = self._buffers.get("num_batches_skipped")
        return normalise(input, affine, running, options, mask, skipped)

    def _checked_mask(self, input: Tensor, mask: Tensor | None) -> Tensor | None:
        """The mask for an input, once that is seen to have the layer's form: within a call, of
        which other ranks are told where this one raises.
        """
        self._check_input_dim(input)
        if self._buffers.get("running_mean") is None and self._parameters.get("weight") is None:
            check_input(input)
            check_shape("statistics", (self.num_features,), input)
        if mask is None and self._mask_sources:
            return resolve_mask(self._mask_sources, input)
        return mask

    def _tensors(self) -> tuple[Tensor | None, ...]:
        """Statistics, their counter, weight, bias: by name each takes a microsecond to find."""
        buffers, parameters = self._buffers, self._parameters
        try:
            return (
                *(buffers["running_mean"], buffers["running_var"], buffers["num_batches_tracked"]),
                *(parameters["weight"], parameters["bias"]),
            )
        except KeyError:  # parametrised, or a replica's: an attribute of another kind
            counter = getattr(self, "num_batches_tracked", None)  # which some foreign ones lack
            return self.running_mean, self.running_var, counter, self.weight, self.bias

    def reset_running_stats(self) -> None:
        super().reset_running_stats()
        if skips_nonfinite(self):
            self.get_buffer("num_batches_skipped").zero_()

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        if self.affine:
            nn.init.ones_(self.weight)
            if self.bias is not None:
                nn.init.zeros_(self.bias)

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """:func:`syncbn.convert` by the name and signature that torch gives it."""
        from ..models.convert import convert_layers  # convert.py is above: it needs these classes

        return convert_layers(module, process_group, stacklevel=3)

    def extra_repr(self) -> str:
        world = default_group()
        torchs: str = super().extra_repr()  # type: ignore[no-untyped-call]
        text = f"{torchs}, world_size={world.size if world else 1}"
        text += "" if self.training else ", training=False"
        try:
            comm = resolve(self.process_group)
        except (TypeError, ValueError):  # destroyed since, or nonsense
            return f"{text}, group_size=unavailable"
        return text if comm in (world, LOCAL) else f"{text}, group_size={comm.size}"

    def _check_input_dim(self, input: Tensor) -> None:
        if not isinstance(input, Tensor):
            check_input(input)
        if self._dims:
            check_dims(type(self).__name__, self._dims, self._shapes, input)

    def __prepare_scriptable__(self) -> NoReturn:
        raise TypeError(
            f"torch.jit.script: expected layers of torch's own classes, got {type(self).__name__}; "
            "syncbn.revert the model first, or a copy of it where training goes on"
        )

    def _replicate_for_data_parallel(self) -> Self:
        replica: Self = super()._replicate_for_data_parallel()  # type: ignore[no-untyped-call]
        replica.process_group = Unplaced()  # until syncbn.DataParallel places it
        return replica


class SyncBatchNorm1d(SyncBatchNorm, nn.BatchNorm1d):
    """:class:`SyncBatchNorm` for (N, C) or (N, C, L) only."""

    _shapes, _dims = "(N, C) or (N, C, L)", (2, 3)


class SyncBatchNorm2d(SyncBatchNorm, nn.BatchNorm2d):
    """:class:`SyncBatchNorm` for (N, C, H, W) only."""

    _shapes, _dims = "(N, C, H, W)", (4,)


class SyncBatchNorm3d(SyncBatchNorm, nn.BatchNorm3d):
    """:class:`SyncBatchNorm` for (N, C, D, H, W) only."""

    _shapes, _dims = "(N, C, D, H, W)", (5,)
