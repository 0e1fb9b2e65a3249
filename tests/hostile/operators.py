"""The compiled operators, called directly: python -m hostile.operators FIRST COUNT FILE

Arguments are tensors of any kind, or of the right one. An operator gives a result or an error;
nothing ends the process, reads outside of a tensor (a sanitizer tells) or moves what it refuses.
"""

from __future__ import annotations

import mmap
import random
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hostile import judge
from hostile.cases import FLOATING, SIZES, VALUES, free
from hostile.library import use_library
from support.cases import laid_out, layouts
from syncbn.kernels import native

CHANNELS = (1, 2, 3, 8, 33)
ODD = 0.15  # of the arguments are of no right kind
NAMES = (
    *("measure", "normalise", "gradient_sums", "input_gradient", "measure_checked"),
    *("gradient_sums_checked", "batch_norm", "batch_norm_backward", "measure_samples"),
    *("merge_samples", "gradient_sums_samples", "total_samples"),
)


class Arguments:
    """Draws the arguments of one call."""

    def __init__(self, seed: int) -> None:
        self.pick = random.Random(seed)
        self.generator = torch.Generator().manual_seed(seed)
        self.channels = self.pick.choice(CHANNELS)
        dims = self.pick.choice((2, 3, 4, 4, 5))
        spatial = [self.pick.choice(SIZES) for _ in range(dims - 2)]
        self.shape = (self.pick.choice(SIZES), self.channels, *spatial)
        self.dtype = self.pick.choice(FLOATING)

    def values(self, *shape: int) -> Tensor:
        x = torch.randn(shape, generator=self.generator, dtype=torch.float64)
        return VALUES[self.pick.choice(("usual", "usual", *VALUES))](x)

    def of(self, kind: str) -> Any:
        """An argument of the schema's name and type."""
        if kind.startswith("float"):
            return self.pick.choice((0.1, 0.0, 1.0, 1e-5, -3.0, float("nan"), float("inf"), 1e300))
        good = self.good(kind)
        return self.odd(good) if self.pick.random() < ODD else good

    def good(self, name: str) -> Tensor | None:
        c, pick = self.channels, self.pick
        if name in ("x", "dy"):
            x = self.values(*self.shape).to(self.dtype)
            return laid_out(x, pick.choice(layouts(x.dim())))
        if name in ("weight", "bias", "running_mean", "running_var"):
            return pick.choice((None, self.values(c).to(pick.choice(FLOATING))))
        if name == "num_batches_tracked":
            return pick.choice((None, torch.tensor(pick.randrange(9))))
        if name == "lengths":
            return pick.choice((None, torch.ones(self.shape[0], dtype=torch.long)))
        shapes = {
            "sets": (pick.choice((1, 2, 5)), 1 + 2 * c),
            "sums": (2, c),
            "saved": (2, c),
            "count": (),
            "received": pick.choice(((2, 1 + 12 * c), (2, 6, 2 * c))),
        }
        return self.values(*shapes.get(name, (c,)))

    def odd(self, good: Tensor | None) -> Any:
        """Of another dtype, size, place or layout, freed, or none."""
        pick = self.pick
        base = good if isinstance(good, Tensor) else torch.randn(self.channels)
        wrong = (
            lambda: None,
            lambda: free(base.clone()),
            lambda: base.to("meta"),
            lambda: base.to(pick.choice((torch.int32, torch.cfloat, torch.bool, torch.float32))),
            lambda: base.unsqueeze(0),
            lambda: base.flatten()[: pick.randrange(3)],
            lambda: torch.empty(0, 0, 0),
            lambda: base.expand(pick.choice((2, 3)), *base.shape),
            lambda: base.flatten()[::2],
            lambda: torch.empty(1 << 40, device="meta"),
            lambda: torch._neg_view(base.double()),
            lambda: base.t() if base.dim() == 2 else base,
        )
        return pick.choice(wrong)()


def try_call(seed: int) -> str:
    name = NAMES[seed % len(NAMES)]
    operator = getattr(torch.ops.syncbn, name).default
    drawn = Arguments(seed)
    arguments = [
        drawn.of("float" if "float" in str(each.type) else each.name)
        for each in operator._schema.arguments
    ]
    before = [
        a.clone() if isinstance(a, Tensor) and not a.is_meta and judge.is_held(a) else None
        for a in arguments
    ]
    try:
        operator(*arguments)
    except Exception as error:
        refusals = (*judge.REFUSALS, IndexError, AttributeError)  # the latter for meta
        judge.require(isinstance(error, refusals), f"raised {type(error).__name__}")
        for old, now in zip(before, arguments, strict=True):
            if old is not None:
                same = torch.equal(old.nan_to_num(7), now.nan_to_num(7))
                judge.require(same, f"{name} changed what it refused: {error}")
        return "refused"
    return "ran"


def main(first: int, count: int, place: str) -> None:
    torch.set_num_threads(1)
    use_library()
    warnings.simplefilter("ignore")
    assert native.available(), native.unavailable()
    counts: Counter[str] = Counter()
    Path(place).write_bytes(bytes(16))
    with open(place, "r+b") as file, mmap.mmap(file.fileno(), 16) as seen:
        for seed in range(first, first + count):
            seen[:] = f"{seed:16d}".encode()
            counts[judged(seed)] += 1
    print("counts", dict(counts), flush=True)


def judged(seed: int) -> str:
    try:
        return try_call(seed)
    except Exception as error:
        print(
            f"{NAMES[seed % len(NAMES)]}, seed {seed}: {type(error).__name__}: {error}", flush=True
        )
        return "wrong"


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])
