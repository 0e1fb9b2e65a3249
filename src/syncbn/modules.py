"""The layers: state and shape checks only. What they compute is in functional.py."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

import torch.nn as nn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm, _LazyNormBase
from torch.nn.parameter import UninitializedBuffer, is_lazy

from .comm import LOCAL, default_group, resolve
from .functional import batch_norm, check_input, check_options, check_shape, checked_dtype

if TYPE_CHECKING:
    from typing_extensions import Self


class SyncBatchNorm(_BatchNorm):
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
        statistics_dtype: of running_mean and running_var, if another than ``dtype``. In
            torch.float64 small steps aren't rounded off. ``layer.to(dtype)`` changes it, too.

    Shape:
        (N, C, *) → (N, C, *), of the same dtype and memory format. N may be 0 on some ranks.

    Raises:
        ValueError, TypeError: as :func:`syncbn.sync_batch_norm`, for options at construction.

    Source: https://docs.pytorch.org/docs/stable/generated/torch.nn.SyncBatchNorm.html

    Example:
        >>> layer = syncbn.SyncBatchNorm(3)
        >>> layer(torch.randn(4, 3, 8, 8)).shape
        torch.Size([4, 3, 8, 8])
    """

    process_group: Any = None  # on the class too: a converted or unpickled layer may have no own
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
        statistics_dtype: Any = None,
    ) -> None:
        check_options(0.0 if momentum is None else momentum, eps)
        super().__init__(
            num_features, eps, momentum, affine, track_running_stats, device=device, dtype=dtype
        )
        self._take_options(process_group, bias, statistics_dtype)

    def _take_options(self, process_group: Any, bias: bool, statistics_dtype: Any) -> None:
        resolve(process_group)
        self.process_group = process_group
        if not bias:  # not passed on: torch before 2.13 does not know it
            self.register_parameter("bias", None)
        for buffer in (self.running_mean, self.running_var):
            if buffer is not None and statistics_dtype is not None:
                buffer.data = buffer.data.to(checked_dtype("statistics_dtype", statistics_dtype))

    def forward(self, input: Tensor) -> Tensor:
        self._check_input_dim(input)
        mean, var, weight = self.running_mean, self.running_var, self.weight
        if weight is None and mean is None:  # no tensor that would tell
            check_input(input)
            check_shape("statistics", (self.num_features,), input)
        training = self.training or (mean is None and var is None)
        counter = None
        if self.training:
            if self.track_running_stats:
                counter = self.num_batches_tracked
            else:
                mean = var = None
        return batch_norm(
            *(input, mean, var, counter, weight, self.bias, training),
            *(self.momentum, self.eps, self.process_group if self.training else LOCAL),
        )

    def reset_parameters(self) -> None:
        self.reset_running_stats()
        if self.affine:
            nn.init.ones_(self.weight)
            if self.bias is not None:
                nn.init.zeros_(self.bias)

    @classmethod
    def convert_sync_batchnorm(cls, module: nn.Module, process_group: Any = None) -> nn.Module:
        """:func:`syncbn.convert` by the name and signature that torch gives it."""
        from .convert import convert_layers  # convert.py is above: it needs these classes

        return convert_layers(module, process_group, None, stacklevel=3)

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
            return  # sync_batch_norm says what is wrong
        if self._dims and input.dim() not in self._dims:
            expected = " or ".join(f"{dim}D" for dim in self._dims)
            raise ValueError(
                f"{type(self).__name__}: expected {expected} input (got {input.dim()}D input) of "
                f"shape {self._shapes}, got shape {tuple(input.shape)}; syncbn.SyncBatchNorm takes "
                "any number of dimensions from two"
            )

    def __copy__(self) -> Self:
        new = type(self).__new__(type(self))
        new.__dict__.update(self.__dict__)
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        memo[id(self.process_group)] = self.process_group  # a group belongs to the process
        new.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return new

    def __getstate__(self) -> dict[str, Any]:
        state = dict(self.__dict__)
        if state.get("process_group") is not None:
            state["process_group"] = None
            warnings.warn(
                f"{type(self).__name__} is pickled without its process group; set "
                "layer.process_group after loading, or the default group is used",
                stacklevel=2,
            )
        return state


class SyncBatchNorm1d(SyncBatchNorm, nn.BatchNorm1d):
    """:class:`SyncBatchNorm` for (N, C) or (N, C, L) only."""

    _shapes, _dims = "(N, C) or (N, C, L)", (2, 3)


class SyncBatchNorm2d(SyncBatchNorm, nn.BatchNorm2d):
    """:class:`SyncBatchNorm` for (N, C, H, W) only."""

    _shapes, _dims = "(N, C, H, W)", (4,)


class SyncBatchNorm3d(SyncBatchNorm, nn.BatchNorm3d):
    """:class:`SyncBatchNorm` for (N, C, D, H, W) only."""

    _shapes, _dims = "(N, C, D, H, W)", (5,)


class LazySyncBatchNorm(_LazyNormBase, SyncBatchNorm):
    """:class:`SyncBatchNorm` that takes num_features from its first input and becomes one then.

    Arguments as for :class:`SyncBatchNorm` without num_features.
    """

    cls_to_become = SyncBatchNorm

    def __init__(
        self,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        process_group: Any = None,
        device: Any = None,
        dtype: Any = None,
        *,
        bias: bool = True,
        statistics_dtype: Any = None,
    ) -> None:
        super().__init__(eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self._take_options(process_group, bias, statistics_dtype)

    def initialize_parameters(self, input: Tensor) -> None:
        check_input(input)
        self._check_input_dim(input)
        fresh = self.has_uninitialized_params()
        self.num_features = input.shape[1]
        for tensor in (*self._parameters.values(), *self._buffers.values()):
            if tensor is not None and is_lazy(tensor):
                tensor.materialize((self.num_features,))
            elif tensor is not None and tensor.dim() == 1:  # a loaded state dict has decided
                self.num_features = tensor.numel()
        if fresh:
            self.reset_parameters()

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        for buffer in self._buffers.values():
            if buffer is not None and is_lazy(buffer):  # torch cannot copy these
                like = {"device": buffer.device, "dtype": buffer.dtype}
                memo[id(buffer)] = UninitializedBuffer(**like)  # type: ignore[arg-type]
        return super().__deepcopy__(memo)


class LazySyncBatchNorm1d(LazySyncBatchNorm, SyncBatchNorm1d):
    """:class:`SyncBatchNorm1d` that takes num_features from its first input."""

    cls_to_become = SyncBatchNorm1d


class LazySyncBatchNorm2d(LazySyncBatchNorm, SyncBatchNorm2d):
    """:class:`SyncBatchNorm2d` that takes num_features from its first input."""

    cls_to_become = SyncBatchNorm2d


class LazySyncBatchNorm3d(LazySyncBatchNorm, SyncBatchNorm3d):
    """:class:`SyncBatchNorm3d` that takes num_features from its first input."""

    cls_to_become = SyncBatchNorm3d
