"""What ranks say before what they send: so ranks out of step read it, and no message surprises.

Every message of a Framed communicator (framed.py) begins with a header: who calls, for what. A rank
that receives the headers of all knows whether they agree, and so do the others, from the same
bytes. Where they do not, each says in words what it called, and all raise the same DesyncError.

Engines want messages of one size, and gloo aborts the process that gets another. So the size of a
frame is a function of what all ranks know alike, the headers that they agreed on so far: as large
as what followed the last one before. What does not fit goes into a second message, whose size is
known once the headers agree. From the second step on there is none, if steps are alike.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import torch
from torch import Tensor
from torch.utils._mode_utils import no_dispatch

from . import tracing
from .base import described
from .errors import REMEDY, DesyncError, Unsent
from .exchanges import DONE, Place
from .headers import MAY, VERSION, WANTS, Caller, Head, Kind, agree, kind_of, may_be_parts
from .packing import HEAD, HEADER, frame_of, heads_of, plain, rows_of, words_of
from .waiting import Waiting
from .words import told

if TYPE_CHECKING:
    from .framed import Framed
    from .later import Later

_Result = TypeVar("_Result")
_ACCOUNT = 64  # words in which a rank says what it called
_FIRST = 64  # words of a frame, beside the header, where nothing is known
_KEPT = 10_000  # calls whose followers are remembered


class Received(NamedTuple):
    """rows: every rank's tensor (W, *), or the sum of all (*); flags: every rank's; of many
    ranks, what any wants and all may; on a device a tensor, which is not zero where any wants.
    """

    rows: Tensor
    flags: Sequence[int] | Tensor


class Swapped(NamedTuple):
    """What a message brings: all frames (W, n); or all contents (W, *), where who has them has seen
    that all headers are the same.
    """

    frames: Tensor | None
    rows: Tensor | None = None


class Call(NamedTuple):
    """What is called, by whom, who says what beside it."""

    operation: str
    caller: Caller
    flags: int
    kind: Kind


class Frames:
    """The calls on one communicator, as one of its ranks sees them."""

    def __init__(self, comm: Framed) -> None:
        self.number, self.text = 0, ""  # of the last call
        self.waiting = Waiting(comm._name(), comm.rank, comm.size, comm._notes())
        self.place = Place(comm)
        self.later: Later | None = None  # of calls on devices
        self._kinds: dict[tuple[object, ...], Kind] = {}
        self._last = 0  # the digest of the last call that ranks agreed on
        self._followed: dict[int, int] = {}  # by as many words at most
        self._one_layer: set[tuple[int, ...]] = set()  # of which headers say so by other names

    def exchange(
        self,
        comm: Framed,
        operation: str,
        tensor: Tensor,
        caller: Caller,
        flags: int,
    ) -> Received:
        """Every rank's tensor, or the sum of all, once all make this call.

        Modes that watch operations see none of it, as which there are depends on the calls before:
        a selective checkpoint's second forward must run the same ones.
        """
        if torch._C._len_torch_dispatch_stack() and type(tensor) is Tensor:
            with no_dispatch():
                return self._exchange(comm, operation, tensor, caller, flags)
        return self._exchange(comm, operation, tensor, caller, flags)

    def _exchange(
        self,
        comm: Framed,
        operation: str,
        tensor: Tensor,
        caller: Caller,
        flags: int,
    ) -> Received:
        """The same, in any mode."""
        self.waiting.check()
        comm._check(operation, tensor)
        kind = self.kind(operation, tensor.shape, tensor.dtype, caller)
        try:
            content = plain(tensor)
        except Exception as error:  # there is nothing in it, or no memory left
            if not caller.direction:  # a layer tells of its own errors
                comm.give_up(error)
            raise
        self.number, self.text = self.number + 1, kind.text
        self.waiting.withdraw(self.number, self.text)
        return self._deliver(comm, Call(operation, caller, flags, kind), content)

    def _deliver(self, comm: Framed, call: Call, content: Tensor) -> Received:
        head, operation, adds = self._head(call), call.operation, call.operation == "all_reduce"
        rest = content if adds and comm.size > comm.direct_exchange_max_size else None
        content = content if rest is None else content.view(-1)[:0]
        room, words = self._room(), words_of(content)
        if words <= room:
            frames, rows = self.kept(comm._swap, head, content, room, operation)
        else:
            frame = frame_of(head, content, words)
            frames, rows = self.kept(comm._send, frame[: HEADER + room], operation), None
        heads = [HEAD.unpack(head)] * comm.size if frames is None else heads_of(frames)
        self._compare(comm, heads, call)
        self._agreed(call.kind, max(words, room))
        if frames is not None:
            if words > room:
                others = self.kept(comm._send, frame[HEADER + room :], operation)
                frames = torch.cat((frames, others), 1)
            rows = rows_of(frames, content)
        assert rows is not None
        if rest is not None:
            rows = self.kept(comm._reduce, rest.clone(), operation)
        elif adds:
            rows = rows.sum(0, dtype=content.dtype)
        return Received(rows, [each[0] & (WANTS | MAY) for each in heads])

    def _head(self, call: Call) -> bytes:
        version = VERSION << 32 | call.flags
        return HEAD.pack(version, call.kind.digest, self.number, call.kind.layer)

    def _room(self) -> int:
        """Words of a frame beside its header, as all ranks know them."""
        return self._followed.get(self._last, _FIRST)

    def _agreed(self, kind: Kind, words: int) -> None:
        """All ranks make this call, which takes so many words beside the header."""
        if len(self._followed) > _KEPT:
            self._followed.clear()
        self._followed[self._last] = words
        self._last = kind.digest

    def _compare(self, comm: Framed, heads: Sequence[Head], call: Call) -> None:
        """Raise DesyncError, on all ranks, where these are not the headers of one call."""
        if not (agree(heads) and self._is_one_layer(comm, heads, call)):
            differ = self._desync(comm, heads, call)
            tracing.fail(self.place, differ)
            raise differ

    def look(self, operation: str, waited: float, longest: float) -> None:
        """See :meth:`Waiting.look`."""
        self.waiting.look(self.number, operation, self.text, waited, longest)

    def kept(self, message: Callable[..., _Result], *arguments: Any) -> _Result:
        """What a message brings; after an error there is no other call."""
        traced = tracing.begin(self.place, self.number, self.text) if tracing.active else None
        try:
            received = message(*arguments)
        except BaseException as error:  # Ctrl-C while waiting, too
            if isinstance(error, Unsent):
                self.number -= 1
            else:
                self.waiting.fail(self.number, error)
            tracing.fail(self.place, error)
            raise
        if traced is not None:
            traced.finish(DONE)
        return received

    def kind(
        self, operation: str, shape: Sequence[int], dtype: torch.dtype, caller: Caller
    ) -> Kind:
        key = operation, shape, dtype, caller
        kind = self._kinds.get(key)
        if kind is None:
            if len(self._kinds) > _KEPT:
                self._kinds.clear()
            kind = self._kinds[key] = kind_of(described(operation, shape, dtype), caller)
        return kind

    def _is_one_layer(self, comm: Framed, heads: Sequence[Head], call: Call) -> bool:
        """Whether names that differ may be one layer's: its model is part of another on some."""
        layers = tuple(head[3] for head in heads)
        if not may_be_parts(layers) or layers in self._one_layer:
            return True
        names = [name for name in self._said(comm, call.caller.layer, call.operation) if name]
        shortest = min(names, key=len)
        one = all(name == shortest or name.endswith(f".{shortest}") for name in names)
        if one:
            self._one_layer.add(layers)
        return one

    def _said(self, comm: Framed, text: str, operation: str) -> list[str]:
        """What every rank says."""
        account = torch.zeros(_ACCOUNT * 8, dtype=torch.uint8, device="cpu")
        said = torch.tensor(list(text.encode()[: len(account)]), dtype=torch.uint8, device="cpu")
        account[: len(said)] = said
        received = self.kept(comm._send, account.view(torch.float64), operation).view(torch.uint8)
        return [bytes(row).rstrip(b"\0").decode(errors="replace") for row in received.tolist()]

    def _desync(self, comm: Framed, heads: Sequence[Head], call: Call) -> DesyncError:
        """What every rank called, in its own words."""
        self._last, caller = 0, call.caller  # from where all can go on
        versions = {head[0] >> 32 for head in heads}
        if len(versions) > 1:
            return DesyncError(
                f"{comm._name()}: ranks speak versions {sorted(versions)} of the protocol; "
                "install the same version of syncbn on all of them",
                caller.layer,
            )
        text = self.text
        if len({head[1] for head in heads}) == 1 and caller.direction:
            wants, may = heads[comm.rank][0] & WANTS, heads[comm.rank][0] & MAY
            text += ", gradients wanted" if wants else ", none wanted" if may else ", gradients off"
        self.text = text
        ranks = dict(enumerate(self._said(comm, text, call.operation)))
        return DesyncError(
            f"{comm._name()}: ranks call different collectives: {told(ranks)} (call "
            f"{self.number}); {REMEDY}",
            caller.layer,
            ranks,
        )
