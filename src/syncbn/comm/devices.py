"""Headers of messages on devices, which nobody waits for: ranks compare them at a later call.

A frame (frames.py) is read before its content is used, which takes the CPU. On a device a few
numbers travel beside the content instead, and those of all ranks go on to the host's memory. They
are there by the time of one of the next calls, which raises DesyncError where they differ;
SYNCBN_COMPARE=at_once waits for them, to find the first call that differs.

A compiled graph and a captured one say nothing of themselves, in as many numbers: ranks that run
one exchange the same messages as ranks that don't.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from .base import described
from .frames import REMEDY, DesyncError, Received
from .headers import NAMED, NONE, SINGLE, WANTS, Caller, kind_of

if TYPE_CHECKING:
    from .framed import Framed

VARIABLE = "SYNCBN_COMPARE"
# Whether a gradient is wanted; what is called; the layer; _VALUES and how many values per channel a
# rank has, if fewer than 2, else 2. All but the first may say nothing.
_WORDS = 4
_VALUES = 2
_EXACT = 1 << 48  # a float64 holds all integers below
_NOTHING = 1  # who says this or less says nothing
_RANKS = 64  # of more, sums carry no headers
_KEPT = 1000  # messages whose headers have not come yet


class _Sent(NamedTuple):
    """A message: which call, in words, whose layer's; all ranks' headers (W, _WORDS) on the host
    once ``arrived``, a device's event, has taken place.
    """

    text: str
    layer: str
    heads: Tensor
    arrived: Any


class _Said(NamedTuple):
    """What a rank says of its call: all words of a header but the first."""

    text: str
    layer: str
    words: tuple[float, ...]


def gather(comm: Framed, tensor: Tensor, caller: Caller, flags: int) -> Received:
    """See :meth:`Framed.gather`. flags of the result: a tensor (W,)."""
    wants, content = float(flags & WANTS), tensor.reshape(-1)
    exact, silent = tensor.dtype == torch.float64, _is_silent()
    words = _WORDS if exact else 1  # other dtypes could not hold a header
    if silent or not exact:
        frame = pad(content, (words, 0), value=wants)
    else:
        later = _later(comm)
        said = later.say("all_gather", tensor, caller, flags)
        frame = torch.cat((_on(tensor.device, (wants, *said.words)), content))
    received = comm._beside(comm._send, frame, "all_gather", caller)
    if not silent and exact:
        later.watch(comm, received[:, :words], said)
    return Received(received[:, words:].reshape(-1, *tensor.shape), received[:, 0])


def reduce(comm: Framed, tensor: Tensor, caller: Caller) -> Tensor:
    """See :meth:`Framed.reduce`. Each rank adds its header to zeros of the others."""
    size, content = comm.size, tensor.reshape(-1)
    if tensor.dtype != torch.float64 or size > _RANKS:
        return comm._beside(comm._reduce, tensor.clone(), "all_reduce", caller)
    silent = _is_silent()
    if silent:
        frame = pad(content, (0, size * _WORDS))
    else:
        later = _later(comm)
        said = later.say("all_reduce", tensor, caller, 0)
        before, after = [0.0] * _WORDS * comm.rank, [0.0] * _WORDS * (size - comm.rank - 1)
        frame = torch.cat((content, _on(tensor.device, (*before, 0.0, *said.words, *after))))
    total = comm._beside(comm._reduce, frame, "all_reduce", caller)
    if not silent:
        later.watch(comm, total[len(content) :].view(size, _WORDS), said)
    return total[: len(content)].view(tensor.shape)


def _later(comm: Framed) -> Later:
    """A communicator's messages so far, of which those are compared whose headers have come."""
    frames = comm._frames
    if frames.later is None:
        frames.later = Later()
    frames.later.compare(comm)
    return frames.later


class Later:
    """The messages of one communicator on devices, as one of its ranks sees them."""

    def __init__(self) -> None:
        self._sent: deque[_Sent] = deque(maxlen=_KEPT)
        self._texts: dict[tuple[int, int], str] = {}

    def compare(self, comm: Framed, wait: bool = False) -> None:
        """Raise DesyncError where ranks' headers that have arrived differ; ValueError where all of
        them together have a single value per channel.
        """
        while self._sent:
            text, layer, heads, arrived = self._sent[0]
            if arrived is not None and not (wait or arrived.query()):
                return
            if arrived is not None:
                arrived.synchronize()
            self._sent.popleft()
            found = [tuple(map(int, head)) for head in heads.tolist()]
            if _differ(found):
                self._sent.clear()
                said = {rank: self._text(*head[1:3]) for rank, head in enumerate(found)}
                listed = "; ".join(f"rank {rank}: {each}" for rank, each in said.items())
                raise DesyncError(
                    f"{comm._name()}: ranks called different collectives on a device: {listed}, "
                    f"found after this rank's {text}; {VARIABLE}=at_once raises at the call "
                    f"itself; {REMEDY}",
                    layer,
                    said,
                )
            if _is_single(found):
                raise ValueError(
                    "Expected more than 1 value per channel when training, got 1 on all "
                    f"{comm.size} ranks together, in this rank's {text}; use a larger batch or "
                    f"call eval() on the layer ({VARIABLE}=at_once raises at the call itself)"
                )

    def say(self, operation: str, tensor: Tensor, caller: Caller, flags: int) -> _Said:
        kind = kind_of(described(operation, tensor), caller)
        digest = kind.digest % _EXACT
        layer = kind.layer % _EXACT if kind.layer & NAMED else 0
        if len(self._texts) > _KEPT:
            self._texts.clear()
        self._texts[digest, layer] = kind.text
        values = _VALUES + (0 if flags & NONE else 1 if flags & SINGLE else 2)
        return _Said(kind.text, caller.layer, (float(digest), float(layer), float(values)))

    def _text(self, digest: int, layer: int) -> str:
        """What a rank called, as far as this one has met it."""
        if digest <= _NOTHING:
            return "a compiled or captured call"
        return self._texts.get((digest, layer), "a call that this rank has not made yet")

    def watch(self, comm: Framed, heads: Tensor, say: _Said) -> None:
        host = torch.empty(heads.shape, dtype=heads.dtype, pin_memory=not heads.is_cpu)
        host.copy_(heads, non_blocking=True)
        arrived = None
        if not heads.is_cpu:
            arrived = torch.Event(heads.device)
            arrived.record(torch.accelerator.current_stream(heads.device))
        self._sent.append(_Sent(say.text, say.layer, host, arrived))
        if os.environ.get(VARIABLE) == "at_once":
            self.compare(comm, wait=True)


def _is_single(heads: Sequence[tuple[int, ...]]) -> bool:
    values = [head[3] - _VALUES for head in heads]
    return min(values) >= 0 and sum(values) == 1


def _on(device: torch.device, numbers: Sequence[float]) -> Tensor:
    """Numbers on a device, which are sent there from memory that need not be waited for."""
    host = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)


def _is_silent() -> bool:
    """Whether what runs now will run again without this code."""
    if torch.compiler.is_compiling():
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _differ(heads: Sequence[tuple[int, ...]]) -> bool:
    digests = {digest for _, digest, *_ in heads if digest > _NOTHING}
    layers = {layer for *_, layer, _ in heads if layer > _NOTHING}
    return len(digests) > 1 or len(layers) > 1
