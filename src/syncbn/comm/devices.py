"""Headers of messages on devices, which nobody waits for: ranks compare them at a later call.

A frame (frames.py) is read before its content is used, which takes the CPU. On a device a few
numbers travel before the content instead, which the kernel that makes the content writes. Those of
all ranks go on to the host's memory, several messages' together, and one of the next calls finds
them there and raises DesyncError where they differ: once it has sent its own message, as others may
not know yet and wait for it. SYNCBN_COMPARE=at_once waits for them, to find the first call that
differs, on all ranks alike.
Layers are compared by the names that convert() gave them, or by their numbers. In a sum each rank
adds its header to zeros of the others; many ranks add up their headers themselves (sums.py).

A compiled graph and a captured one say nothing of themselves, in as many numbers: ranks that run
one exchange the same messages as ranks that don't.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..tensors.prefix import NO_PREFIX, WORDS, Prefix
from .frames import Received
from .headers import WANTS, Caller
from .later import TOGETHER, Later, Said
from .sums import are_many

if TYPE_CHECKING:
    from .framed import Framed


class Begun(NamedTuple):
    """A message on a device, before its content is known: what it begins with, and says, if
    anything; the shape of its content.
    """

    prefix: Prefix
    shape: tuple[int, ...]
    caller: Caller
    said: Said | None = None


def begin(
    comm: Framed,
    operation: str,
    where: Tensor,
    content: tuple[tuple[int, ...], torch.dtype],
    caller: Caller,
    flags: int,
) -> Begun:
    """How a message begins whose content, of this shape and dtype, is where a tensor is.

    What earlier messages said goes to the host now: nothing runs on the device between what makes
    the content and the message.
    """
    (shape, dtype), gathers, wants = content, operation == "all_gather", float(flags & WANTS)
    many = are_many(comm.size)
    if dtype != torch.float64:  # could not hold a header
        return Begun(Prefix((wants,), 0, 1) if gathers or many else NO_PREFIX, shape, caller)
    each = not (gathers or many)  # has a place of its own
    room, at = (comm.size * WORDS, comm.rank * WORDS) if each else (WORDS, 0)
    if _is_silent(where):
        return Begun(Prefix(() if each else (wants,) * WORDS, 0, room), shape, caller)
    later = _later(comm)
    later.compare(comm)  # of calls before the last one, which all other ranks have got an answer to
    later.fetch(where.device, at_least=TOGETHER)
    kind = comm._frames.kind(operation, shape, dtype, caller)
    said = later.say(kind, caller, flags, added=many and not gathers)
    return Begun(Prefix((0.0 if each else wants, *said.words), at, room), shape, caller, said)


def gather(comm: Framed, message: Tensor, begun: Begun) -> Received:
    """See :meth:`Framed.gather`; message: prefix, content. flags of the result: a tensor (W,)."""
    received = comm._beside(comm._send, message, "all_gather", begun.caller)
    if begun.said is not None:
        _later(comm).watch(comm, received[:, :WORDS], begun.said)
    rows = received[:, begun.prefix.room :]
    return Received(rows.reshape(comm.size, *begun.shape), received[:, 0])


def reduce(comm: Framed, message: Tensor, begun: Begun) -> Received:
    """See :meth:`Framed.reduce`. message: prefix and content, which are overwritten. flags of the
    result: how many want a gradient (1,), where they are many.
    """
    total = comm._beside(comm._reduce, message, "all_reduce", begun.caller)
    room = begun.prefix.room
    if begun.said is not None:
        _later(comm).watch(comm, total[:room].view(-1, WORDS), begun.said)
    flags = total[:1] if are_many(comm.size) else ()
    return Received(total[room:].view(begun.shape) if room else total, flags)


def _later(comm: Framed) -> Later:
    """A communicator's messages so far."""
    frames = comm._frames
    if frames.later is None:
        frames.later = Later()
    return frames.later


def _is_silent(tensor: Tensor) -> bool:
    """Whether what runs now will run again without this code: in a graph."""
    if torch.compiler.is_compiling():
        return True
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()
