"""Counts a model's forwards in training, and measures its layers in every so many of them."""

from __future__ import annotations

import time
import weakref
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn as nn

from ...tensors.recomputation import recomputing
from ...tensors.transforms import transforming
from .layers import Layer, home_of
from .measuring import Call, measure_call, plain_input

_KEPT = 100  # times of steps


class Hook:
    """A hook that copies and pickles of the model leave behind: theirs does nothing."""

    def __init__(self, call: Callable[..., None] | None = None) -> None:
        self._call = call

    def __call__(self, module: nn.Module, *rest: Any) -> None:
        if self._call is not None and not torch.compiler.is_compiling():
            self._call(module, *rest)

    def __reduce__(self) -> tuple[Any, ...]:
        return Hook, ()


class Observation(NamedTuple):
    """step: 1 for the first forward in training; calls: of each layer; device: of their input."""

    model: nn.Module
    step: int
    calls: list[list[Call]]
    device: torch.device


class Observer:
    """Calls ``observed`` at the end of the first and then of every ``every``th forward in training.

    Of the model alone hooks stay between those steps. Not counted: eval mode, a second forward of
    activation checkpointing, tracing, transforms of torch.func, the capture of a CUDA graph.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[Layer],
        every: int,
        observed: Callable[[Observation], None],
    ) -> None:
        self._model, self._layers, self._every = weakref.ref(model), layers, every
        self._observed = observed
        self._home = home_of(model)
        self.steps = 0
        self._began: float | None = None  # the last step, if it was not observed
        self._times: deque[float] = deque(maxlen=_KEPT)
        self._calls: list[list[Call]] | None = None  # while a step is observed
        self._device: torch.device | None = None
        self._hooks: list[Any] = []
        self._own_hooks = [
            model.register_forward_pre_hook(Hook(self._begin), with_kwargs=True),
            model.register_forward_hook(Hook(self._end)),
        ]

    @property
    def seconds(self) -> list[float]:
        """Of the last steps that were not observed, from the begin of one forward to the next."""
        return list(self._times)

    def close(self) -> None:
        self._stop()
        for hook in self._own_hooks:
            hook.remove()

    def _begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if model is not self._model() or not model.training or recomputing() or self._is_quiet():
            return
        self._stop()  # after a forward that failed
        now = time.perf_counter()
        if self._began is not None:
            self._times.append(now - self._began)
        due = self.steps % self._every == 0
        self._began = None if due else now
        self.steps += 1
        if due:
            self._start(model, args, kwargs)

    def _is_quiet(self) -> bool:
        tracing: bool = torch._C._is_tracing()
        cuda = self._home.type == "cuda"
        return tracing or transforming() or (cuda and torch.cuda.is_current_stream_capturing())

    def _start(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._calls, self._device = [[] for _ in self._layers], None
        for number, layer in enumerate(self._layers):
            module = layer.module()
            if module is model:  # whose hooks for this call are chosen already
                self._measure(number, model, args, kwargs)
            elif module is not None:
                hook = Hook(partial(self._measure, number))
                self._hooks.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def _measure(
        self, number: int, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        if self._calls is None or not layer.training or recomputing():
            return
        x = plain_input(layer, args, kwargs)
        if x is not None and self._device is None:
            self._device = x.device
        call = measure_call(layer, args, kwargs)
        if call is not None:
            self._calls[number].append(call)

    def _end(self, model: nn.Module, *_: Any) -> None:
        if self._calls is None or model is not self._model() or recomputing():
            return
        calls, device = self._calls, self._device or self._home
        self._stop()
        self._observed(Observation(model, self.steps, calls, device))

    def _stop(self) -> None:
        self._calls = None
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
