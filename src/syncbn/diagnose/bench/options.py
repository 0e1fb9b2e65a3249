"""What is measured, and how: everything that determines a run."""

from __future__ import annotations

import math
import os
from dataclasses import dataclass

import torch

from ..check.options import DTYPES, Named, Unusable
from ..check.options import Task as CheckTask

SAMPLES = 4
SHAPES = ((2, 64, 128, 128), (2, 256, 56, 56), (4, 512, 28, 28), (8, 2048, 7, 7))
LAYOUTS = {
    "contiguous": torch.contiguous_format,
    "channels_last": torch.channels_last,
    "channels_last_3d": torch.channels_last_3d,
}
_LAST_LAYOUT = {4: "channels_last", 5: "channels_last_3d"}  # by the number of dimensions
_LEAST = {"batch_per_rank": 1, "ranks": 1, "rounds": 2, "threads": 1}


@dataclass(frozen=True)
class Case:
    """The tensor that a layer gets on each rank.

    Attributes:
        shape: (N, C, *).
        layers: of a model, the name of the layer for each call with such a tensor in one step.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"
    layout: str = "contiguous"
    layers: tuple[str, ...] = ()

    @property
    def calls(self) -> int:
        """How often a step has it."""
        return max(1, len(self.layers))

    @property
    def values(self) -> int:
        """How many values of a channel one rank has."""
        return self.shape[0] * math.prod(self.shape[2:])


@dataclass(frozen=True, kw_only=True)
class Options:
    """See docs/bench.md.

    Raises:
        Unusable: a value out of range, or one that this machine has not.
    """

    shapes: tuple[tuple[int, ...], ...] = ()
    model: Named | None = None
    input: tuple[int, ...] | None = None
    data: Named | None = None
    batch_per_rank: int | None = None  # SAMPLES with a model
    dtype: str = "float32"
    channels_last: bool = False
    ranks: int = 2
    rounds: int = 30
    threads: int = 1
    device: str = "cpu"

    def __post_init__(self) -> None:
        for name, least in _LEAST.items():
            if (value := getattr(self, name)) is not None and value < least:
                raise Unusable(f"bench: expected {name} ≥ {least}, got {value}")
        if self.dtype not in DTYPES:
            raise Unusable(f"bench: expected dtype in {', '.join(DTYPES)}, got {self.dtype!r}")
        self._check_device()
        if self.model is None:
            self._check_shapes()
            return
        if self.batch_per_rank is None:
            object.__setattr__(self, "batch_per_rank", SAMPLES)
        if self.shapes:
            raise Unusable("bench: expected shapes or a model, got both")
        _ = self.as_check  # which refuses what it cannot call

    @property
    def as_check(self) -> CheckTask:
        """What makes the model and its input, as syncbn check takes it."""
        assert self.model is not None
        assert self.batch_per_rank is not None
        return CheckTask(
            factory=self.model,
            ranks=1,
            batch=self.batch_per_rank,
            input=self.input,
            data=self.data,
            dtype=self.dtype,
        )

    @property
    def cases(self) -> tuple[Case, ...]:
        """Those of the shapes, where there is no model."""
        layouts = _LAST_LAYOUT if self.channels_last else {}
        return tuple(
            Case(shape, self.dtype, layouts.get(len(shape), "contiguous"))
            for shape in self.shapes or SHAPES
        )

    def _check_shapes(self) -> None:
        given = (self.input, self.data, self.batch_per_rank)
        if any(each is not None for each in given):
            raise Unusable(
                "bench: expected input, data and batch-per-rank with a model, got none; add --model"
            )
        for shape in self.shapes:
            said = ",".join(map(str, shape))
            if not 2 <= len(shape) <= 5 or min(shape) < 1:
                raise Unusable(
                    f"bench: expected a shape of 2 to 5 sizes N,C,… of at least 1, got {said}"
                )
            if Case(shape).values < 2:
                raise Unusable(
                    "bench: expected more than one value per channel on each rank, which "
                    f"torch.nn.BatchNorm needs, got {said}"
                )
            if self.channels_last and len(shape) not in _LAST_LAYOUT:
                raise Unusable(
                    f"bench: expected shapes of 4 or 5 sizes for channels_last, got {said}"
                )

    def _check_device(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise Unusable(f"bench: expected device cpu or cuda, got {self.device!r}")
        gpus = torch.cuda.device_count()
        if self.device == "cuda" and not gpus:
            raise Unusable("bench: expected device cpu, got cuda: this torch sees no GPU")
        if self.device == "cuda" and self.ranks > gpus:
            raise Unusable(
                f"bench: expected at most {gpus} ranks on cuda, a GPU for each, got {self.ranks}; "
                f"take --ranks {gpus}, or --device cpu"
            )


def cores() -> int:
    """Of this machine, as far as this process may use them."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
