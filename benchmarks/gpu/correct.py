"""The steps on the device against float64, and the same bits in every run."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from syncbn.kernels import Running, Statistics, select_kernels

from .calls import EPS, MOMENTUM, Batch, Case, make_batch, summed
from .machine import GIGABYTE, Machine
from .sections import Result, Skipped

# Of one result, relative to the largest expected one: rounding, with room for a few operations.
ROUNDING = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 2e-3,
    torch.bfloat16: 1.2e-2,
}
ROOM = {"y": 4, "dx": 10, "mean": 1, "invstd": 1, "dweight": 20, "dbias": 20}  # roundings
RUNNING = ("running_mean", "running_var")  # float32, whatever the input is
EXACT = 1e-6  # statistics and sums, of their largest or of the deviation
RUNS = 5  # that must give the same bits
HALVES = (torch.float16, torch.bfloat16)
TOYS = (
    Case((2, 3, 4, 5)),
    Case((2, 5, 3, 4), torch.bfloat16, "channels_last"),
    Case((3, 2, 3, 2), ratio=1e4),
)
SHAPES = (
    *((7, 3), (4096, 3), (300, 1000), (6, 4, 33), (2, 3, 9, 11), (2, 3, 4, 3, 2), (3, 70, 1, 1)),
    *((64, 1, 33, 17), (0, 3, 4, 4), (4, 2048, 7, 7), (8, 64, 56, 56), (2, 16, 256, 256)),
)
HUGE = (3, 2, 20000, 18000)  # more than 2³¹ values
_HUGE_MEMORY = 6 * math.prod(HUGE) * 2  # bytes: x, dy, y, dx, and float64 of one plane


def cases(machine: Machine) -> list[Case]:
    if machine.toy:
        return list(TOYS)
    found = []
    for shape in SHAPES:
        for layout in ("contiguous", "channels_last") if len(shape) > 2 else ("contiguous",):
            for dtype in ROUNDING:
                ratios = (0.0, 10.0) if dtype in HALVES else (0.0, 1e4)
                found += [Case(shape, dtype, layout, ratio) for ratio in ratios]
    return [*found, Case((4, 8, 33, 34), layout="strided", ratio=1e4)]


def check_steps(machine: Machine) -> Result:
    """Every case against float64; the worst errors of each dtype, in parts of what is allowed."""
    tried, worst = cases(machine), dict[str, dict[str, float]]()
    wrong = []
    for case in tried:
        batch = make_batch(case, machine.device)
        found = run_steps(batch)
        errors = compare(case, batch, found)
        kept = worst.setdefault(str(case.dtype).removeprefix("torch."), {})
        for name, error in errors.items():
            kept[name] = max(kept.get(name, 0.0), error)
            if not error <= 1:  # nan, too
                wrong.append(f"{name} of {case}, mean/std {case.ratio:g}: {error:.3g}")
        runs = 1 if machine.toy else RUNS - 1
        for other in (run_steps(batch) for _ in range(runs)):
            names = [name for name in found if not same(found[name], other[name])]
            wrong += [f"{name} of {case} has other bits in another run" for name in names]
    if wrong:
        raise AssertionError(f"{len(wrong)} wrong, errors in parts of those allowed: {wrong[:8]}")
    parts = ", ".join(f"{k} {max(v.values(), default=0):.2f}" for k, v in worst.items())
    return Result(f"{len(tried)} cases; worst error in parts of what is allowed: {parts}", worst)


def run_steps(batch: Batch) -> dict[str, Tensor]:
    """Everything that a step over ranks gives, of one rank, and the kernels of a process alone."""
    x, affine = batch.x, batch.affine
    k, running = select_kernels(x), batch.running()
    sets = k.steps.measure(x).unsqueeze(0)
    y, found = k.steps.normalise(x, sets, affine=affine, running=running, eps=EPS)
    sums, dweight, dbias = summed(k, batch, found)
    dx = k.steps.input_gradient(batch.dy, x, weight=affine.weight, statistics=found, sums=sums)
    results = {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias}
    results |= {"mean": found.mean, "invstd": found.invstd}
    moved = zip(RUNNING, running[:2], strict=True)
    results |= {name: tensor for name, tensor in moved if tensor is not None}
    if k.fused is not None and x.numel():
        y, saved = k.fused.batch_norm(x, affine=affine, running=batch.running(), eps=EPS)
        alone = (y, *k.fused.batch_norm_backward(batch.dy, x, affine=affine, saved=saved))
        names = [f"{name} alone" for name in ("y", "dx", "dweight", "dbias")]
        results |= dict(zip(names, alone, strict=True))
    return results


def compare(case: Case, batch: Batch, found: dict[str, Tensor]) -> dict[str, float]:
    """Errors in parts of what is allowed."""
    x, rounding = batch.x, ROUNDING[batch.x.dtype]
    if not x.numel():
        return {"shape": 2.0 * any(found[name].shape != x.shape for name in ("y", "dx"))}
    expected = expected_steps(batch)
    exact = EXACT
    if x.dtype == torch.float64:  # carries a mean to 1e-16 of its size, here and in expected
        exact = rounding = rounding * (1 + case.ratio / 1e3)
    strides = torch.empty_like(x).stride()
    errors = {"strides": 2.0 * any(found[name].stride() != strides for name in ("y", "dx"))}
    for name, result in found.items():
        kind = name.removesuffix(" alone")
        scale = expected[kind].abs().max()
        if kind == "mean":
            scale = (expected["invstd"] ** -2 - EPS).clamp_min(0).sqrt().max()
        each = rounding if kind in ("y", "dx") else exact
        allowed = EXACT if kind in RUNNING else ROOM[kind] * each
        errors[name] = relative(result, expected[kind], float(scale)) / allowed
    return errors


def relative(found: Tensor, expected: Tensor, scale: float) -> float:
    """The largest error, relative to a scale, but not to one that is next to nothing."""
    return float((found.double() - expected).abs().max()) / max(0.1, scale)


def expected_steps(batch: Batch) -> dict[str, Tensor]:
    """The formulas in float64, of values that are centred twice."""
    x, dy = batch.x.double(), batch.dy.double()
    others, shape = (0, *range(2, x.dim())), (1, -1, *(1,) * (x.dim() - 2))
    n = x.numel() // x.shape[1]
    rough = x.mean(others)
    centred = x - rough.view(shape)
    rest = centred.mean(others)
    centred -= rest.view(shape)
    var = centred.square().mean(others)
    invstd = (var + EPS).rsqrt()
    normal = centred.mul_(invstd.view(shape))
    weight, bias = (torch.zeros(1) if t is None else t.double() for t in batch.affine)
    dbias, dweight = dy.sum(others), (dy * normal).sum(others)
    y = normal * weight.view(shape) + bias.view(shape)
    dx = dy - (dbias / n).view(shape) - normal * (dweight / n).view(shape)
    dx *= (weight * invstd).view(shape)
    unbiased = var * n / max(n - 1, 1)
    results = {"y": y, "dx": dx, "dweight": dweight, "dbias": dbias}
    results |= {"mean": rough + rest, "invstd": invstd}
    results["running_mean"] = MOMENTUM * results["mean"]
    results["running_var"] = 1 - MOMENTUM + MOMENTUM * unbiased
    return results


def same(a: Tensor, b: Tensor) -> bool:
    """Equal to the bit, but for the signs of zeros; nan equals nan."""
    return torch.equal(a.nan_to_num(nan=7e4), b.nan_to_num(nan=7e4))


def check_huge(machine: Machine) -> Result:
    """A tensor of more than 2³¹ values, by planes."""
    if not machine.is_gpu or machine.toy:
        raise Skipped("for GPUs with much memory")
    if machine.memory() < _HUGE_MEMORY:
        raise Skipped(f"needs {_HUGE_MEMORY / GIGABYTE:.0f} GB of free memory")
    x = torch.empty(HUGE, dtype=torch.bfloat16, device=machine.device).normal_()
    k, c = select_kernels(x), HUGE[1]
    packed = k.steps.measure(x)
    n = x.numel() // c
    planes = [[x[i, j] for i in range(len(x))] for j in range(c)]
    mean = torch.stack([_total(p.double() for p in each) / n for each in planes])
    centred = [(p.double() - m for p in each) for each, m in zip(planes, mean, strict=True)]
    m2 = torch.stack([_total(p.square() for p in each) for each in centred])
    torch.testing.assert_close(packed[1 : 1 + c], mean, rtol=0, atol=EXACT)
    torch.testing.assert_close(packed[1 + c :], m2, rtol=EXACT, atol=0)
    y, found = k.steps.normalise(x, packed.unsqueeze(0), running=Running(), eps=EPS)
    _check_last_plane(x, y, found)
    sums = k.steps.gradient_sums(y, x, found)
    torch.testing.assert_close(sums[1] / n, torch.ones_like(mean), rtol=0, atol=1e-3)
    dx = k.steps.input_gradient(y, x, weight=None, statistics=found, sums=sums)
    assert float(dx[-1, -1].abs().max()) < 0.1, "the gradient of y by itself is not zero"
    return Result(f"{x.numel():,} values of bfloat16")


def _total(planes: Iterable[Tensor]) -> Tensor:
    """Of all values; one plane at a time is in memory."""
    return torch.stack([plane.sum() for plane in planes]).sum()


def _check_last_plane(x: Tensor, y: Tensor, found: Statistics) -> None:
    expected = (x[-1, -1].double() - found.mean[-1]) * found.invstd[-1]
    error = relative(y[-1, -1], expected, float(expected.abs().max()))
    assert error <= 4 * ROUNDING[torch.bfloat16], f"y of the last plane: {error:.3g}"
