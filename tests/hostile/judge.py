"""What the float64 judge says of a case that ran, and what a refusal must have left as it was."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import syncbn
from hostile.cases import Drawn
from support import oracle

REFUSALS = (ValueError, TypeError, RuntimeError, NotImplementedError)
# Values whose squares or reciprocals some dtype cannot hold: there "no number" is an answer.
OUT_OF_REACH = ("huge", "tiny", "subnormal", "beyond", "nan", "inf", "both")


class Wrong(AssertionError):
    """A result that is not the judge's, or a refusal that is none."""


def run(drawn: Drawn, group: Any = None) -> dict[str, Tensor]:
    """What a training step of the function gives, or raises; moves what the case says moves."""
    x = drawn.x
    floating = isinstance(x, Tensor) and x.is_floating_point()
    x = x.detach().requires_grad_() if floating else x
    parameters = {
        name: torch.nn.Parameter(t) if isinstance(t, Tensor) and t.is_floating_point() else t
        for name, t in (("weight", drawn.weight), ("bias", drawn.bias))
    }
    y = syncbn.sync_batch_norm(
        x,
        drawn.mean,
        drawn.var,
        **parameters,
        training=drawn.training,
        momentum=drawn.momentum,
        eps=drawn.eps,
        mask=drawn.mask,
        reproducible=drawn.reproducible,
        group=group,
    )
    y.backward(drawn.dy)
    found = {"y": y.detach(), "dx": x.grad}
    for name, parameter in parameters.items():
        if parameter is not None:
            found[f"d{name}"] = parameter.grad
    return found


def is_single(cases: Sequence[Drawn]) -> bool:
    """Whether the ranks' batches together have one value per channel, or none, in training."""
    return cases[0].training and sum(len(values_of(c, c.x)) for c in cases) <= 1


def values_of(drawn: Drawn, tensor: Tensor) -> Tensor:
    """(V, C): those that count, wide."""
    rows = tensor.detach().double().movedim(1, -1)
    return rows.reshape(-1, tensor.shape[1]) if drawn.mask is None else rows[drawn.mask]


def check(cases: Sequence[Drawn], found: Sequence[dict[str, Tensor]]) -> None:
    """Every rank's results against those of one float64 process with the whole batch."""
    x = torch.cat([values_of(case, case.x) for case in cases])
    dy = torch.cat([values_of(case, case.dy) for case in cases])
    expected, scales = expect(cases[0], x, dy)
    extreme = any(case.values in OUT_OF_REACH for case in cases)

    def compare(name: str, one: Tensor, dtypes: Sequence[torch.dtype]) -> None:
        narrow = max(dtypes, key=oracle.TOLERANCE.__getitem__)
        compare_columns(name, one, expected[name], scales[name], narrow, extreme)

    inputs = [case.x.dtype for case in cases]
    for name in ("y", "dx"):
        rows = [values_of(c, f[name]) for c, f in zip(cases, found, strict=True)]
        compare(name, torch.cat(rows), inputs)
        for case, results in zip(cases, found, strict=True):
            if case.mask is not None:
                left = results[name].movedim(1, -1)[~case.mask]
                require(not left.any(), f"{name} is not zero where the mask is False")
    for name in ("dweight", "dbias"):
        if name in found[0]:
            total = torch.stack([results[name].double() for results in found]).sum(0)
            compare(name, total[None], [*inputs, *(results[name].dtype for results in found)])
    exact = [torch.float64 if dtype == torch.float64 else torch.float32 for dtype in inputs]
    for case in cases:
        for name in ("mean", "var"):
            moved = getattr(case, name)
            if moved is not None:
                compare(name, moved[None], [*exact, moved.dtype])


