"""A replica's part of a step: the first thread that all have reached does it for all of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ..comm import LOCAL, Replica, refuse_join
from ..kernels import Affine
from .checks import check_not_reproducible
from .exchange import Exchange
from .function import normalise_parts
from .records import Call, Part, part_of
from .speaker import speaking


class _Share(NamedTuple):
    """What a replica hands in."""

    part: Part
    call: Call
    wants_graph: bool


def normalise_replica(call: Call) -> Tensor:
    """y of the call's input, with the statistics of all replicas of all ranks.

    Only the first replica's running statistics move.
    """
    check_not_reproducible(call.options.reproducible)
    assert isinstance(call.comm, Replica)
    x, affine, wants_graph = call.input, call.affine, torch.is_grad_enabled()
    if not wants_graph:  # of this replica; the others may
        x, affine = x.detach(), Affine(*(None if t is None else t.detach() for t in affine))
    share = _Share(part_of(x, affine, call.mask), call, wants_graph)
    y: Tensor = call.comm.rendezvous(share, _normalise_all)
    return y if wants_graph else y.detach()


def _normalise_all(shares: list[_Share]) -> Sequence[Tensor]:
    first = shares[0].call
    assert isinstance(first.comm, Replica)
    outer = first.comm.outer
    if outer.size > 1:
        refuse_join()
    channels, (layer, compiling) = first.input.shape[1], (first.options.layer, first.mode.compiling)
    comm = speaking(outer, layer, channels, compiling) if outer.size > 1 else LOCAL
    parts, eps = [share.part for share in shares], first.options.eps
    with torch.set_grad_enabled(any(share.wants_graph for share in shares)):
        exchange = Exchange(comm, first.accumulator)
        return normalise_parts(parts, first.running, eps, exchange, compiling)
