"""Messages of many ranks are sums: what each receives does not grow with the number of ranks.

Up to 64 ranks each hears every other, in one collective. Of more, rows are too much: 1,024 rows of
2,048 channels are 33 MB in every layer. A sum brings each rank as many numbers as it sent, and the
engines that jobs of many ranks run on take some log W steps for it. So layers merge their moments
by sums there (numerics/), and ranks compare their headers by sums, too.

In a sum nobody has a row. That ranks make the same call they see so: each sends a digest of it in
pieces p, and p². All pieces are the same where W·Σp² = (Σp)², and nowhere else (Cauchy–Schwarz);
float64 holds these integers, so all ranks find the same. Ranks that differ then send their headers
as frames do, which say who calls what.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from .frames import Call, Frames, Received
from .headers import MAY, NAMED, WANTS, Kind
from .packing import frame_of, heads_of, rows_of, words_of

if TYPE_CHECKING:
    from .framed import Framed

HEARD = 64  # ranks that hear each other
_PIECES, _BITS = 4, 14  # of a digest
_KEPT = 1000  # sums of headers
# On a device: bits of the digest; a rank that speaks, and one that can't take part in a backward.
_WIDE, _SPEAKS, _CANNOT = 17, 1 << 18, 1 << 35
HEADER = 2 + 2 * _PIECES  # numbers of a sum


def are_many(size: int) -> bool:
    """Whether so many ranks exchange sums alone."""
    return size > HEARD


def calls_on(comm: Framed) -> Frames:
    """The calls on a communicator, none of which has been made."""
    return Sums(comm) if are_many(comm.size) else Frames(comm)


class Sums(Frames):
    """The calls on a communicator of many ranks, as one of its ranks sees them.

    Every call begins with a sum of headers, whatever it is for: so ranks out of step meet there.
    What is to be added up travels with it where it is known to fit; all else follows.
    """

    def __init__(self, comm: Framed) -> None:
        super().__init__(comm)
        self._known: set[tuple[float, ...]] = set()  # sums of headers that differ, and agree

    def _deliver(self, comm: Framed, call: Call, content: Tensor) -> Received:
        adds, room = call.operation == "all_reduce", self._room()
        numbers = _numbers_of(content) if adds else None
        words = 0 if numbers is None else len(numbers)
        message = torch.zeros(HEADER + room, dtype=torch.float64, device="cpu")
        message[:HEADER] = torch.tensor(_header(call), dtype=torch.float64, device="cpu")
        if numbers is not None and words <= room:
            message[HEADER : HEADER + words] = numbers
        total = self.kept(comm._reduce, message, call.operation)
        said = tuple(total[:HEADER].tolist())
        if said not in self._known and not _are_one(said, comm.size):
            self._ask(comm, call)
            self._know(said)
        self._agreed(call.kind, max(words, room))
        flags = [WANTS * bool(said[0]) | MAY * (not said[1])]
        if numbers is None:
            frames = self.kept(comm._send, self._frame(call, content), call.operation)
            rows = rows_of(frames, content)
            return Received(rows.sum(0, dtype=content.dtype) if adds else rows, flags)
        if words > room:
            total = self.kept(comm._reduce, numbers, call.operation)
        else:
            total = total[HEADER : HEADER + words]
        return Received(_like(content, total), flags)

    def _ask(self, comm: Framed, call: Call) -> None:
        """Compare headers as frames do: whole ones, of all ranks."""
        nothing = torch.empty(0, dtype=torch.float64, device="cpu")
        frames = self.kept(comm._send, self._frame(call, nothing), call.operation)
        self._compare(comm, heads_of(frames), call)

    def _know(self, said: tuple[float, ...]) -> None:
        if len(self._known) > _KEPT:
            self._known.clear()
        self._known.add(said)

    def _frame(self, call: Call, content: Tensor) -> Tensor:
        return frame_of(self._head(call), content, words_of(content))


def _numbers_of(content: Tensor) -> Tensor | None:
    """What is added up: a copy as float64 (n,); None for integers, which that cannot hold."""
    if content.is_complex():
        content = torch.view_as_real(content)
    elif not content.is_floating_point():
        return None
    return content.to(torch.float64, copy=True).view(-1)


def _like(content: Tensor, numbers: Tensor) -> Tensor:
    """Such numbers as a tensor like that one."""
    if content.is_complex():
        return torch.view_as_complex(numbers.view(*content.shape, 2)).to(content.dtype)
    return numbers.view(content.shape).to(content.dtype)


def _header(call: Call) -> list[float]:
    """Whether a gradient is wanted; whether none can be followed; what is called."""
    wants, cannot = call.flags & WANTS, not call.flags & MAY
    both = call.kind.both
    pieces = [both >> _BITS * place & (1 << _BITS) - 1 for place in range(_PIECES)]
    return [wants, cannot, *pieces, *(piece * piece for piece in pieces)]


def added_words(kind: Kind, values: int, follows: bool) -> tuple[float, float, float]:
    """What a rank says in a sum of headers on a device, after whether it wants a gradient.

    values: how many values per channel it has, up to 2; follows: whether it could take part in a
    backward. Fewer bits than on the CPU, and in one number what must be exact below 2¹⁷ ranks. Of
    layers, names that convert() gave alone: others may be one layer's, which no sum can tell.
    """
    piece = (kind.both if kind.layer & NAMED else kind.digest) % (1 << _WIDE)
    said = values + _SPEAKS + (0 if follows else _CANNOT)
    return float(piece), float(piece * piece), float(said)


class Added(NamedTuple):
    """The sum of such headers. Ranks that run graphs say in each number whether they want one."""

    size: int
    wants: int
    piece: int
    square: int
    said: int

    def differ(self) -> bool:
        if min(self) < 0:  # no headers at all
            return True
        if not self._all_speak():
            return False
        cannot = self.said // _CANNOT
        return self.size * self.square != self.piece**2 or bool(cannot and self.wants)

    def is_single(self) -> bool:
        return self._all_speak() and self.said % _SPEAKS == 1

    def _all_speak(self) -> bool:
        return self.said % _CANNOT // _SPEAKS == self.size


def _are_one(said: tuple[float, ...], size: int) -> bool:
    """Whether all ranks make the same call, and can follow each other into backward."""
    pieces, squares = said[2 : 2 + _PIECES], said[2 + _PIECES :]
    same = all(size * int(q) == int(p) ** 2 for p, q in zip(pieces, squares, strict=True))
    return same and not (said[0] and said[1])