def expect(drawn: Drawn, x: Tensor, dy: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Of one process with all values (V, C); and the largest that was added up, per channel."""
    channels = x.shape[1]
    ones = torch.ones(channels).double()
    w = ones if drawn.weight is None else drawn.weight.double()
    b = 0 * ones if drawn.bias is None else drawn.bias.double()
    mean, var, rate = 0 * ones, ones, drawn.momentum
    if not drawn.training or not len(x):
        invstd = (var + drawn.eps) ** -0.5
        normal = (x - mean) * invstd
        found = {"y": normal * w + b, "dx": dy * invstd * w}
        found |= {"dweight": (dy * normal).sum(0), "dbias": dy.sum(0)}
    else:
        judged = oracle.batch_norm(x, dy, w, b, drawn.eps)
        found = {name: getattr(judged, name) for name in ("y", "dx", "dweight", "dbias")}
        invstd = (judged.var + drawn.eps) ** -0.5
        normal = (x - judged.mean) * invstd
        if rate:
            mean = (1 - rate) * mean + rate * judged.mean
            var = (1 - rate) * var + rate * judged.unbiased_var
    found |= {"mean": mean[None], "var": var[None]}
    found |= {name: found[name][None] for name in ("dweight", "dbias")}
    # Against a tolerance of it: a mean in float64, and what differences of float32 leave off.
    grain = 0.0 if drawn.x.dtype == torch.float64 else 2.0**-149 * 1e6
    rounded = (largest(x) * 1e-4 + grain) * invstd
    spread = (dy.abs() * (normal.abs() + rounded)).sum(0)
    scales = {
        "y": largest(normal * w) + b.abs() + rounded * w.abs(),
        "dx": (w * invstd).abs()
        * (largest(dy) + (largest(normal) + rounded) * spread / max(len(x), 1)),
        "dweight": spread,
        "dbias": dy.abs().sum(0),
        "mean": largest(x) * rate + mean.abs(),
        "var": var.abs(),
    }
    return found, scales


def largest(rows: Tensor) -> Tensor:
    return rows.abs().amax(0) if len(rows) else torch.zeros(rows.shape[1]).double()


def compare_columns(
    name: str,
    found: Tensor,
    expected: Tensor,
    scale: Tensor,
    dtype: torch.dtype,
    extreme: bool,
) -> None:
    """Right to rounding of what was added up; or, of extreme values, no numbers."""
    require(found.shape == expected.shape, f"{name}: shape {found.shape} for {expected.shape}")
    if not found.numel():
        return
    found, finfo = found.detach().double(), torch.finfo(dtype)
    within = scale.isfinite() & (scale < finfo.max * (1 - 2.0**-9))
    numbers = found.isfinite().all(0)
    bad = within & ~numbers & expected.isfinite().all(0)
    require(extreme or not bad.any(), f"{name}: no numbers in channels {bad.nonzero().tolist()}")
    beyond = ~expected.isfinite() & found.isfinite()
    require(not beyond.any(), f"{name}: a number where there is none: {found[beyond][:4].tolist()}")
    smallest = finfo.smallest_normal if dtype != torch.float64 else 0.0
    error = (found - expected).abs().amax(0) - 4 * smallest
    off = within & numbers & (error > oracle.TOLERANCE[dtype] * 8 * scale)
    if off.any():
        channel = int(off.nonzero()[0])
        at = int((found - expected).abs()[:, channel].argmax())
        raise Wrong(
            f"{name}: {found[at, channel]:.8g} for {expected[at, channel]:.8g} in channel "
            f"{channel}, where {scale[channel]:.4g} is the scale"
        )


def check_refusal(drawn: Drawn, before: dict[str, Tensor], error: BaseException) -> None:
    """Of a kind that users expect, in words, with the state untouched."""
    require(isinstance(error, REFUSALS), f"raised {type(error).__name__}: {error}")
    text = str(error)
    require(len(text) > 20, f"says too little: {text!r}")
    for name, old in before.items():
        now = getattr(drawn, name)
        require(same_bits(now, old), f"{name} was touched by what was refused: {text[:80]}")


def state_of(drawn: Drawn) -> dict[str, Tensor]:
    """Copies of what a step moves, where it can be read."""
    return {
        name: tensor.clone()
        for name, tensor in drawn.tensors().items()
        if name in ("mean", "var") and not tensor.is_meta and is_held(tensor)
    }


def is_held(tensor: Tensor) -> bool:
    if tensor.layout is not torch.strided:
        return False
    return tensor.untyped_storage().nbytes() >= tensor.numel() * tensor.itemsize


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and bool(torch.equal(a, b))


def require(good: bool | Tensor, words: str) -> None:
    if not good:
        raise Wrong(words)
