"""What stands in a frame's header, and when headers agree."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

VERSION = 1  # of the protocol; ranks with another one are refused
# Flags: wants a gradient; could take part in a backward if another rank does; has no value per
# channel, or a single one.
WANTS, MAY, NONE, SINGLE = 1, 2, 4, 8
Head = tuple[int, ...]  # version and flags, what is called, the call's number, the layer
NAMED, FOUND = 1 << 62, 1 << 61  # the layer is a digest of its name


class Caller(NamedTuple):
    """Who calls, and for what: ranks must agree in all of it.

    layer: in words; "" where it is not known, as while a graph is traced.
    named: by a name that is the same on all ranks. found: by its name in the model that runs it,
    which may be part of another model on some ranks.
    number, trail: for one that has no name: which one it is of those that its process
    made, and what those were so far, in 32 bits. Numbers of processes that made other layers mean
    nothing to each other.
    """

    direction: str = ""
    layer: str = ""
    channels: int = 0
    reproducible: bool = False
    named: bool = False
    found: bool = False
    number: int = 0
    trail: int = 0

    def __str__(self) -> str:
        if not self.direction:
            return ""
        channels = f" ({self.channels} channels)" if self.channels else ""
        how = ", reproducible" if self.reproducible else ""
        who = f"layer '{self.layer}'" if self.layer else "a compiled layer"
        return f", {self.direction} of {who}{channels}{how}"


NOBODY = Caller()


class Kind(NamedTuple):
    """A kind of call: its words; what stands for them and for the layer in headers, and for both
    in sums of headers (sums.py).
    """

    text: str
    digest: int
    layer: int
    both: int


def kind_of(told: str, caller: Caller) -> Kind:
    """The kind of a call that errors describe so."""
    what = caller._replace(layer="", named=False, found=False, number=0, trail=0)
    layer = caller.number << 32 | caller.trail
    if caller.named or caller.found:
        layer = _digest(caller.layer) | (NAMED if caller.named else FOUND)
    digest = _digest(f"{told} {what}")
    return Kind(f"{told}{caller}", digest, layer, _digest(f"{VERSION} {digest} {layer}"))


def may_be_parts(layers: Sequence[int]) -> bool:
    """Whether these layers of headers differ by names that were found alone."""
    known = {layer for layer in layers if layer}
    return len(known) > 1 and all(layer & FOUND for layer in known)


def may_follow(flags: int) -> bool:
    """Whether a rank that says so could take part in the backward that it wants."""
    return bool(flags & MAY or not flags & WANTS)


def agree(heads: Sequence[Head]) -> bool:
    """Whether ranks, of which these are the headers, make the same call."""
    first = heads[0]
    if all(head == first for head in heads):
        return may_follow(first[0])
    if any(head[1] != first[1] or head[0] >> 32 != first[0] >> 32 for head in heads):
        return False
    layers = {head[3] for head in heads if head[3]}  # those that are known
    if len(layers) > 1 and any(layer & NAMED for layer in layers):
        return False
    numbers: dict[int, int] = {}
    for layer in () if any(layer & FOUND for layer in layers) else layers:
        number, trail = divmod(layer, 1 << 32)
        if numbers.setdefault(trail, number) != number:
            return False
    wanted = any(head[0] & WANTS for head in heads)
    return not wanted or all(head[0] & MAY for head in heads)


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "big")
