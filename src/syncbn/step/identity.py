"""Which layer a call is of, in words and in what ranks compare.

A layer that convert() met is known by its name in that model; another by the one that it has in the
model that first runs it. A layer that runs by itself has a number: processes that make the same
layers in the same order give them the same ones.
"""

from __future__ import annotations

import itertools
import re
import sys
import weakref
from collections.abc import Iterator
from types import FrameType
from typing import Any, cast
from zlib import crc32

import torch
import torch.nn as nn
from torch.utils._mode_utils import no_dispatch

from ..comm import Caller, Communicator, Threads, know_layers


class Counter:
    """Which layers have been made so far, in this process or on one communicator of it.

    trail: their kinds, in 32 bits.
    """

    def __init__(self) -> None:
        self.made = self.trail = 0

    def count(self, layer: nn.Module) -> int:
        kind = f"{type(layer).__name__} {vars(layer).get('num_features')}"
        self.made, self.trail = self.made + 1, crc32(kind.encode(), self.trail)
        return self.made


_process = Counter()
_wrappers = ("syncbn", "torch.nn.parallel", "torch.distributed", "torch._dynamo")


class Number:
    """The place of a layer among those that a counter has counted."""

    def __init__(self, counter: Counter, layer: nn.Module) -> None:
        self.counter, self.value = counter, counter.count(layer)
        # When it first speaks: its name in the model that runs it, and the counter's trail, as
        # what a process makes later says nothing of this number.
        self.name, self.trail = "", 0
        self.shown = ""  # the name that this process alone shows: see name_in_model


_NAMED = re.compile(r"; in layer '[^']*'$")
_tokens = itertools.count(1)
_layers: weakref.WeakValueDictionary[int, nn.Module] = weakref.WeakValueDictionary()


def take_number(layer: nn.Module) -> None:
    """Give a layer a number, unless it is known by something; and a token for graphs."""
    if "_identity" not in vars(layer):
        vars(layer)["_identity"] = Number(_counter_of(getattr(layer, "process_group", None)), layer)
    if "_token" not in vars(layer):
        number = next(_tokens)
        # A plain tensor of this process, in whatever mode or transform the model is made.
        with no_dispatch(), torch.inference_mode(False), torch._C._DisableFuncTorch():
            vars(layer)["_token"] = torch.tensor(number, device="cpu")
        _layers[number] = layer


def _caller_of_token(number: int, comm: Communicator) -> Caller:
    layer = _layers.get(number)
    return Caller() if layer is None else caller_of(layer, comm)


know_layers(_caller_of_token)


def take_name(layer: nn.Module, name: str) -> None:
    """Let a layer be known by its name in a model. It has none where it is the model itself.

    A name in a part of the model that it is known in already says less.
    """
    known = vars(layer).get("_identity", "")
    known = known if isinstance(known, str) else ""
    if name and known != name and not known.endswith(f".{name}"):
        vars(layer)["_identity"] = name
    take_number(layer)


def forget(layer: nn.Module) -> None:
    """Undo :func:`take_name` and :func:`take_number`."""
    for attribute in ("_identity", "_token"):
        vars(layer).pop(attribute, None)


def identity_of(layer: nn.Module | None) -> str:
    """A layer's name, or class and number. None: a call of sync_batch_norm without a layer."""
    return caller_of(layer, None).layer


def _counter_of(group: Any) -> Counter:
    """Ranks that are threads share their process's layers, but not their communicators."""
    if isinstance(group, Communicator):
        return cast(Counter, vars(group).setdefault("_layers", Counter()))
    return _process


def caller_of(layer: nn.Module | None, comm: Communicator | None) -> Caller:
    """Who calls, but not yet what for."""
    if layer is None:
        return Caller(layer="sync_batch_norm", named=True)
    take_number(layer)  # one that became ours by hand
    found = vars(layer)["_identity"]
    if isinstance(found, str):
        return Caller(layer=found, named=True)
    if comm is not None and not found.trail:
        found.trail = found.counter.trail
        _find_names_in_model(layer)
    name = found.name or f"{type(layer).__name__} {found.value}"
    if isinstance(comm, Threads) and found.counter is not _counter_of(comm):
        return Caller(layer=found.name or type(layer).__name__, found=bool(found.name))
    return Caller(layer=name, found=bool(found.name), number=found.value, trail=found.trail)


def name_in_model(layer: nn.Module | None) -> str:
    """A layer's name in the model that it is known in or that runs it now; "" where there is none.

    For this process's eyes: what ranks compare stays what it is.
    """
    found: Number | str = vars(layer).get("_identity", "") if layer is not None else ""
    if isinstance(found, str) or layer is None:
        return found if isinstance(found, str) else ""
    if not (found.name or found.shown):
        for known, name in _numbers_in_running_model(layer):
            known.shown = known.shown or name
    return found.name or found.shown


def name_layer(error: Exception, name: str) -> None:
    """Let an error's words end with a layer's name, unless they have it or there is none."""
    words = error.args[0] if error.args else None  # MPI's are numbers
    if not (name and isinstance(words, str)) or _NAMED.search(words):
        return
    if f"layer {name!r}" not in words:
        error.args = (f"{words}; in layer {name!r}", *error.args[1:])


def _find_names_in_model(layer: nn.Module) -> None:
    """Name the layers of the outermost module that is running now and that has this one.

    It may be part of another on some ranks, to log for example: comm/frames.py takes care of that.
    """
    for known, name in _numbers_in_running_model(layer):
        known.name = known.name or name


def _numbers_in_running_model(layer: nn.Module) -> Iterator[tuple[Number, str]]:
    frame: FrameType | None = sys._getframe()
    outermost = None
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__:
            module = frame.f_locals["self"]
            wraps = type(module).__module__.startswith(_wrappers)
            if not wraps and any(part is layer for part in module.modules()):
                outermost = module
        frame = frame.f_back
    for name, part in outermost.named_modules() if outermost is not None else ():
        known = vars(part).get("_identity")
        if isinstance(known, Number):
            yield known, name
