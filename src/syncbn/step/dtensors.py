"""DTensor input stands for the whole batch: the same arithmetic, and DTensor sends what it takes.

torch's own operator gathers a sharded batch on every rank; the plain operations leave it sharded.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..comm import LOCAL, Communicator, ProcessGroup
from ..kernels import composite
from ..numerics.moments import Moments, wide_dtype
from ..tensors.storages import is_dtensor
from .autograd import synchronised
from .share import Share


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
    if torch.compiler.is_compiling():  # a graph is traced after an eager step, as a rule
        return
    ranks = set(input.device_mesh.mesh.flatten().tolist())
    inside = comm.size <= len(ranks)
    if inside and isinstance(comm, ProcessGroup):
        inside = ranks.issuperset(dist.get_process_group_ranks(comm.group))
    if not inside:
        raise ValueError(
            f"sync_batch_norm: expected a DTensor over all {comm.size} ranks of the layer's group, "
            f"got one over a mesh of the ranks {sorted(ranks)}; to normalise over those, give the "
            "layer their group as process_group"
        )


class _Whole(Share):
    """What DTensor computed of each shard is added up here, once, not wherever it is used."""

    def moments(self, x: Tensor) -> Tensor:
        moments: Tensor = _added_up(super().moments(x))
        return moments

    def gradient_sums(
        self, dy: Tensor, x: Tensor, mean: Tensor, invstd: Tensor
    ) -> tuple[Tensor, Tensor]:
        total: Tensor = _added_up(self.kernels.gradient_sums(dy, x, mean, invstd))
        return total, total


def _added_up(sums: Any) -> Any:
    from torch.distributed.tensor import Replicate

    return sums.redistribute(
        placements=[Replicate() if p.is_partial() else p for p in sums.placements]
    )


def batch_norm(
    input: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    num_batches_tracked: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float | None,
    eps: float,
    training: bool,
) -> Tensor:
    """y of the whole batch (N, C, *), sharded over samples or channels as input is, else whole.

    A dimension of one element counts as whole: DTensor cannot reshape it back while it is sharded.
    Plain tensors among the others count as the same on every rank, as do their gradients.
    """
    from torch.distributed.tensor import Replicate, Shard

    kept = [type(p) is Shard and p.dim < 2 and input.shape[p.dim] > 1 for p in input.placements]
    places = [p if keep else Replicate() for p, keep in zip(input.placements, kept, strict=True)]
    x = input.redistribute(placements=places)
    mean, var, batches = (_on(x, t) for t in (running_mean, running_var, num_batches_tracked))
    weight, bias = _on(x, weight), _on(x, bias)
    if training or mean is None:
        rest = (mean, var, batches, weight, bias, momentum, eps)
        return synchronised(x, *rest, _Whole(LOCAL, composite))
    mean, var = (t.to(wide_dtype(t.device)) for t in (mean, var))
    known = Moments(mean.new_ones(()), mean, var).pack().unsqueeze(0)
    return composite.normalise(x, known, weight, bias, None, None, None, 0.0, eps)[0]


def _on(x: Any, tensor: Any) -> Any:
    """``tensor`` as a DTensor beside x, whose gradient comes back as the tensor is placed."""
    from torch.distributed.tensor import DTensor, Replicate

    if tensor is None:
        return None
    if is_dtensor(tensor):
        return tensor.redistribute(placements=tensor.placements)
    mesh = x.device_mesh
    return DTensor.from_local(tensor, mesh, [Replicate()] * mesh.ndim, run_check=False)
