"""One step of training over two ranks, against the same step of one process on the whole batch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import syncbn
from support import oracle


class Job(NamedTuple):
    """A float64 model, the ranks' shares of a batch, their axis, what is put around a share."""

    model: nn.Module
    shares: list[Tensor]
    axis: int = 0
    around: Callable[[Tensor], Any] | None = None


def varied(model: nn.Module) -> nn.Module:
    """The model in float64, with parameters that are nowhere the same."""
    torch.manual_seed(1)
    model = model.double()
    for parameter in model.parameters():
        if parameter.dim():
            parameter.data += torch.randn_like(parameter) / 2
    return model


def step(model: nn.Module, x: Tensor, around: Callable[[Tensor], Any] | None) -> tuple[Tensor, ...]:
    """One step of training: the output and the gradient of the input."""
    x = x.clone().requires_grad_()
    y = model(around(x) if around else x)
    y = getattr(y, "features", y)
    (y * weights(y)).sum().backward()
    return y.detach(), x.grad


def weights(y: Tensor) -> Tensor:
    """What step() multiplies an output by, before it sums."""
    return torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y).sin()


def assert_ranks_equal_one_process(
    ranks: Callable[..., Any], build: Callable[[str], Job], name: str, factor: float = 4
) -> None:
    """Outputs, gradients and buffers, to rounding. The one process runs the library's own layers,
    but for torch's SyncBatchNorm, which takes no CPU tensors.
    """

    def train(rank: int) -> tuple[Any, ...]:
        model, shares, _, around = build(name)
        syncbn.convert(model)
        y, dx = step(model, shares[rank], around)
        buffers = [buffer.double() for buffer in model.buffers()]
        return y, dx, [parameter.grad for parameter in model.parameters()], buffers

    results = ranks(2, train)
    model, shares, axis, around = build(name)
    if any(isinstance(layer, nn.SyncBatchNorm) for layer in model.modules()):
        syncbn.convert(model)
    whole = torch.cat(shares, axis).requires_grad_()
    y = model(around(whole) if around else whole)
    y = getattr(y, "features", y)
    parts = y.detach().split([result[0].size(axis) for result in results], axis)
    (y * torch.cat([weights(part) for part in parts], axis)).sum().backward()
    dxs = whole.grad.split([x.size(axis) for x in shares], axis)
    for (mine, dx, _, buffers), its, its_dx in zip(results, parts, dxs, strict=True):
        oracle.assert_close(mine, its, factor=factor)
        oracle.assert_close(dx, its_dx, factor=factor)
        for buffer, expected in zip(buffers, model.buffers(), strict=True):
            oracle.assert_close(buffer, expected.double(), factor=factor)
    for number, parameter in enumerate(model.parameters()):
        total = sum(grads[number] for _, _, grads, _ in results)
        oracle.assert_close(total, parameter.grad, factor=factor)
