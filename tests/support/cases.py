"""One whole batch, how it is split over ranks, and the step that every rank runs on its share."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

import syncbn
from support import oracle

CLOSE = {"rtol": 1e-9, "atol": 1e-11}  # of float64, after some steps


@dataclass(frozen=True)
class Case:
    """A batch of sum(split) samples (C, *spatial) with mean ``offset`` and deviation ``spread``."""

    split: tuple[int, ...]
    channels: int = 3
    spatial: tuple[int, ...] = (4, 5)
    dtype: torch.dtype = torch.float32
    param_dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    gradient_layout: str = "contiguous"
    offset: float = 0.0
    spread: float = 1.0
    weight: bool = True
    bias: bool = True
    momentum: float = 0.1
    reproducible: bool = False
    seed: int = 0

    def batch(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """x, dy (N, C, *spatial) and weight, bias (C,), as the ranks see them."""
        generator = torch.Generator().manual_seed(self.seed)

        def randn(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        shape = (sum(self.split), self.channels, *self.spatial)
        x = (randn(*shape) * self.spread + self.offset).to(self.dtype)
        dy = (randn(*shape) + 0.5).to(self.dtype)
        weight = (randn(self.channels) + 1.5).to(self.param_dtype) if self.weight else None
        bias = randn(self.channels).to(self.param_dtype) if self.bias else None
        return x, dy, weight, bias

    def with_(self, **changes: object) -> Case:
        return replace(self, **changes)  # type: ignore[arg-type]


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides."""
    if layout == "channels_last":
        return x.contiguous(memory_format=torch.channels_last)
    if layout == "channels_last_3d":
        return x.contiguous(memory_format=torch.channels_last_3d)
    if layout == "strided":  # every second element of a larger tensor
        out = x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])[..., ::2]
        return out.copy_(x)
    if layout == "transposed":  # dense, dimensions in the reverse order
        dims = tuple(reversed(range(x.dim())))
        return x.permute(dims).contiguous().permute(dims)
    if layout == "batch_inside":  # dense, of four dimensions: (H, W, N, C)
        return x.permute(2, 3, 0, 1).contiguous().permute(2, 3, 0, 1)
    if layout == "batch_further_inside":  # (C, H, N, W)
        return x.permute(1, 2, 0, 3).contiguous().permute(2, 0, 1, 3)
    return x.contiguous()


def strides(x: Tensor) -> list[int]:
    """Those that place a value: of dimensions longer than one, in a tensor that has values."""
    return [s for s, size in zip(x.stride(), x.shape, strict=True) if size > 1 and x.numel()]


def layouts(dimensions: int) -> list[str]:
    extra = {4: ["channels_last"], 5: ["channels_last_3d"]}.get(dimensions, [])
    return ["contiguous", "strided", "transposed", *extra]


def share_of(split: Sequence[int], rank: int) -> slice:
    """Which samples of the whole batch ``rank`` holds."""
    return slice(sum(split[:rank]), sum(split[: rank + 1]))


def step(rank: int, case: Case, process_group: Any = None) -> dict[str, Tensor]:
    """One training step on this rank's share; what it computed."""
    x, dy, weight, bias = case.batch()
    mine = share_of(case.split, rank)
    layer = syncbn.SyncBatchNorm(
        case.channels,
        momentum=case.momentum,
        affine=weight is not None or bias is not None,
        dtype=case.param_dtype,
        reproducible=case.reproducible,
        process_group=process_group,
    )
    for name, value in (("weight", weight), ("bias", bias)):
        parameter = None if value is None else torch.nn.Parameter(value)
        layer.register_parameter(name, parameter)
    x = laid_out(x[mine], case.layout).detach().requires_grad_()
    y = layer(x)
    y.backward(laid_out(dy[mine], case.gradient_layout))
    assert strides(y) == strides(x.grad) == strides(torch.empty_like(x))
    assert y.dtype == x.grad.dtype == case.dtype
    result = {"y": y.detach().contiguous(), "dx": x.grad.contiguous()}
    for name, parameter in layer.named_parameters():
        assert parameter.grad.dtype == case.param_dtype
        result["d" + name] = parameter.grad
    return result | dict(layer.named_buffers())


def check(case: Case, results: list[dict[str, Tensor]], factor: float = 1.0) -> None:
    """Every rank's results together equal the oracle's of the whole batch."""
    x, dy, weight, bias = case.batch()
    expected = oracle.batch_norm(x, dy, weight, bias)
    for name in ("y", "dx"):
        whole = torch.cat([result[name] for result in results])
        oracle.assert_close(whole, getattr(expected, name), factor=factor)
    for name in ("dweight", "dbias"):
        if name in results[0]:
            total = sum(result[name].double() for result in results)
            oracle.assert_close(
                total,
                getattr(expected, name),
                dtype=max(case.dtype, case.param_dtype, key=oracle.TOLERANCE.__getitem__),
                factor=factor * 4,
            )
    running = expected.running(0.0, 1.0, case.momentum)
    for name, value in zip(("running_mean", "running_var"), running, strict=True):
        oracle.assert_close(results[0][name], value)
        for result in results[1:]:
            assert torch.equal(result[name], results[0][name]), "ranks differ"
    assert all(result["num_batches_tracked"] == 1 for result in results)
