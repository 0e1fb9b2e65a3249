"""DTensor input stands for the whole batch: the same arithmetic, and DTensor sends what it takes.

torch's own operator gathers a sharded batch on every rank; the plain operations leave it sharded.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ..comm import LOCAL, Communicator, ProcessGroup
from ..kernels import Affine, Running, composite
from ..numerics.moments import Moments, wide_dtype
from ..tensors.storages import is_dtensor
from .exchange import Exchange, Sums
from .function import normalise_parts
from .records import Call, Normalised, Part, part_of


def check_options_of_dtensor(mask: bool, reproducible: bool) -> None:
    """Refuse what takes a rank's own samples."""
    for name, given in (("mask=None", mask), ("reproducible=False", reproducible)):
        if given:
            raise ValueError(
                f"sync_batch_norm: expected {name} for a DTensor as input, got another; give "
                "input.to_local(), and as process_group the group over which it is sharded"
            )


def check_group_of_dtensor(input: Any, comm: Communicator) -> None:
    """Refuse a group with ranks whose batches the DTensor doesn't hold."""
    ranks = set(input.device_mesh.mesh.flatten().tolist())
    inside = comm.size <= len(ranks)
    if isinstance(comm, ProcessGroup):
        inside = ranks.issuperset(dist.get_process_group_ranks(comm.group))
    if not inside:
        raise ValueError(
            f"sync_batch_norm: expected a DTensor over all {comm.size} ranks of the layer's group, "
            f"got one over a mesh of the ranks {sorted(ranks)}; to normalise over those, give the "
            "layer their group as process_group"
        )


class _OfDTensor(Exchange):
    """What DTensor computed of each shard is added up here, once, not wherever it is used."""

    def reduce(self, parts: Sequence[Normalised], dys: Sequence[Tensor], compiling: bool) -> Sums:
        total: Tensor = _added_up(super().reduce(parts, dys, compiling).parts[0])
        return Sums((total,), total)

    def _measure(self, parts: Sequence[Part]) -> Tensor:
        moments: Tensor = _added_up(super()._measure(parts))
        return moments


def _added_up(sums: Any) -> Any:
    from torch.distributed.tensor import Replicate

    return sums.redistribute(
        placements=[Replicate() if p.is_partial() else p for p in sums.placements]
    )


def normalise_dtensor(call: Call) -> Tensor:
    """y of the whole batch (N, C, *), sharded over samples or channels as input is, else whole.

    A dimension of one element counts as whole: DTensor cannot reshape it back while it is sharded.
    Plain tensors among the others count as the same on every rank, as do their gradients.
    """
    from torch.distributed.tensor import Replicate, Shard

    check_options_of_dtensor(call.lengths is not None, call.options.reproducible)
    if not call.mode.compiling:  # a graph is traced after an eager step, as a rule
        check_group_of_dtensor(call.input, call.comm)
    whole: Any = call.input
    kept = [type(p) is Shard and p.dim < 2 and whole.shape[p.dim] > 1 for p in whole.placements]
    places = [p if keep else Replicate() for p, keep in zip(whole.placements, kept, strict=True)]
    x = whole.redistribute(placements=places)
    mean, var, batches, momentum = call.running
    mean, var, batches = (_on(x, t) for t in (mean, var, batches))
    affine, eps = Affine(*(_on(x, t) for t in call.affine)), call.options.eps
    if call.options.training or mean is None:
        running = Running(mean, var, batches, momentum)
        exchange = _OfDTensor(LOCAL)
        return normalise_parts(
            [part_of(x, affine, None)], running, eps, exchange, call.mode.compiling
        )[0]
    mean, var = (t.to(wide_dtype(t.device)) for t in (mean, var))
    known = Moments(mean.new_ones(()), mean, var).pack().unsqueeze(0)
    return composite.normalise(x, known, affine=affine, running=Running(), eps=eps)[0]


def _on(x: Any, tensor: Any) -> Any:
    """``tensor`` as a DTensor beside x, whose gradient comes back as the tensor is placed."""
    from torch.distributed.tensor import DTensor, Replicate

    if tensor is None:
        return None
    if is_dtensor(tensor):
        return tensor.redistribute(placements=tensor.placements)
    mesh = x.device_mesh
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
