"""The user's own objects, in a rank: the model, its batches and its loss."""

from __future__ import annotations

import copy
import importlib
import random
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn as nn
from torch import Tensor
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parameter import is_lazy

from ...batches.nested import indivisible, leaves, mapped, tensors
from ...comm import LOCAL
from ...layers.modules import SyncBatchNorm
from ...models.convert import convert
from ...models.revert import revert
from ...tensors.recomputation import recomputing
from .options import DTYPES, Named, Task, Unusable, spoken

Batch = tuple[Any, Any]  # what the model is called with, and what the loss is given besides


def found(what: str, named: Named) -> Callable[..., Any]:
    """What ``package.module:name`` or ``folder/file.py:name`` stands for."""
    if not isinstance(named, str):
        return named
    module_name, _, path = named.partition(":")
    if module_name.endswith(".py"):
        module_name = _importable(what, named, Path(module_name))
    try:
        thing: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise  # something that the module itself imports
        raise Unusable(f"{what} {named}: no module named {error.name!r}") from None
    for name in path.split("."):
        if not hasattr(thing, name):
            raise Unusable(f"{what} {named}: {module_name} has no {path!r}")
        thing = getattr(thing, name)
    if not callable(thing):
        raise Unusable(f"{what} {named}: expected a function, got {type(thing).__name__}")
    return thing  # type: ignore[no-any-return]


def _importable(what: str, named: str, file: Path) -> str:
    """The module's name, once its folder is where Python looks for it, as for a script's own."""
    if not file.is_file():
        raise Unusable(f"{what} {named}: no file {str(file)!r}")
    if (folder := str(file.resolve().parent)) not in sys.path:
        sys.path.insert(0, folder)
    return file.stem


def seed(number: int) -> None:
    """Every source of random numbers that models use."""
    torch.manual_seed(number)
    random.seed(number)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(number % 2**32)


def model_of(task: Task) -> nn.Module:
    """What the factory makes, in the dtype of the check, lazy layers with their sizes."""
    if task.dtype in ("float64", "float32"):
        torch.set_default_dtype(DTYPES[task.dtype])  # of what models make themselves, masks, say
    seed(task.seed)
    model: Any = found("factory", task.factory)()
    if not isinstance(model, nn.Module):
        raise Unusable(
            f"factory {spoken(task.factory)}: expected a torch.nn.Module, got "
            f"{type(model).__name__}"
        )
    if isinstance(model, DistributedDataParallel):
        model = model.module
    model.to(DTYPES[task.dtype])
    if any(map(is_lazy, model.parameters())):
        _materialise(model, batch_of(task, 0)[0])
    made: nn.Module = model
    return made


def _materialise(model: nn.Module, inputs: Any) -> None:
    modes = modes_of(model)
    model.eval()
    with torch.no_grad():
        called(model, inputs)
    set_modes(model, modes)


def modes_of(model: nn.Module) -> dict[str, bool]:
    """Which modules are in training mode."""
    return {name: module.training for name, module in model.named_modules()}


def set_modes(model: nn.Module, modes: dict[str, bool]) -> None:
    """The inverse of :func:`modes_of`."""
    for name, module in model.named_modules():
        module.training = modes[name]


def localised(model: nn.Module) -> nn.Module:
    """The model as a training loop in one process has it, in place.

    Its batch norms are torch's, normalise what they are given, move their running statistics once
    also under checkpointing, and are in training mode, unless the model's own train() keeps them
    in eval mode. All else is as the factory left it.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # layers that revert leaves alone are local below
        revert(model)
        convert(model, LOCAL, where=lambda _, layer: isinstance(layer, nn.SyncBatchNorm))
    for layer in model.modules():
        if isinstance(layer, SyncBatchNorm):
            layer.process_group = LOCAL
    modes = modes_of(model)
    model.train()
    layers = {n: layer for n, layer in model.named_modules() if isinstance(layer, _BatchNorm)}
    for layer in layers.values():
        if not isinstance(layer, SyncBatchNorm):  # which does so by itself
            _move_once(layer)
    set_modes(model, modes | {n: on for n, on in modes_of(model).items() if n in layers})
    return model


def _move_once(layer: _BatchNorm) -> None:
    """A checkpoint's second forward must not move the running statistics again."""
    kept: dict[str, Tensor] = {}

    def before(layer: nn.Module, _: Any) -> None:
        if recomputing():
            kept.update((name, buffer.clone()) for name, buffer in layer.named_buffers())

    def after(layer: nn.Module, *_: Any) -> None:
        for name, buffer in layer.named_buffers():
            if name in kept:
                buffer.data.copy_(kept.pop(name))  # not seen by autograd, which has saved it

    layer.register_forward_pre_hook(before)
    layer.register_forward_hook(after)


