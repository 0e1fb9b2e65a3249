"""Groups of our own: the private clone that layers talk on, and sub-groups of consecutive ranks.

On a group that layers share with others (DistributedDataParallel's buckets, the user's own calls)
the order of messages differs between ranks as soon as one rank leaves a head of the model unused,
and each rank then takes the other's gradients for statistics. So layers talk on a clone of the
group they are given.
"""

from __future__ import annotations

import copy
import itertools
import threading
import weakref
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from .base import Local

_tables = threading.Lock()
_numbers = itertools.count()


def private(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """The group for the messages of layers that were given ``group``; ours are private already.

    The first call makes it, on every rank of ``group`` together and on no other: with the same
    ranks, backend and options, and the timeout that ``group`` has now. It lives as long as that.
    """
    clone = _CLONES.get(group)
    if clone is not None:
        return clone.in_time()
    if group in _OURS:
        return group
    with _tables:
        making = _MAKING.setdefault(group, threading.Lock())
    with making:  # of each group by itself: its ranks wait for each other
        if group not in _CLONES:  # no other thread has made it meanwhile
            clone = _CLONES[group] = _Clone(group, _cloned(group))
            weakref.finalize(group, _free, clone.group).atexit = False
        return _CLONES[group].group


def has_private(group: dist.ProcessGroup) -> bool:
    """Whether :func:`private` need not make anything."""
    return group in _CLONES or group in _OURS


def name_in_graphs(group: dist.ProcessGroup) -> str:
    """What compiled graphs call the private group: no later group of this process has the name.

    Else the graph of a layer whose group was destroyed would talk on another's clone. torch says
    the name when it finds no such group.
    """
    clone = private(group)
    name = _GRAPH_NAMES.get(clone)
    if name is None:
        number = next(_numbers)
        name = _GRAPH_NAMES[clone] = (
            f"{clone.group_name}#{number} (if it was destroyed: set layer.process_group to a group "
            "that is alive)"
        )
        c10d: Any = dist.distributed_c10d
        c10d._register_process_group(name, clone)
    return name


def _cloned(group: dist.ProcessGroup) -> dist.ProcessGroup:
    c10d: Any = dist.distributed_c10d  # new_group() would want all ranks, members or not
    world, whole = c10d._world, c10d._get_default_group()
    backend, _ = world.pg_map[group]
    ranks, name = list(world.pg_group_ranks[group]), f"syncbn:{group.group_name}"
    options, timeout = _settings(group)
    # Where a device is bound to the whole group torch splits its communicators, which takes all
    # of its ranks.
    device = whole.bound_device_id
    split = device if group is whole else None
    if split != device:
        whole.bound_device_id = split
    clone: dist.ProcessGroup
    try:
        clone, _ = c10d._new_process_group_helper(
            *(len(ranks), group.rank(), ranks, backend, world.pg_map[whole][1], name),
            backend_options=options,
            timeout=timeout or c10d._get_default_timeout(backend),
            pg_tag=name,  # so that nobody who looks for a group of these ranks finds this one
            device_id=split,
            group_desc=f"syncbn:{group.group_desc}",
        )
    finally:
        if split != device:
            whole.bound_device_id = device
    world.pg_group_ranks[clone] = dict(world.pg_group_ranks[group])
    return clone


class _Clone:
    """A group and what tells the time that it waits: torch's groups may be told another."""

    def __init__(self, parent: dist.ProcessGroup, group: dist.ProcessGroup) -> None:
        self.group = group
        self._timed = [
            (theirs.options, ours.options, ours)
            for theirs, ours in zip(_backends(parent), _backends(group), strict=True)
            if getattr(theirs, "options", None) is not None
        ]

    def in_time(self) -> dist.ProcessGroup:
        """The group, with the timeout that its parent has now. Takes a microsecond."""
        for theirs, ours, backend in self._timed:
            timeout = theirs._timeout
            if timeout != ours._timeout:
                backend._set_default_timeout(timeout)
        return self.group


def _backends(group: dist.ProcessGroup) -> list[Any]:
    return [_unwrapped(group._get_backend(device)) for device in group._device_types]


def _unwrapped(backend: Any) -> Any:
    while hasattr(backend, "wrapped_pg"):  # TORCH_DISTRIBUTED_DEBUG=DETAIL
        backend = backend.wrapped_pg
    return backend


def _settings(group: dist.ProcessGroup) -> tuple[Any, timedelta | None]:
    """A copy of what the group's backend was made with, where it can be copied; its timeout."""
    device = next((d for d in group._device_types if d.type != "cpu"), torch.device("cpu"))
    backend = _unwrapped(group._get_backend(device))
    options: Any = getattr(backend, "options", None)
    timeout = getattr(options, "_timeout", None)
    try:
        options = copy.deepcopy(options)
    except TypeError:  # gloo's, which has none that a group could be made with
        return None, timeout
    if hasattr(options, "split_from"):  # what the group itself was split from
        options.split_from = None
    return options, timeout


def engine_of(group: dist.ProcessGroup, device: str = "cpu") -> str:
    """By what the group's tensors travel there, whatever others do ("cpu:gloo,cuda:nccl", which it
    is by default); "" where it takes none.
    """
    known = _ENGINES.setdefault(group, {})
    if device not in known:
        kinds = [kind for kind in group._device_types if kind.type == device]
        known[device] = _unwrapped(group._get_backend(kinds[0])).name() if kinds else ""
    return known[device]


def refuse_device(group: dist.ProcessGroup, device: str) -> str:
    """Why the group takes no tensors of this type of device, and what to do; "" where it does."""
    if engine_of(group, device):
        return ""
    kinds = " and ".join(kind.type for kind in group._device_types)
    return (
        f"expected tensors on {kinds}, where the group ({dist.get_backend(group)}) communicates, "
        f"got one on {device}; move the model and its input there, or make a group for both, as "
        'init_process_group("cpu:gloo,cuda:nccl") does'
    )


def store_of(group: dist.ProcessGroup, name: str) -> Any:
    """A part of the store that the group's ranks met in."""
    c10d: Any = dist.distributed_c10d
    return c10d.PrefixStore(f"syncbn:{name}", c10d._world.pg_map[group][1])


def timeout_of(group: dist.ProcessGroup) -> Callable[[], float]:
    """Asks for the seconds that the group's messages may take, which may change."""
    options = [getattr(each, "options", None) for each in _backends(group)]
    known = next((each for each in options if hasattr(each, "_timeout")), None)
    usual: timedelta = dist.default_pg_timeout
    return lambda: (usual if known is None else known._timeout).total_seconds()


def _free(clone: dist.ProcessGroup) -> None:
    """Shut the clone down, as torch does with its groups, and forget it."""
    c10d: Any = dist.distributed_c10d
    world = c10d._world
    if world.pg_map.pop(clone, None) is None:
        return  # destroyed with the default group
    for table in (world.pg_names, world.pg_group_ranks, world.pg_backend_config):
        table.pop(clone, None)
    world.tags_to_pg.pop(world.pg_to_tag.pop(clone, ""), None)
    c10d._unregister_process_group(clone.group_name)
    if clone in _GRAPH_NAMES:
        c10d._unregister_process_group(_GRAPH_NAMES[clone])
    clone.shutdown()


def is_alive(group: dist.ProcessGroup) -> bool:
    """Whether torch.distributed knows the group: it was not destroyed."""
    return group in dist.distributed_c10d._world.pg_map


def subgroups(size: int) -> Any:
    """What ``process_group`` stands for groups of ``size`` consecutive ranks, on this rank.

    Those are ranks [0 … size−1], [size … 2size−1] and so on; for all ranks None, for one a
    :class:`Local`. The first call with a size makes the groups, on every rank alike, as
    torch.distributed demands; later ones reuse them, as long as the default group lives.

    Raises:
        TypeError: ``size`` is no integer.
        ValueError: torch.distributed is not initialised, or ``size`` does not divide the world.
    """
    if isinstance(size, bool) or not isinstance(size, int):
        raise TypeError(f"group_size: expected a number of ranks, got {type(size).__name__}")
    world = dist.group.WORLD if dist.is_available() else None
    if world is None:
        raise ValueError(
            f"group_size: got {size}, but torch.distributed is not initialised; call "
            "torch.distributed.init_process_group first"
        )
    ranks = world.size()
    if size < 1 or ranks % size:
        divisors = ", ".join(str(k) for k in range(1, ranks + 1) if ranks % k == 0)
        raise ValueError(
            f"group_size: expected a divisor of the world size {ranks}, got {size} on rank "
            f"{world.rank()}; pass one of {divisors}, or process_group= for groups of other ranks"
        )
    if size in (1, ranks):
        return None if size == ranks else Local()
    made = _MADE.setdefault(world, {})
    group = made[size]() if size in made else None
    if group is None:
        group, _ = dist.new_subgroups(size)  # type: ignore[no-untyped-call]
        made[size] = weakref.ref(group)
        _OURS.add(group)
    return group


# Weak, so that nothing outlives destroy_process_group for these tables' sake.
_ENGINES: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[str, str]] = weakref.WeakKeyDictionary()
_CLONES: weakref.WeakKeyDictionary[dist.ProcessGroup, _Clone] = weakref.WeakKeyDictionary()
_MADE: weakref.WeakKeyDictionary[dist.ProcessGroup, dict[int, weakref.ref[dist.ProcessGroup]]] = (
    weakref.WeakKeyDictionary()
)
_MAKING: weakref.WeakKeyDictionary[dist.ProcessGroup, threading.Lock] = weakref.WeakKeyDictionary()
_GRAPH_NAMES: weakref.WeakKeyDictionary[dist.ProcessGroup, str] = weakref.WeakKeyDictionary()
_OURS: weakref.WeakSet[dist.ProcessGroup] = weakref.WeakSet()
