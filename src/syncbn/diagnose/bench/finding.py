"""Which tensors the batch norms of a user's model get: found by one forward, in its own process."""

from __future__ import annotations

import traceback
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ...batches.nested import mapped
from ...launch import joined
from ...models.registry import is_candidate
from ..check import build
from ..check.options import Unusable, spoken
from .options import LAYOUTS, Case, Options

_PATIENCE = 600.0  # seconds, of a group of one


@dataclass(frozen=True)
class Found:
    """cases: one for each tensor, in the order of the forward; notes: on what was left out."""

    cases: tuple[Case, ...]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Refused:
    """Why the model cannot be measured, and the traceback where its own code raised."""

    text: str
    trace: str = ""


def run_rank(
    rank: int, options: Options, folder: Path, _: Callable[[Any], None]
) -> Found | Refused:
    """In a process of its own: whatever a factory does to it, no measurement sees."""
    with joined(rank, 1, folder / "rendezvous", timeout=_PATIENCE):
        try:
            return found(options)
        except Unusable as error:
            return Refused(str(error))
        except (Exception, SystemExit) as error:
            what = " ".join(str(error).split())
            return Refused(
                f"bench: model {spoken(options.model)} raised {type(error).__name__}: {what}",
                traceback.format_exc(),
            )


def found(options: Options) -> Found:
    """The cases of the model's layers that a training step normalises by their batch.

    The layers themselves are in eval mode while they are found: they refuse no small batch then,
    and send no message.
    """
    task = options.as_check
    model = build.model_of(task)
    named = {name: layer for name, layer in model.named_modules() if is_candidate(layer)}
    if not named:
        raise Unusable(
            f"bench: expected a model with batch norms, got none in {spoken(options.model)}; give "
            "shapes (--shape) to measure the layer without a model"
        )
    device = torch.device(options.device)
    model.train().to(device)
    inputs, _ = build.batch_of(task, 0)
    inputs = mapped(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, inputs)
    if options.channels_last:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        inputs = mapped(_channels_last, inputs)
    training = {name: layer for name, layer in named.items() if layer.training}
    cases = _grouped(_seen(model, training, inputs))
    fit = tuple(case for case in cases if case.values > 1)
    notes = tuple(
        f"left out: {', '.join(case.layers)}, with one value per channel on each rank, which "
        "torch.nn.BatchNorm refuses"
        for case in cases
        if case.values == 1
    )
    if not fit:
        raise Unusable(
            f"bench: expected batch norms that a forward in training mode calls, got none of the "
            f"{len(named)} in {spoken(options.model)}; {'; '.join(notes) or 'are all frozen?'}"
        )
    return Found(fit, notes)


def _channels_last(leaf: Any) -> Any:
    four = isinstance(leaf, Tensor) and leaf.dim() == 4
    return leaf.contiguous(memory_format=torch.channels_last) if four else leaf


def _seen(model: nn.Module, layers: dict[str, nn.Module], inputs: Any) -> list[tuple[str, Case]]:
    seen: list[tuple[str, Case]] = []

    def watching(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = args[0] if args else kwargs.get("input")
            if isinstance(x, Tensor) and 2 <= x.dim() <= 5 and x.numel():
                seen.append((name, _case_of(x)))

        return hook

    with ExitStack() as hooks:
        for name, layer in layers.items():
            layer.eval()
            handle = layer.register_forward_pre_hook(watching(name), with_kwargs=True)
            hooks.callback(handle.remove)
        with torch.no_grad():
            build.called(model, inputs)
    return seen


def _case_of(x: Tensor) -> Case:
    layout = "contiguous"
    if not x.is_contiguous():
        layouts = {4: "channels_last", 5: "channels_last_3d"}
        last = layouts.get(x.dim())
        if last and x.is_contiguous(memory_format=LAYOUTS[last]):
            layout = last
    return Case(tuple(x.shape), str(x.dtype).removeprefix("torch."), layout)


def _grouped(seen: list[tuple[str, Case]]) -> list[Case]:
    """Equal tensors are measured once."""
    names: dict[Case, list[str]] = {}
    for name, case in seen:
        names.setdefault(case, []).append(name)
    return [
        Case(case.shape, case.dtype, case.layout, tuple(layers)) for case, layers in names.items()
    ]
