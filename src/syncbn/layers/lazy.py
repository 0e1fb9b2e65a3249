"""The lazy layers: they take num_features from their first input and become the others then."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from torch import Tensor
from torch.nn.modules.batchnorm import _LazyNormBase
from torch.nn.parameter import UninitializedBuffer, is_lazy

from ..step.checks import check_input
from ..step.dispatch import name_layer_of, tell_others
from .modules import SyncBatchNorm, SyncBatchNorm1d, SyncBatchNorm2d, SyncBatchNorm3d

if TYPE_CHECKING:
    from typing_extensions import Self


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
        reproducible: bool = False,
        statistics_dtype: Any = None,
        skip_nonfinite: bool = False,
    ) -> None:
        super().__init__(eps, momentum, affine, track_running_stats, device=device, dtype=dtype)
        self._take_options(process_group, bias, reproducible, statistics_dtype, skip_nonfinite)

    def initialize_parameters(self, input: Tensor, mask: Tensor | None = None) -> None:
        try:
            check_input(input)
            self._check_input_dim(input)
        except Exception as error:
            name_layer_of(error, self)
            if self.training:
                tell_others(self.process_group, error)
            raise
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
