"""Cases drawn from a seed: a batch, a layer's tensors and options, and perhaps something wrong."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from support.cases import laid_out, layouts

FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
SIZES = (0, 1, 1, 2, 2, 3, 4, 5, 7, 8, 13, 16, 31, 33)
VALUES: dict[str, Callable[[Tensor], Tensor]] = {
    "usual": lambda x: x,
    "far": lambda x: x + 1e4,
    "constant": lambda x: torch.full_like(x, 3.0),
    "zero": torch.zeros_like,
    "huge": lambda x: x * 1e30,
    "tiny": lambda x: x * 1e-30,
    "subnormal": lambda x: x * 1e-40,
    "beyond": lambda x: x * 1e200,
    "nan": lambda x: put(x, float("nan")),
    "inf": lambda x: put(x, float("inf")),
    "both": lambda x: put(put(x, float("inf")), float("-inf"), 1),
}


def put(x: Tensor, value: float, place: int = 0) -> Tensor:
    """x with another value in one place."""
    x = x.clone(memory_format=torch.contiguous_format)
    if x.numel() > place:
        x.view(-1)[place] = value
    return x


@dataclass
class Drawn:
    """What a call of sync_batch_norm is given. dy: like its output."""

    x: Tensor
    dy: Tensor
    weight: Any = None
    bias: Any = None
    mean: Any = None
    var: Any = None
    mask: Any = None
    momentum: Any = 0.1
    eps: Any = 1e-5
    training: bool = True
    reproducible: bool = False
    values: str = "usual"
    wrong: str = ""

    def tensors(self) -> dict[str, Tensor]:
        """Those of the layer."""
        found = {"weight": self.weight, "bias": self.bias, "mean": self.mean, "var": self.var}
        return {name: t for name, t in found.items() if isinstance(t, Tensor)}

    def words(self) -> str:
        layer = ", ".join(f"{name} {t.dtype}" for name, t in self.tensors().items())
        return (
            f"x {tuple(self.x.shape)} {self.x.dtype} strides {self.x.stride()} of {self.values} "
            f"values; {layer or 'no tensors'}; mask {self.mask is not None}, momentum "
            f"{self.momentum}, eps {self.eps}, training {self.training}, reproducible "
            f"{self.reproducible}; wrong: {self.wrong or 'nothing'}"
        )


def draw(seed: int, values: str | None = None) -> Drawn:
    """The case of a seed, with nothing wrong."""
    pick = random.Random(seed)
    generator = torch.Generator().manual_seed(seed)
    dims = pick.choice((2, 2, 3, 4, 4, 4, 5))
    channels = pick.choice((1, 2, 3, 5, 8, 17, 64))
    shape = (pick.choice(SIZES), channels, *(pick.choice(SIZES[:12]) for _ in range(dims - 2)))
    dtype = pick.choice(FLOATING)
    values = values or pick.choice(("usual", "usual", "usual", *VALUES))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    x = laid_out(VALUES[values](x).to(dtype), pick.choice(layouts(dims)))
    dy = torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
    dy = laid_out(dy, pick.choice(layouts(dims)))

    def numbers(shift: float) -> Tensor | None:
        if pick.random() < 0.3:
            return None
        wide = pick.choice((dtype, torch.float32, torch.float64))
        return (torch.rand(channels, generator=generator) + shift).to(wide)

    drawn = Drawn(x, dy, numbers(0.5), numbers(-0.5), values=values)
    if pick.random() < 0.7:
        wide = pick.choice((torch.float32, torch.float64, dtype))
        drawn.mean, drawn.var = torch.zeros(channels).to(wide), torch.ones(channels).to(wide)
    drawn.momentum = pick.choice((0.1, 0.1, 0.0, 1.0, 0.37))
    drawn.eps = pick.choice((1e-5, 1e-5, 1e-3, 1e-12, 1e-30))
    drawn.training = drawn.mean is None or pick.random() < 0.9
    drawn.reproducible = pick.random() < 0.1
    if pick.random() < 0.2:
        positions = (*shape[:1], *shape[2:])
        drawn.mask = torch.rand(positions, generator=generator) > pick.choice((0.0, 0.3, 0.9, 1.0))
    return drawn


def spoil(drawn: Drawn, seed: int) -> Drawn:
    """The case with something wrong, which must be refused."""
    drawn.wrong = random.Random(seed).choice(sorted(WRONG))
    WRONG[drawn.wrong](drawn)
    return drawn


def free(tensor: Tensor) -> Tensor:
    """As sharding and offloading do it."""
    tensor.untyped_storage().resize_(0)
    return tensor


def set_to(**changes: Any) -> Callable[[Drawn], None]:
    def change(drawn: Drawn) -> None:
        for name, value in changes.items():
            setattr(drawn, name, value(drawn) if callable(value) else value)

    return change


def ones(drawn: Drawn, *more: int) -> Tensor:
    return torch.ones(drawn.x.shape[1] + sum(more))


def filled(drawn: Drawn) -> Tensor:
    """A batch that has values, so that they can be missing."""
    return torch.randn(4, drawn.x.shape[1], 3)


def spoiled(name: str, how: Callable[[Tensor], Any]) -> Callable[[Drawn], None]:
    """One of the tensors, in a case whose batch is usual."""

    def change(drawn: Drawn) -> None:
        drawn.x, drawn.dy, drawn.mask = filled(drawn), filled(drawn), None
        drawn.mean, drawn.var = torch.zeros(drawn.x.shape[1]), ones(drawn)
        drawn.weight, drawn.bias = ones(drawn), ones(drawn)
        drawn.training, drawn.values = True, "usual"
        setattr(drawn, name, how(getattr(drawn, name)))

    return change


_LAYER = ("weight", "bias", "mean", "var")
WRONG: dict[str, Callable[[Drawn], None]] = {
    **{f"freed {name}": spoiled(name, free) for name in ("x", *_LAYER)},
    **{f"{name} on meta": spoiled(name, lambda t: t.to("meta")) for name in _LAYER},
    **{f"{name} of another size": spoiled(name, lambda t: torch.cat((t, t))) for name in _LAYER},
    **{f"{name} of two dimensions": spoiled(name, lambda t: t[None]) for name in _LAYER},
    **{f"{name} of integers": spoiled(name, lambda t: t.long()) for name in ("x", *_LAYER)},
    **{f"{name} complex": spoiled(name, lambda t: t.cfloat()) for name in ("x", *_LAYER)},
    **{f"{name} no tensor": spoiled(name, lambda t: t.tolist()) for name in _LAYER},
    "x sparse": spoiled("x", lambda t: t.to_sparse()),
    "x of one dimension": spoiled("x", lambda t: t[0, :, 0]),
    "x without channels": spoiled("x", lambda t: t[:, :0]),
    "mean alone": spoiled("var", lambda t: None),
    "var alone": spoiled("mean", lambda t: None),
    "freed mask": lambda d: (
        spoiled("x", lambda t: t)(d),
        set_to(mask=lambda d: free(torch.ones(4, 3).bool()))(d),
    )[0],
    "mask of numbers": lambda d: (
        spoiled("x", lambda t: t)(d),
        set_to(mask=lambda d: torch.ones(4, 3))(d),
    )[0],
    "mask of another shape": lambda d: (
        spoiled("x", lambda t: t)(d),
        set_to(mask=lambda d: torch.ones(4, 4).bool())(d),
    )[0],
    "eps below zero": set_to(eps=-1e-5),
    "eps zero": set_to(eps=0.0),
    "eps not finite": set_to(eps=float("nan")),
    "eps a word": set_to(eps="small"),
    "momentum not finite": spoiled("momentum", lambda m: float("inf")),
    "momentum a word": spoiled("momentum", lambda m: "0.1"),
}
