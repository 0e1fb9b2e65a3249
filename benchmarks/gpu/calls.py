"""One layer's training step, call by call: ours, and what torch has for the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from syncbn.kernels import Affine, Implementation, Running, select_kernels

EPS = 1e-5
MOMENTUM = 0.1
# How often a step reads or writes a tensor like the input.
PASSES = {"measure": 1, "normalise": 2, "gradient_sums": 2, "input_gradient": 3}
WHOLE = {"forward": ("measure", "normalise"), "backward": ("gradient_sums", "input_gradient")}
FORMATS = {2: torch.channels_last, 3: torch.channels_last_3d}

Calls = dict[str, Callable[[], Any]]


@dataclass(frozen=True)
class Case:
    """A tensor (N, C, *) to normalise; ratio: its mean over its deviation."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    layout: str = "contiguous"
    ratio: float = 0.0

    def __str__(self) -> str:
        kind = str(self.dtype).removeprefix("torch.")
        return f"{'×'.join(map(str, self.shape))} {kind} {self.layout}"


@dataclass(frozen=True)
class Batch:
    """Input and output gradient, and the parameters (C,), of another type where x is short."""

    x: Tensor
    dy: Tensor
    affine: Affine

    def running(self) -> Running:
        channels, device = self.x.shape[1], self.x.device
        zeros = torch.zeros(channels, device=device)
        batches = torch.zeros((), dtype=torch.int64, device=device)
        return Running(zeros, torch.ones_like(zeros), batches, MOMENTUM)


def laid_out(x: Tensor, layout: str) -> Tensor:
    """The same values with other strides: contiguous, channels_last, strided."""
    if layout == "channels_last" and x.dim() > 2:
        format_ = FORMATS.get(x.dim() - 2)
        if format_ is None:
            return x.movedim(1, -1).contiguous().movedim(-1, 1)
        return x.contiguous(memory_format=format_)
    if layout == "strided":
        return x.new_zeros(*x.shape[:-1], 2 * x.shape[-1])[..., ::2].copy_(x)
    return x.contiguous()


def make_batch(case: Case, device: torch.device) -> Batch:
    torch.manual_seed(0)
    wide = torch.float64 if case.dtype == torch.float64 else torch.float32
    x, dy = torch.randn(2, *case.shape, dtype=wide, device=device)
    x = laid_out((x + case.ratio).to(case.dtype), case.layout)
    weight, bias = torch.rand(2, case.shape[1], dtype=wide, device=device) + 0.5
    return Batch(x, laid_out(dy.to(case.dtype), case.layout), Affine(weight, bias))


def our_steps(batch: Batch) -> Calls:
    """The four steps of a layer over ranks, the third with the parameters' gradients."""
    x, dy, affine = batch.x, batch.dy, batch.affine
    k, running = select_kernels(x), batch.running()
    sets = k.steps.measure(x).unsqueeze(0)
    _, found = k.steps.normalise(x, sets, affine=affine, eps=EPS)
    sums = k.steps.gradient_sums(dy, x, found)
    return {
        "measure": lambda: k.steps.measure(x),
        "normalise": lambda: k.steps.normalise(x, sets, affine=affine, running=running, eps=EPS),
        "gradient_sums": lambda: summed(k, batch, found),
        "input_gradient": lambda: k.steps.input_gradient(
            dy, x, weight=affine.weight, statistics=found, sums=sums
        ),
    }


def summed(k: Implementation, batch: Batch, found: Any) -> tuple[Tensor, Tensor, Tensor]:
    """The sums of one rank, dweight and dbias."""
    x, dy, affine = batch.x, batch.dy, batch.affine
    if k.fused is not None:
        return k.fused.gradient_sums_checked(dy, x, affine=affine, statistics=found)
    sums = k.steps.gradient_sums(dy, x, found)
    dbias, dweight = sums
    return sums, dweight, dbias


def our_whole(batch: Batch) -> Calls:
    """Forward and backward of one process alone, as torch's BatchNorm has them."""
    fused, running = select_kernels(batch.x).fused, batch.running()
    if fused is None:
        return {name: joined(our_steps(batch), steps) for name, steps in WHOLE.items()}
    x, dy, affine = batch.x, batch.dy, batch.affine
    saved = fused.batch_norm(x, affine=affine, running=running, eps=EPS)[1]
    return {
        "forward": lambda: fused.batch_norm(x, affine=affine, running=running, eps=EPS),
        "backward": lambda: fused.batch_norm_backward(dy, x, affine=affine, saved=saved),
    }


def torchs_steps(batch: Batch) -> Calls:
    """The functions of torch.nn.SyncBatchNorm, which are on GPUs alone, else nothing.

    Without the small operations that it has between them.
    """
    x, dy, (weight, bias) = batch.x, batch.dy, batch.affine
    if not x.is_cuda:
        return {}
    mean, var, _, _ = batch.running()
    mean_here, invstd_here = torch.batch_norm_stats(x, EPS)
    count = mean_here.new_full((1,), x.numel() // x.shape[1])
    whole_count = count.to(torch.int32)
    sums = torch.batch_norm_backward_reduce(dy, x, mean_here, invstd_here, weight, True, True, True)

    def normalise() -> Tensor:
        found = torch.batch_norm_gather_stats_with_counts(
            *(x, mean_here[None], invstd_here[None], mean, var, MOMENTUM, EPS, count)
        )
        return torch.batch_norm_elemt(x, weight, bias, *found, EPS)

    return {
        "measure": lambda: torch.batch_norm_stats(x, EPS),
        "normalise": normalise,
        "gradient_sums": lambda: torch.batch_norm_backward_reduce(
            dy, x, mean_here, invstd_here, weight, True, True, True
        ),
        "input_gradient": lambda: torch.batch_norm_backward_elemt(
            dy, x, mean_here, invstd_here, weight, *sums[:2], whole_count
        ),
    }


def torchs_whole(batch: Batch) -> Calls:
    """torch.nn.BatchNorm's forward and backward: cuDNN's, or what torch prefers to it."""
    inputs = [batch.x, *batch.affine]
    x, weight, bias = (t.detach().clone().requires_grad_() for t in inputs if t is not None)
    mean, var, _, _ = batch.running()

    def forward() -> Tensor:
        return functional.batch_norm(x, mean, var, weight, bias, True, MOMENTUM, EPS)

    y = forward()
    return {
        "forward": forward,
        "backward": lambda: torch.autograd.grad(y, (x, weight, bias), batch.dy, retain_graph=True),
    }


def joined(calls: Calls, names: tuple[str, ...]) -> Callable[[], None]:
    """Several of the calls, one after another, as one."""
    runs = [calls[name] for name in names]

    def run() -> None:
        for each in runs:
            each()

    return run
