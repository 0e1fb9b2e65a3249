"""What ranks said beside their messages on devices, and whether it agrees: found out later."""

from __future__ import annotations

import math
import os
from collections import deque
from collections.abc import Sequence
from contextlib import nullcontext
from itertools import islice
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .errors import REMEDY, DesyncError
from .headers import FOUND, NAMED, NONE, SINGLE, WANTS, Caller, Kind, may_follow
from .sums import Added, added_words
from .words import told

if TYPE_CHECKING:
    from .framed import Framed

VARIABLE = "SYNCBN_COMPARE"
TOGETHER = 8  # headers that go to the host in one copy: its cost is more than a message's own
# Of a header: whether a gradient is wanted; what is called; the layer; what the rank has. All but
# the first may say nothing, which is 0 or 1.
_NOTHING = 1
_EXACT = 1 << 48  # a float64 holds all integers below
_NAMED = _EXACT // 2  # a layer is a digest from here on, or a trail and a number
# What a rank has: how many values per channel, if fewer than 2, else 2; so much more than nothing
# to say; and whether it cannot take part in a backward that others want.
_HAS, _CANNOT = 2, 4
_BYTES = 1 << 22  # of messages whose headers wait: kept no longer where there are more
_KEPT = 1000  # copies that have not come yet, and texts


class Said(NamedTuple):
    """What a rank says of its call: in words; all words of a header but the first."""

    text: str
    layer: str
    words: tuple[float, ...]


class _Sent(NamedTuple):
    """What was said in messages, each of so many rows of headers, which are on the host together
    (*, WORDS), once ``arrived``, a device's event, has taken place.
    """

    said: Sequence[tuple[Said, int]]
    heads: Tensor
    arrived: Any


class Later:
    """The messages of one communicator on devices, as one of its ranks sees them."""

    def __init__(self) -> None:
        self._waiting: list[tuple[Said, Tensor]] = []  # headers that are on the device alone
        self._bytes = 0  # of the messages that they are part of
        self._stream: Any = None  # there
        self._sent: deque[_Sent] = deque(maxlen=_KEPT)
        self._texts: dict[tuple[float, ...], str] = {}

    def say(self, kind: Kind, caller: Caller, flags: int, added: bool) -> Said:
        """added: in a sum of all ranks' headers."""
        digest, layer = kind.digest % _EXACT, _layer(kind.layer)
        if len(self._texts) > _KEPT:
            self._texts.clear()
        self._texts[digest, layer] = kind.text
        values = 0 if flags & NONE else 1 if flags & SINGLE else 2
        follows = may_follow(flags | WANTS)
        if added:
            return Said(kind.text, caller.layer, added_words(kind, values, follows))
        has = _HAS + values + (0 if follows else _CANNOT)
        return Said(kind.text, caller.layer, (float(digest), float(layer), float(has)))

    def watch(self, comm: Framed, heads: Tensor, said: Said) -> None:
        """Keep all ranks' headers of a message for later; compare those that have come by now."""
        at_once = _compares_at_once()
        if not at_once:
            self.compare(comm)
        self._waiting.append((said, heads))
        self._bytes += heads.untyped_storage().nbytes()
        if at_once:
            self.fetch(heads.device)
            self.compare(comm, wait=True)

    def fetch(self, device: torch.device, at_least: int = 1) -> None:
        """Send so many headers or more to the host together, on the stream that their messages
        took: others than the current one has.
        """
        stream = None if device.type == "cpu" else torch.accelerator.current_stream(device)
        waiting = self._waiting
        full = self._bytes > _BYTES or len(waiting) >= at_least
        if waiting and (full or stream != self._stream):
            with self._stream or nullcontext():
                heads = torch.cat([heads for _, heads in waiting])
                host = torch.empty_like(heads, device="cpu", pin_memory=not heads.is_cpu)
                host.copy_(heads, non_blocking=True)
                arrived = None if self._stream is None else self._stream.record_event()
            said = [(each, len(heads)) for each, heads in waiting]
            self._sent.append(_Sent(said, host, arrived))
            waiting.clear()
            self._bytes = 0
        self._stream = stream

    def compare(self, comm: Framed, wait: bool = False) -> None:
        """Of all messages whose headers have come to the host, raise DesyncError where they
        differ, and ValueError where all ranks together have a single value per channel.
        """
        while self._sent:
            said, heads, arrived = self._sent[0]
            if arrived is not None and not (wait or arrived.query()):
                return
            if arrived is not None:
                arrived.synchronize()
            self._sent.popleft()
            rows = iter(heads.tolist())
            for each, count in said:
                found = [tuple(map(_number, head)) for head in islice(rows, count)]
                self._check(comm, each, found)

    def _check(self, comm: Framed, said: Said, found: Sequence[tuple[int, ...]]) -> None:
        added = Added(comm.size, *found[0]) if len(found) < comm.size else None
        if _differ(found) if added is None else added.differ():
            self._sent.clear()
            self._waiting.clear()
            self._bytes = 0
            texts = {} if added else {rank: self._text(*head) for rank, head in enumerate(found)}
            raise DesyncError(
                f"{comm._name()}: ranks called different collectives on a device: "
                f"{told(texts) or f'{comm.size} ranks, too many to name'}, "
                f"found after this rank's {said.text}; {VARIABLE}=at_once raises at the call "
                f"itself; {REMEDY}",
                said.layer,
                texts,
            )
        if _is_single(found) if added is None else added.is_single():
            raise ValueError(
                "Expected more than 1 value per channel when training, got 1 on all "
                f"{comm.size} ranks together, in this rank's {said.text}; use a larger batch or "
                f"call eval() on the layer ({VARIABLE}=at_once raises at the call itself)"
            )

    def _text(self, wants: int, digest: int, layer: int, has: int) -> str:
        """What a rank called, as far as this one has met it."""
        if digest <= _NOTHING:
            return "a compiled or captured call"
        text = self._texts.get((digest, layer), "a call that this rank has not made yet")
        cannot = ", gradients off" if has - _HAS >= _CANNOT else ""
        return text + (", gradients wanted" if wants else cannot)


def _number(word: float) -> int:
    """A word of a header; -1 for what none is, as where ranks' messages have mixed."""
    return int(word) if math.isfinite(word) else -1


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
    if any(word < 0 for head in heads for word in head):  # no headers at all
        return True
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
