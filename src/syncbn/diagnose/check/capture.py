"""What goes through every module of a model in one step: inputs, outputs and their gradients."""

from __future__ import annotations

import functools
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from ...batches.nested import leaves
from ...tensors.recomputation import recomputing

# What is compared of large tensors, lest those of all layers fill memory: places of each channel of
# a sample, and values of a parameter.
_PLACES, _VALUES = 64, 16_384
_HALF = (torch.float16, torch.bfloat16)


def thinned(tensor: Tensor) -> Tensor:
    """A copy: where a channel has many places, evenly spread ones of them.

    They are chosen in dimensions from the third on, by the sizes of those alone, so that every rank
    and one process choose the same, whichever of the first two dimensions is that of samples.
    """
    tensor = tensor.detach()
    kept = tensor
    most = round(_PLACES ** (1 / max(1, tensor.dim() - 2)))
    if tensor.shape[2:].numel() > _PLACES:
        for dim in range(2, tensor.dim()):
            if tensor.shape[dim] > most:
                kept = kept.index_select(dim, _places(tensor.shape[dim], most))
    return kept.clone() if kept is tensor else kept


def thinned_parameter(tensor: Tensor) -> Tensor:
    """The same for what every rank has whole."""
    flat = tensor.detach().flatten()
    return flat[_places(len(flat), _VALUES)] if len(flat) > _VALUES else flat.clone()


@functools.cache
def _places(size: int, count: int) -> Tensor:
    # Not by torch's numbers, of whose use a model is asked while this runs.
    return torch.tensor(sorted(random.Random(size).sample(range(size), count)))


def _numbers(obj: Any) -> list[Tensor]:
    return [
        leaf
        for leaf in leaves(obj)
        if isinstance(leaf, Tensor)
        and (leaf.is_floating_point() or leaf.is_complex())
        and leaf.layout is torch.strided
        and not leaf.is_nested
    ]


class Capture:
    """One step's calls of modules, in the order in which they ended.

    ``stack`` holds the names of the modules that are running: after an error, where it came from.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.stack: list[dict[str, Any]] = []
        self.events: list[dict[str, Any]] = []
        self._calls: Counter[str] = Counter()
        self._gradients = 0

    @property
    def running(self) -> list[str]:
        """Names, from the model itself to the innermost."""
        return [event["name"] for event in self.stack]

    @contextmanager
    def watching(self) -> Iterator[Capture]:
        """Hooks on every module; not under their errors, whose place is to stay known."""
        handles = []
        for name, module in self.model.named_modules():
            handles += [
                module.register_forward_pre_hook(self._entering(name), with_kwargs=True),
                module.register_forward_hook(self._leaving(name), with_kwargs=True),
            ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()

    def _entering(self, name: str) -> Any:
        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            if recomputing():
                return
            parent = self.stack[-1] if self.stack else None
            event = {
                "name": name,
                "call": self._calls[name],
                "parents": [] if parent is None else [*parent["parents"], self._key(parent)],
                "training": module.training,
                "inputs": [thinned(tensor) for tensor in _numbers((args, kwargs))],
            }
            self._calls[name] += 1
            self.stack.append(event)

        return enter

    @staticmethod
    def _key(event: dict[str, Any]) -> list[Any]:
        return [event["name"], event["call"]]

    def _leaving(self, name: str) -> Any:
        def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
            if recomputing() or name not in self.running:
                return
            event = self.stack.pop()
            while event["name"] != name:  # it raised, and somebody caught that
                event = self.stack.pop()
            tensors = _numbers(output)
            event["outputs"] = [thinned(tensor) for tensor in tensors]
            event["half"] = any(tensor.dtype in _HALF for tensor in tensors)
            event["gradients"], event["gradient_order"] = [None] * len(tensors), -1
            for place, tensor in enumerate(tensors):
                if tensor.requires_grad:
                    tensor.register_hook(  # type: ignore[no-untyped-call]
                        self._gradient_hook(event, place)
                    )
            self.events.append(event)

        return leave

    def _gradient_hook(self, event: dict[str, Any], place: int) -> Any:
        def keep(gradient: Tensor | None) -> None:
            if gradient is None:  # of an output that DistributedDataParallel hands on, unused
                return
            event["gradients"][place] = thinned(gradient)
            self._gradients += 1
            event["gradient_order"] = self._gradients

        return keep

    def save(self, path: Path, *, loss: Tensor, **more: Any) -> None:
        """Write the step to a file of tensors and plain data. After the optimizer's step."""
        named = dict(self.model.named_parameters())
        content = {
            "events": self.events,
            "loss": loss.detach(),
            "weight_gradients": {
                name: None if weight.grad is None else thinned_parameter(weight.grad)
                for name, weight in named.items()
            },
            "weights": {name: thinned_parameter(weight) for name, weight in named.items()},
            "statistics": {
                name: thinned_parameter(buffer)
                for name, buffer in self.model.named_buffers()
                if buffer.is_floating_point() or name.endswith("num_batches_tracked")
            },
            **more,
        }
        partial = path.with_suffix(".part")
        torch.save(content, partial)
        partial.rename(path)
