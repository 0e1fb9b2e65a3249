"""Batches without samples: how to make one, and which layers of a model cannot take it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
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


class EmptyBatchError(RuntimeError):
    """A layer cannot take a batch without samples."""


@contextmanager
def named_failures(model: nn.Module) -> Iterator[None]:
    """While open, errors of ``model``'s layers on empty input name the layer."""
    before = vars(model).get("forward")
    vars(model)["forward"] = Watched(model, model.forward)
    try:
        yield
    finally:
        del vars(model)["forward"]
        if before is not None:
            vars(model)["forward"] = before


class Watched:
    """A model's forward that watches its layers while it runs. Copies and pickles don't watch."""

    def __init__(self, model: nn.Module, forward: Callable[..., Any]) -> None:
        self.model, self.forward = model, forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return self.forward(*args, **kwargs)
        running = [("", self.model, (args, kwargs))]  # layers inside one another, innermost last
        closed = {
            part for layer in self.model.modules() if _closed(layer) for part in layer.modules()
        }
        with ExitStack() as hooks:
            for name, layer in self.model.named_modules():
                if layer is not self.model and layer not in closed:
                    _watch(name, layer, running, hooks)
            try:
                return self.forward(*args, **kwargs)
            except Exception as error:
                if any(tensor.size(0) == 0 for tensor in tensors(running[-1][-1])):
                    raise EmptyBatchError(_cannot(*running[-1], error)) from error
                raise

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        return MethodType(type(self.model).forward, memo[id(self.model)])

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.model, "forward")


def forget_original(replica: nn.Module) -> None:
    """Take from a shallow copy of a module what would run the module itself instead of the copy."""
    vars(replica).pop("_compiled_call_impl", None)
    if isinstance(vars(replica).get("forward"), Watched):
        del vars(replica)["forward"]


def _closed(layer: nn.Module) -> bool:
    """Whether hooks see nothing of what runs inside: it is compiled."""
    compiled = getattr(layer, "_compiled_call_impl", None) is not None
    return compiled or hasattr(layer, "_orig_mod") or isinstance(layer, torch.jit.ScriptModule)


def _watch(name: str, layer: nn.Module, running: list[Any], hooks: ExitStack) -> None:
    def enter(layer: nn.Module, args: Any, kwargs: Any) -> None:
        running.append((name, layer, (args, kwargs)))

    def leave(layer: nn.Module, args: Any, result: Any) -> None:
        _try_backward(layer, args, result)
        while running.pop()[1] is not layer:  # a layer whose error the model has caught
            pass

    hooks.enter_context(layer.register_forward_pre_hook(enter, with_kwargs=True))
    hooks.enter_context(layer.register_forward_hook(leave))


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


def _cannot(name: str, layer: nn.Module, inputs: Any, error: Exception) -> str:
    cls, shapes = type(layer), [str(tuple(x.shape)) for x in inputs[0] if isinstance(x, Tensor)]
    return (
        f"until_all_done: {name or 'the model'} ({cls.__module__}.{cls.__qualname__}) cannot take "
        f"a batch without samples: got input of shape {', '.join(shapes)}, and "
        f"{type(error).__name__}: {error}. Let it return a result for no samples (flatten(1) "
        "instead of view(N, -1), sums instead of means over samples), leave the layer out for "
        "empty input where it has no parameters, or give every rank as many batches"
    )
