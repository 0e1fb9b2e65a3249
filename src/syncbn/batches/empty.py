"""Batches without samples: how to make one, and which layers of a model cannot take it."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from types import MethodType
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor

from .nested import indivisible, parts, rebuilt, tensors


def without_samples(batch: Any) -> Any:
    """``batch`` with N = 0: every tensor (N, *) as (0, *), of its dtype and on its device.

    Containers (see :mod:`syncbn.batches.nested`) keep their types. A list or tuple of strings
    becomes empty; None, numbers, strings and tensors without dimensions stay.

    Raises TypeError for anything else, and for nested and compressed tensors and packed sequences.
    """
    values = parts(batch)
    if values is not None:
        texts = isinstance(batch, (tuple, list)) and not hasattr(batch, "_fields")
        if texts and all(isinstance(value, str) for value in values.values()):
            return rebuilt(batch, {})
        return rebuilt(batch, {key: without_samples(value) for key, value in values.items()})
    form = indivisible(batch)
    if isinstance(batch, Tensor) and form is None:
        return batch if batch.dim() == 0 else batch.new_empty((0, *batch.shape[1:]))
    if batch is None or isinstance(batch, (bool, int, float, complex, str, bytes)):
        return batch
    cls = type(batch)
    kind = f"a {form}" if form else f"{cls.__module__}.{cls.__qualname__}"
    raise TypeError(
        "until_all_done: expected batches of tensors in tuples, lists, mappings and dataclasses, "
        f"got {kind} among them; pass empty=, a function that makes a batch without samples of a "
        "batch, and count=, one that says how many samples a batch has"
    )


def samples_in(batch: Any) -> int:
    """N, the size of dimension 0 of every tensor in ``batch`` that has dimensions.

    Raises ValueError where they disagree, or where there is no such tensor.
    """
    sizes = {tensor.size(0) for tensor in tensors(batch)}
    if len(sizes) == 1:
        return sizes.pop()
    got = f"tensors of {sorted(sizes)} samples" if sizes else f"{type(batch).__name__} without one"
    raise ValueError(
        "until_all_done: expected a batch of tensors (N, *) with the same N everywhere, got "
        f"{got}; pass empty=, a function that makes a batch without samples of a batch, and "
        "count=, one that says how many samples a batch has"
    )


_changing = threading.Lock()  # of which models are watched


class EmptyBatchError(RuntimeError):
    """A layer cannot take a batch without samples."""


@contextmanager
def name_failing_layer(model: nn.Module) -> Iterator[None]:
    """While open, errors of ``model``'s layers on empty input name the layer.

    Contexts may end in any order: the last one to end leaves the model as it was.
    """
    with _changing:
        watched = vars(model).get("forward")
        if not isinstance(watched, Watched) or watched.model is not model:
            watched = vars(model)["forward"] = Watched(model)
        watched.contexts += 1
    try:
        yield
    finally:
        with _changing:
            watched.contexts -= 1
            if not watched.contexts and vars(model).get("forward") is watched:
                unwatch(model)


def own_forward(module: nn.Module) -> Any:
    """What this one module has instead of its class's forward, under a watch as without."""
    forward = vars(module).get("forward")
    if isinstance(forward, Watched):
        return forward.before
    of_the_class = isinstance(forward, MethodType) and forward.__func__ is type(module).forward
    return None if of_the_class else forward  # as copies and pickles of watched models have it


def unwatch(module: nn.Module) -> None:
    """Take the watch, or what a copy has of it, off a module."""
    if "forward" in vars(module):
        own = own_forward(module)
        del vars(module)["forward"]
        if own is not None:
            vars(module)["forward"] = own


def unwatch_copy(module: nn.Module) -> None:
    """Take off a copy what stands for the watch of its original, whose class it may lose."""
    forward = vars(module).get("forward")
    if not isinstance(forward, Watched) or forward.model is not module:
        unwatch(module)


def forget_original(replica: nn.Module) -> None:
    """Take from a shallow copy of a module what would run the module itself instead of the copy."""
    vars(replica).pop("_compiled_call_impl", None)
    unwatch(replica)


