"""Ranks that are processes of torch.distributed: any backend, sub-groups, DeviceMesh."""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .channel import Channel, find_channel
from .endings import outlive
from .errors import InVain, Unsent
from .framed import Framed
from .frames import Frames, Swapped
from .groups import engine_of, has_private, private, refuse_device, store_of, timeout_of
from .sums import calls_on
from .waiting import SLICE, Notes, StoreNotes, limit_of

EXCHANGES = ("torch", "shared_memory")  # of SYNCBN_EXCHANGE
_TEXT = 400  # bytes that a rank says at once
# The same under two names: torch 2.13 warns of the older one.
_all_gather_single: Any = getattr(dist, "all_gather_single", None) or getattr(
    dist, "all_gather_into_tensor", None
)
_UNKNOWN: Any = object()
_log = logging.getLogger("syncbn")
_FRAMES: weakref.WeakKeyDictionary[dist.ProcessGroup, Frames] = weakref.WeakKeyDictionary()
# How CPU tensors travel: None, by the group's own backend.
_CHANNELS: weakref.WeakKeyDictionary[dist.ProcessGroup, Channel | None] = (
    weakref.WeakKeyDictionary()
)


class ProcessGroup(Framed):
    """The ranks of a torch.distributed process group (gloo, nccl, ucc, mpi, …).

    Messages travel on a clone of the group, which its ranks make at their first collective: see
    groups.py.

    A small message's time on the CPU is its rounds: gloo's all_gather passes it on from rank to
    rank, its all_reduce does so twice. Up to ``direct_exchange_max_size`` ranks each sends to each
    at once, one round (benchmarks/collectives.py).
    """

    direct_exchange_max_size = 8

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ProcessGroup) and other.group is self.group

    def __hash__(self) -> int:
        return hash(self.group)

    @property
    def rank(self) -> int:
        return self.group.rank()

    @property
    def size(self) -> int:
        return self.group.size()

    @property
    def device(self) -> torch.device:
        """Where this group takes tensors that belong to no device yet: the CPU if it can."""
        devices = self.group._device_types
        cpu = torch.device("cpu")
        return cpu if cpu in devices else devices[0]

    @property
    def _frames(self) -> Frames:
        return _FRAMES.get(self.group) or _FRAMES.setdefault(self.group, calls_on(self))

    def _notes(self) -> Notes:
        return StoreNotes(store_of(self.group, self.group.group_name))

    def _name(self) -> str:
        return "ProcessGroup"

    def _members(self) -> tuple[str, list[int]]:
        return self.group.group_name, dist.get_process_group_ranks(self.group)

    def _takes_frames(self, tensor: Tensor) -> bool:
        return tensor.is_cpu or engine_of(self.group, tensor.device.type) == "gloo"

    def say(self, text: str, gather: Callable[[Tensor], Tensor] | None = None) -> list[str]:
        """What every rank says."""
        content = text.encode()[:_TEXT].ljust(_TEXT)
        sent = torch.tensor(list(content), dtype=torch.float32, device=self.device)
        rows = (gather or self.all_gather)(sent).to("cpu", torch.uint8).tolist()
        return [bytes(row).decode(errors="replace").rstrip() for row in rows]

    def _send(self, tensor: Tensor, operation: str) -> Tensor:
        channel = self._channel() if tensor.is_cpu else None
        if channel is not None:
            return channel.send(self, tensor, operation)
        return self._by_backend(tensor, operation)

    def _swap(self, head: bytes, content: Tensor, words: int, operation: str) -> Swapped:
        channel = self._channel()
        if channel is not None:
            return channel.swap(self, head, content, words, operation)
        return super()._swap(head, content, words, operation)

    def _channel(self) -> Channel | None:
        """How messages of the CPU travel, if not by the group's own backend."""
        found: Channel | None = _CHANNELS.get(self.group, _UNKNOWN)
        if found is _UNKNOWN:
            by_gloo = engine_of(self.group) == "gloo"
            found = _CHANNELS[self.group] = self._choose() if by_gloo else None
        return found

    def _choose(self) -> Channel | None:
        """Shared memory where all ranks have it, unless they are told otherwise."""
        told = os.environ.get("SYNCBN_EXCHANGE", "")
        if told not in ("", *EXCHANGES):
            raise ValueError(
                f"SYNCBN_EXCHANGE: expected {' or '.join(EXCHANGES)}, got {told!r} on rank "
                f"{self.rank}; leave it unset to choose what is there"
            )
        unwilling = "SYNCBN_EXCHANGE is torch" if told == "torch" else ""

        def say(text: str) -> list[str]:  # the way is not known yet
            return self.say(text, lambda sent: self._by_backend(sent, "all_gather"))

        timeout = timeout_of(self.group)
        found = find_channel(say, self.rank, self.size, timeout, unwilling)
        group = f"group {self.group.group_name!r} of {self.size} ranks"
        if isinstance(found, Channel):
            _log.info("%s exchanges through shared memory", group)
            return found
        if told == "shared_memory":
            raise RuntimeError(
                f"SYNCBN_EXCHANGE: expected ranks that share memory, but {found}; leave it unset "
                "to use the group's own backend instead"
            )
        _log.info("%s exchanges through its own backend: %s", group, found)
        return None

    def _by_backend(self, tensor: Tensor, operation: str) -> Tensor:
        if self._direct(tensor):
            copies = tensor.expand(self.size, *tensor.shape).contiguous()
            gathered = torch.empty_like(copies)
            self._run(operation, dist.all_to_all_single, gathered, copies)
        elif engine_of(self.group, tensor.device.type) == "nccl":
            gathered = tensor.new_empty(self.size, *tensor.shape)
            flat = tensor.contiguous().view(-1)
            self._run(operation, _all_gather_single, gathered.view(-1), flat)
        else:  # some backends lack that
            gathered = tensor.new_empty(self.size, *tensor.shape)
            rows = list(gathered.unbind(0))
            self._run(operation, dist.all_gather, rows, tensor.contiguous())
        return gathered

    def _reduce(self, tensor: Tensor, operation: str) -> Tensor:
        self._run(operation, dist.all_reduce, tensor)
        return tensor

    def _run(self, operation: str, collective: Callable[..., Any], *tensors: Any) -> None:
        """``collective(*tensors)`` in this group's private clone."""
        if why := refuse_device(self.group, tensors[-1].device.type):
            raise Unsent(f"ProcessGroup: {operation} on rank {self.rank} of {self.size}: {why}")
        waiting = True  # for other ranks: their absence may be the cause of an error
        try:
            if not has_private(self.group):
                self.meet(operation)
            group = private(self.group)
            waiting = False
            if self._takes_frames(tensors[-1]):
                work = collective(*tensors, group=group, async_op=True)
                waiting = True
                self._wait(work, operation)
            else:  # asynchronous, NCCL's would take a stream of their own
                collective(*tensors, group=group)
        except InVain as error:
            raise RuntimeError(str(error)) from None
        except RuntimeError as error:
            text, unsent = self._failure(operation, error, waiting)
            raise (Unsent if unsent else type(error))(text) from error

    def meet(self, operation: str) -> None:
        """Wait until all ranks are about to make the private group, which takes all of them."""
        store, began = store_of(self.group, f"{self.group.group_name}:here"), time.monotonic()
        try:
            self._notes().leave(self.rank, "")  # one from before, in the same store
            store.set(str(self.rank), "")
        except Exception:  # MPI's groups, and the fake ones of torch's tests, have none
            return
        pause, look = 0.001, SLICE
        while not store.check([str(rank) for rank in range(self.size)]):
            time.sleep(pause)
            pause, waited = min(2 * pause, 0.05), time.monotonic() - began
            longest = timeout_of(self.group)()
            if waited >= min(look, limit_of(longest)):
                self._look(operation, waited, longest)
                look = waited + SLICE

    def _look(self, operation: str, waited: float, longest: float) -> None:
        try:
            self._frames.look(operation, waited, longest)
        except RuntimeError as error:
            raise InVain(str(error)) from None

    def _wait(self, work: dist.Work, operation: str) -> None:
        """Until the work is done, looking every second for a reason why it will not be."""
        if engine_of(self.group) != "gloo":
            work.wait()
            return
        began, longest = time.monotonic(), timeout_of(self.group)()
        while True:
            late = limit_of(longest) - (time.monotonic() - began)
            try:
                work.wait(timedelta(seconds=min(max(late, 0.01), SLICE)))
                return
            except RuntimeError:
                if work.is_completed():  # meanwhile, rightly or not
                    work.wait()
                    return
            try:
                self._look(operation, time.monotonic() - began, longest)
            except InVain:
                outlive(private(self.group))  # it would end with its last message, or its timeout
                raise

    def _failure(self, operation: str, error: RuntimeError, waiting: bool) -> tuple[str, bool]:
        """The backends' errors name neither operation nor ranks. And whether nothing was sent."""
        where = f"rank {self.rank} of {self.size} ({dist.get_backend(self.group)}): {error}"
        if not waiting and not isinstance(error, dist.DistError):
            return f"ProcessGroup: {operation} could not be sent on {where}", True
        frames = self._frames
        why = frames.waiting.explain(frames.number, frames.text)
        why = f"{where}; {why}" if why else where
        return (
            f"ProcessGroup: {operation} failed on {why}; another rank has ended, is late by the "
            "group's timeout, or makes other calls: see its error, and where loaders differ in "
            "length iterate over syncbn.until_all_done(loader)"
        ), False

    def _direct(self, tensor: Tensor) -> bool:
        return tensor.device.type == "cpu" and self.size <= self.direct_exchange_max_size