def batch_of(task: Task, step: int) -> Batch:
    """The whole batch of a step: floating tensors in the dtype of the check."""
    seed(task.seed + 1 + step)
    if task.data is None:
        assert task.input is not None
        return torch.randn(task.batch, *task.input, dtype=torch.float64).to(DTYPES[task.dtype]), ()
    given = found("data", task.data)(task.batch)
    name = f"data {spoken(task.data)}"
    for leaf in leaves(given):
        if what := indivisible(leaf):
            raise Unusable(f"{name}: expected tensors that can be split over ranks, got a {what}")
    if not any(len(tensor) == task.batch for tensor in tensors(given)):
        raise Unusable(f"{name}: expected tensors of {task.batch} samples, got none")
    given = mapped(lambda leaf: _cast(leaf, DTYPES[task.dtype]), given)
    if task.loss is None:
        return given, ()
    if not (isinstance(given, (tuple, list)) and len(given) == 2):
        raise Unusable(f"{name}: with a loss expected (inputs, target), got {type(given).__name__}")
    return given[0], (given[1],)


def share_of(batch: Batch, task: Task, part: slice) -> Batch:
    """The part of every tensor that has one row for each sample; all else as it is."""

    def cut(leaf: Any) -> Any:
        whole = isinstance(leaf, Tensor) and leaf.dim() > 0 and len(leaf) == task.batch
        return leaf[part] if whole else leaf

    inputs, target = batch
    return mapped(cut, inputs), mapped(cut, target)


def _cast(leaf: Any, dtype: torch.dtype) -> Any:
    floating = isinstance(leaf, Tensor) and leaf.is_floating_point()
    return leaf.to(dtype) if floating else copy.copy(leaf)


def called(model: nn.Module, inputs: Any) -> Any:
    """A dict goes by keyword, a tuple or list by position."""
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def loss_of(task: Task, output: Any, target: Any, part: slice) -> Tensor:
    """A mean over samples: the user's, the model's own, or a projection of all its outputs."""
    if task.loss is not None:
        loss = found("loss", task.loss)(output, *target)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            got = tuple(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise Unusable(f"loss {spoken(task.loss)}: expected a tensor of one number, got {got}")
        return loss.reshape(())
    own = output.get("loss") if hasattr(output, "get") else None
    if isinstance(own, Tensor) and own.numel() == 1:
        return own.reshape(())
    return _projection(task, output, part)


def _projection(task: Task, output: Any, part: slice) -> Tensor:
    """Σ w·y / √(values of a sample), a mean over samples; w is fixed and differs between samples.

    Were w the same for all samples, its gradient through a batch norm would be 0.
    """
    count = part.stop - part.start
    total = torch.zeros((), dtype=torch.float64)
    for place, tensor in enumerate(tensors(output)):
        if not tensor.is_floating_point() or not tensor.numel():
            continue
        generator = torch.Generator().manual_seed(task.seed + place)
        samples = task.batch if len(tensor) == count else 1
        weights = torch.randn(samples, *tensor.shape[1:], generator=generator, dtype=torch.float64)
        weights = weights[part] if samples > 1 else weights
        total = total + (weights * tensor.double()).sum() / (
            len(tensor) * weights[0].numel() ** 0.5
        )
    return total
