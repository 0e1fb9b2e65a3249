"""The memory of comm/channel.py: who makes it, who may map it, and what lies in it.

It is a file without a name (memfd), which the others open through the process that made it: so it
needs no room in /dev/shm, belongs to nobody else, and is gone with the last process, however that
ends. Each rank holds a lock on one byte of it, which the system takes from it when it ends.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import sys
from functools import cache
from typing import Any, NamedTuple

from .. import library
from .._version import __version__

if sys.platform != "win32":
    import fcntl

_NAME = "syncbn"
_CAPACITY = 1 << 18  # bytes of a message's part: a layer of 4,096 channels sends a quarter
_PAGE = 4096  # at the beginning: what the others compare before they use the rest


class Unmappable(Exception):
    """Why ranks share no memory, in words that go on after "on rank 1"."""


class Parts(NamedTuple):
    """Where the ranks' messages go: so many bytes of each, so many apart."""

    address: int
    stride: int
    length: int


class Patience(NamedTuple):
    """How to wait for a message: see csrc/exchange/shared_memory.h."""

    looks: int
    turns: int
    seconds: float


class Memory:
    """What one rank sees of it. token: what no other memory is called."""

    capacity = _CAPACITY

    def __init__(self, file: int, token: str, rank: int, size: int) -> None:
        self.token, self._library = token, _library()
        self._file = file
        self._map = mmap.mmap(file, _PAGE + _bytes(size))
        self._anchor = ctypes.c_char.from_buffer(self._map)
        self._where = ctypes.addressof(self._anchor) + _PAGE, size, _CAPACITY
        self._rank = rank
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)

    def publish(self, number: int, address: int, length: int) -> None:
        self._library.syncbn_exchange_publish(*self._where, self._rank, number, address, length)

    def swap(
        self, number: int, head: bytes, body: Parts, length: int, received: int, patience: Patience
    ) -> int:
        """See syncbn_exchange_swap() in csrc/exchange/shared_memory.cpp."""
        looks, turns, seconds = patience
        sent = head, len(head), body.address, body.length, length
        message = *self._where, self._rank, number, *sent, received
        found: int = self._library.syncbn_exchange_swap(*message, looks, turns, int(seconds * 1e9))
        return found

    def receive(self, number: int, parts: Parts, first: int, patience: Patience) -> int:
        """See receive() in csrc/exchange/shared_memory.h."""
        looks, turns, seconds = patience
        message = *self._where, number, *parts, first, looks, turns, int(seconds * 1e9)
        found: int = self._library.syncbn_exchange_receive(*message)
        return found

    def end(self) -> None:
        """Tell the others that nothing more will come."""
        self._library.syncbn_exchange_end(*self._where, self._rank)

    def has_ended(self, rank: int) -> bool:
        """Whether a rank said so, or its process has ended."""
        if self._library.syncbn_exchange_ended(*self._where, rank):
            return True
        if rank == self._rank:
            return False
        try:
            fcntl.lockf(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, rank)
        except OSError:
            return False
        fcntl.lockf(self._file, fcntl.LOCK_UN, 1, rank)
        return True

    def __del__(self) -> None:
        file, self._file = getattr(self, "_file", -1), -1
        if file >= 0:
            os.close(file)


def unavailable() -> str | None:
    """Why no memory can be shared here; None where it can."""
    if sys.platform != "linux" or not hasattr(os, "memfd_create"):
        return f"the system is {sys.platform}, and only Linux has what it takes"
    if why := library.missing():
        return why
    try:
        _library()
    except (OSError, AttributeError) as error:
        return f"{library.LIBRARY.name} is of another version ({error})"
    return None


def create(size: int) -> tuple[Memory, str]:
    """Memory for so many ranks, as rank 0 sees it; and where the others find it."""
    whole, file = _PAGE + _bytes(size), -1
    token = os.urandom(16).hex()
    try:
        file = os.memfd_create(_NAME, os.MFD_CLOEXEC)
        os.posix_fallocate(file, 0, whole)  # an error now where memory is short, no crash later
        os.pwrite(file, _title(token).encode(), 0)
    except OSError as error:
        if file >= 0:
            os.close(file)
        raise Unmappable(f"{whole} bytes of memory could not be had ({error})") from error
    return Memory(file, token, 0, size), f"{os.getpid()} {file} {token}"


def open_of(place: str, rank: int, size: int) -> Memory:
    """The memory that rank 0 made, as another rank sees it."""
    process, number, token = place.split()
    path = f"/proc/{process}/fd/{number}"
    reason = "the memory found is not rank 0's, which is on another host or in another container"
    try:
        # Other files stay closed: who closes one of its own loses its locks on it.
        if int(process) == os.getpid() or f"memfd:{_NAME}" not in os.readlink(path):
            raise Unmappable(reason)
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise Unmappable(
            f"the memory of rank 0 could not be opened ({error}): it is a process of another host, "
            "container or user"
        ) from error
    found = os.pread(file, _PAGE, 0).rstrip(b"\0").decode(errors="replace")
    if found == _title(token):
        return Memory(file, token, rank, size)
    os.close(file)
    if found.startswith("syncbn ") and found.endswith(token):
        theirs = found.split()[1]
        reason = f"syncbn is of version {__version__}, and of version {theirs} on rank 0"
    raise Unmappable(reason)


def _title(token: str) -> str:
    return f"syncbn {__version__} {token}"


def _bytes(size: int) -> int:
    found: int = _library().syncbn_exchange_size(size, _CAPACITY)
    return found


@cache
def _library() -> Any:
    """The functions of csrc/exchange/shared_memory.cpp, during which other threads may run."""
    loaded = ctypes.CDLL(str(library.LIBRARY))
    int64, uint32, address = ctypes.c_int64, ctypes.c_uint32, ctypes.c_void_p
    where = [address, int64, int64]
    head, body = [ctypes.c_char_p, int64], [address, int64]
    for name, arguments, result in (
        ("size", [int64, int64], int64),
        ("publish", [*where, int64, uint32, address, int64], None),
        ("swap", [*where, int64, uint32, *head, *body, int64, address, *[int64] * 3], int64),
        ("receive", [*where, uint32, address, *[int64] * 6], int64),
        ("end", [*where, int64], None),
        ("ended", [*where, int64], int64),
    ):
        function = getattr(loaded, f"syncbn_exchange_{name}")
        function.argtypes, function.restype = arguments, result
    return loaded