class Watched:
    """A model's forward that watches its layers while it runs. Copies and pickles don't watch."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.before, self.contexts = model, own_forward(model), 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        # Another tool may have put its own forward around this one, which then stays for ever.
        if torch.compiler.is_compiling() or not self.contexts:
            return self._forward(*args, **kwargs)
        running = _Running(self.model, (args, kwargs))
        unseen = {
            part for layer in self.model.modules() if closed(layer) for part in layer.modules()
        }
        with ExitStack() as hooks:
            for name, layer in self.model.named_modules():
                if layer is not self.model and layer not in unseen:
                    running.watch(name, layer, hooks)
            try:
                return self._forward(*args, **kwargs)
            except Exception as error:
                name, layer, inputs = running.innermost()
                if not any(tensor.size(0) == 0 for tensor in tensors(inputs)):
                    raise
                # A part of the model that is watched, too, has named the layer its own way.
                cause = error.__cause__ if isinstance(error, EmptyBatchError) else error
                raise EmptyBatchError(_cannot(name, layer, inputs, cause)) from cause

    def _forward(self, *args: Any, **kwargs: Any) -> Any:
        """Of the class that the model has now: convert may have changed it."""
        if self.before is not None:
            return self.before(*args, **kwargs)
        return type(self.model).forward(self.model, *args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        if self.before is not None:
            return partial, (self.before,)
        return getattr, (self.model, "forward")


class _Running:
    """The layers that run, inside one another, innermost last, in each thread.

    Hooks are the layers', and see what other calls of the model do in other threads.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self._thread = threading.get_ident()
        self._stacks = {self._thread: [("", model, inputs)]}

    def watch(self, name: str, watched: nn.Module, hooks: ExitStack) -> None:
        # Without kwargs from another thread's call when this one ends just then.
        def enter(layer: nn.Module, args: Any, kwargs: Any = None) -> None:
            thread = threading.get_ident()
            if thread == self._thread or layer is not watched:  # a replica, in its own thread
                self._stacks.setdefault(thread, []).append((name, layer, (args, kwargs)))

        def leave(layer: nn.Module, args: Any, result: Any) -> None:
            stack = self._stacks.get(threading.get_ident(), [])
            if any(entered is layer for _, entered, _ in stack):
                _try_backward(layer, args, result)
                while stack.pop()[1] is not layer:  # a layer whose error the model has caught
                    pass

        hooks.enter_context(watched.register_forward_pre_hook(enter, with_kwargs=True))
        hooks.enter_context(watched.register_forward_hook(leave))

    def innermost(self) -> tuple[str, nn.Module, Any]:
        """What failed: where replicas ran, the first that has not come to its end."""
        own, *others = self._stacks.values()
        return next((stack[-1] for stack in others if stack), own[-1])


def closed(layer: nn.Module) -> bool:
    """Whether hooks see nothing of what runs inside: it is compiled."""
    compiled = getattr(layer, "_compiled_call_impl", None) is not None
    return compiled or hasattr(layer, "_orig_mod") or isinstance(layer, torch.jit.ScriptModule)


def _try_backward(layer: nn.Module, inputs: tuple[Any, ...], result: Any) -> None:
    """Go backward through an empty result of one of torch's layers, so that it fails here if ever.

    Layers of others are left out, and what is inside a checkpoint: their backward may communicate.
    """
    if not torch.compiler.is_compiling() and _hooked():
        return
    torchs = type(layer).__module__.startswith("torch.nn.modules.")
    if not torchs or isinstance(layer, nn.SyncBatchNorm) or any(True for _ in layer.children()):
        return
    wanting = [x for x in inputs if isinstance(x, Tensor) and x.requires_grad]
    if wanting and isinstance(result, Tensor) and result.requires_grad and not result.numel():
        torch.autograd.grad(
            result, wanting, torch.empty_like(result), retain_graph=True, allow_unused=True
        )


def _hooked() -> bool:
    """Whether saved tensors go through hooks, as in activation checkpointing, which recomputes."""
    return torch._C._autograd._top_saved_tensors_default_hooks(True) is not None


def _cannot(name: str, layer: nn.Module, inputs: Any, error: Any) -> str:
    cls, shapes = type(layer), [str(tuple(x.shape)) for x in inputs[0] if isinstance(x, Tensor)]
    return (
        f"until_all_done: {name or 'the model'} ({cls.__module__}.{cls.__qualname__}) cannot take "
        f"a batch without samples: got input of shape {', '.join(shapes)}, and "
        f"{type(error).__name__}: {error}. Let it return a result for no samples (flatten(1) "
        "instead of view(N, -1), sums instead of means over samples), leave the layer out for "
        "empty input where it has no parameters, or give every rank as many batches"
    )
