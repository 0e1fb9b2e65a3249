"""Headers of messages on devices, which nobody waits for: ranks compare them at a later call.

A frame (frames.py) is read before its content is used, which takes the CPU. On a device a few
numbers travel beside the content instead, and those of all ranks go on to the host's memory. They
are there by the time of one of the next calls, which raises DesyncError where they differ. The very
next one does so once it has sent its own message, as others may not know yet and wait for it.
SYNCBN_COMPARE=at_once waits for them, to find the first call that differs, on all ranks alike.
Layers are compared by the names that convert() gave them, or by their numbers.

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
from .headers import FOUND, MAY, NAMED, NONE, SINGLE, WANTS, Caller, kind_of, may_follow

if TYPE_CHECKING:
    from .framed import Framed

VARIABLE = "SYNCBN_COMPARE"
# Of a header: whether a gradient is wanted; what is called; the layer; what the rank has. All but
# the first may say nothing, which is 0 or 1.
_WORDS = 4
_NOTHING = 1
_EXACT = 1 << 48  # a float64 holds all integers below
_NAMED = _EXACT // 2  # a layer is a digest from here on, or a trail and a number
# What a rank has: how many values per channel, if fewer than 2, else 2; so much more than nothing
# to say; and whether it cannot take part in a backward that others want.
_HAS, _CANNOT = 2, 4
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
    exact, silent = tensor.dtype == torch.float64, _is_silent(tensor)
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
    silent = _is_silent(tensor)
    if silent:
        frame = pad(content, (0, size * _WORDS))
    else:
        later = _later(comm)
        said = later.say("all_reduce", tensor, caller, MAY)
        before, after = [0.0] * _WORDS * comm.rank, [0.0] * _WORDS * (size - comm.rank - 1)
        frame = torch.cat((content, _on(tensor.device, (*before, 0.0, *said.words, *after))))
    total = comm._beside(comm._reduce, frame, "all_reduce", caller)
    if not silent:
        later.watch(comm, total[len(content) :].view(size, _WORDS), said)
    return total[: len(content)].view(tensor.shape)


def _later(comm: Framed) -> Later:
    """A communicator's messages so far, of which all but the last are compared."""
    frames = comm._frames
    if frames.later is None:
        frames.later = Later()
    frames.later.compare(comm, leave=1)
    return frames.later


class Later:
    """The messages of one communicator on devices, as one of its ranks sees them."""

    def __init__(self) -> None:
        self._sent: deque[_Sent] = deque(maxlen=_KEPT)
        self._texts: dict[tuple[int, int], str] = {}

    def compare(self, comm: Framed, leave: int = 0, wait: bool = False) -> None:
        """Of all messages but the last ``leave``, once headers have come, raise DesyncError where
        they differ, and ValueError where all ranks together have a single value per channel.
        """
        while len(self._sent) > leave:
            text, layer, heads, arrived = self._sent[0]
            if arrived is not None and not (wait or arrived.query()):
                return
            if arrived is not None:
                arrived.synchronize()
            self._sent.popleft()
            found = [tuple(map(int, head)) for head in heads.tolist()]
            if _differ(found):
                self._sent.clear()
                said = {rank: self._text(*head) for rank, head in enumerate(found)}
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
        layer = _layer(kind.layer)
        if len(self._texts) > _KEPT:
            self._texts.clear()
        self._texts[digest, layer] = kind.text
        has = _HAS + (0 if flags & NONE else 1 if flags & SINGLE else 2)
        has += 0 if may_follow(flags | WANTS) else _CANNOT
        return _Said(kind.text, caller.layer, (float(digest), float(layer), float(has)))

    def _text(self, wants: int, digest: int, layer: int, has: int) -> str:
        """What a rank called, as far as this one has met it."""
        if digest <= _NOTHING:
            return "a compiled or captured call"
        text = self._texts.get((digest, layer), "a call that this rank has not made yet")
        cannot = ", gradients off" if has - _HAS >= _CANNOT else ""
        return text + (", gradients wanted" if wants else cannot)

    def watch(self, comm: Framed, heads: Tensor, say: _Said) -> None:
        """Keep all ranks' headers of a message for later; compare those that have come by now."""
        host = torch.empty(heads.shape, dtype=heads.dtype, pin_memory=not heads.is_cpu)
        host.copy_(heads, non_blocking=True)
        arrived = None
        if not heads.is_cpu:
            arrived = torch.Event(heads.device)
            arrived.record(torch.accelerator.current_stream(heads.device))
        at_once = _compares_at_once()
        if not at_once:
            self.compare(comm)
        self._sent.append(_Sent(say.text, say.layer, host, arrived))
        if at_once:
            self.compare(comm, wait=True)


def _on(device: torch.device, numbers: Sequence[float]) -> Tensor:
    """Numbers on a device, which are sent there from memory that need not be waited for."""
    host = torch.tensor(numbers, dtype=torch.float64, device="cpu")
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)


def _is_silent(tensor: Tensor) -> bool:
    """Whether what runs now will run again without this code: in a graph."""
    if torch.compiler.is_compiling():
        return True
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def _compares_at_once() -> bool:
    told = os.environ.get(VARIABLE, "")
    if told not in ("", "at_once"):
        raise ValueError(
            f"{VARIABLE}: expected at_once, got {told!r}; leave it unset to compare ranks' calls "
            "on devices without waiting for them"
        )
    return told == "at_once"


def _layer(known: int) -> int:
    """The layer of a header (headers.py) in fewer bits; nothing for a name that was found, which
    may be part of another one on other ranks.
    """
    if known & NAMED:
        return _NAMED + known % _NAMED
    number, trail = known >> 32, known % (1 << 32)
    return 0 if known & FOUND else (trail % (1 << 23)) << 24 | number % (1 << 24)


def _differ(heads: Sequence[tuple[int, ...]]) -> bool:
    """As :func:`headers.agree` has it."""
    digests = {digest for _, digest, *_ in heads if digest > _NOTHING}
    layers = {layer for *_, layer, _ in heads if layer > _NOTHING}
    if len(digests) > 1 or (len(layers) > 1 and max(layers) >= _NAMED):
        return True
    if len({layer >> 24 for layer in layers}) < len(layers):  # numbers that count the same layers
        return True
    cannot = any(has - _HAS >= _CANNOT for *_, has in heads)
    return cannot and any(wants for wants, *_ in heads)


def _is_single(heads: Sequence[tuple[int, ...]]) -> bool:
    values = [(head[3] - _HAS) % _CANNOT for head in heads]
    return min(head[3] for head in heads) >= _HAS and sum(values) == 1
