"""What is checked, and how: everything that determines a run."""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}
# Relative differences that rounding makes in a few steps of a few dozen layers, with a margin.
TOLERANCES = {"float64": 1e-9, "float32": 1e-4, "bfloat16": 0.1, "float16": 0.02}
_LONGEST, _LAST_SEED = 1e9, 2**32 - 1  # seconds that C++ clocks hold; what NumPy takes
Named = str | Callable[..., Any]


class Unusable(ValueError):
    """What was given cannot be checked; ``trace`` is the traceback of a rank, where it raised."""

    def __init__(self, message: str, trace: str = "") -> None:
        super().__init__(message)
        self.trace = trace


@dataclass(frozen=True, kw_only=True)
class Task:
    """See :func:`syncbn.check` for what each is, and for the errors."""

    factory: Named
    ranks: int = 2
    batch: int = 4
    steps: int = 3
    input: tuple[int, ...] | None = None
    dtype: str = "float64"
    convert: bool = False
    data: Named | None = None
    loss: Named | None = None
    lr: float = 0.01
    seed: int = 0
    timeout: float = 600.0

    def __post_init__(self) -> None:
        for name in ("ranks", "batch", "steps"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise Unusable(f"check: expected {name} ≥ 1, got {value!r}")
        if self.ranks > self.batch:
            raise Unusable(
                f"check: expected a sample for each rank, got a batch of {self.batch} for "
                f"{self.ranks} ranks; take fewer ranks or a larger batch"
            )
        if self.dtype not in DTYPES:
            raise Unusable(f"check: expected dtype in {', '.join(DTYPES)}, got {self.dtype!r}")
        if not self.lr > 0 or not 0 < self.timeout <= _LONGEST:
            raise Unusable(
                f"check: expected lr > 0 and timeout > 0, up to {_LONGEST:g} s, got {self.lr!r} "
                f"and {self.timeout!r}"
            )
        if not isinstance(self.seed, int) or not 0 <= self.seed <= _LAST_SEED:
            raise Unusable(f"check: expected seed from 0 to {_LAST_SEED}, got {self.seed!r}")
        self._check_input()
        for name in ("factory", "data", "loss"):
            _check_named(name, getattr(self, name))

    def _check_input(self) -> None:
        if (self.input is None) == (self.data is None):
            raise Unusable(
                "check: expected input, the shape of one sample, or data, a function of the "
                f"number of samples, got {'neither' if self.data is None else 'both'}"
            )
        if self.input is not None and not all(isinstance(n, int) and n > 0 for n in self.input):
            raise Unusable(f"check: expected input of sizes ≥ 1, got {self.input!r}")

    @property
    def tolerance(self) -> float:
        """The largest relative difference that passes for rounding."""
        return TOLERANCES[self.dtype]

    def share(self, rank: int) -> slice:
        """Which samples of each batch this rank takes: the first ranks one more, if need be."""
        least, more = divmod(self.batch, self.ranks)
        begin = rank * least + min(rank, more)
        return slice(begin, begin + least + (rank < more))

    @property
    def shares(self) -> list[int]:
        """How many samples each rank takes."""
        return [part.stop - part.start for part in map(self.share, range(self.ranks))]


def spoken(named: Named | None) -> str:
    """What was named, in words."""
    if named is None or isinstance(named, str):
        return str(named)
    named = named.func if isinstance(named, functools.partial) else named
    return f"{named.__module__}:{getattr(named, '__qualname__', type(named).__name__)}"


def _check_named(what: str, given: Named | None) -> None:
    if given is None and what != "factory":
        return
    if isinstance(given, str):
        module, colon, name = given.partition(":")
        if not (module and colon and name):
            raise Unusable(f"check: expected {what} as 'package.module:name', got {given!r}")
        return
    if not callable(given):
        raise Unusable(
            f"check: expected {what} as 'package.module:name' or a function, got {given!r}"
        )
    try:
        pickle.dumps(given)
    except Exception as error:
        raise Unusable(
            f"check: expected {what} to be a function of a module, which other processes import, "
            f"got {spoken(given)}: {error}"
        ) from None
