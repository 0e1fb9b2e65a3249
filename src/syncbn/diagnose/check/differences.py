"""How far tensors are apart, those of ranks put together among them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def largest(tensors: Any) -> float:
    found = [
        float(tensor.double().nan_to_num(0.0, 0.0, 0.0).abs().max())
        for tensor in tensors
        if tensor is not None and tensor.numel() and not tensor.is_complex()
    ]
    return max(found, default=0.0)


def noise(wanted: Tensor, moved: dict[str, Any] | None, what: str, place: int) -> float:
    if moved is None or place >= len(moved[what]) or moved[what][place] is None:
        return 0.0
    other = moved[what][place]
    return difference(wanted, other) if other.shape == wanted.shape else 0.0


def difference(wanted: Tensor, given: Tensor) -> float:
    """The largest |wanted − given|; 0 for equal infinities and two nans, else inf for them."""
    if wanted.shape != given.shape:
        return float("inf")
    if wanted.is_complex():
        wanted, given = torch.view_as_real(wanted), torch.view_as_real(given)
    a, b = wanted.double(), given.double()
    same = (a == b) | (a.isnan() & b.isnan())
    apart = torch.where(same, 0.0, (a - b).abs()).nan_to_num(float("inf"), float("inf"))
    return float(apart.max()) if apart.numel() else 0.0


def joined_difference(
    wanted: Tensor, parts: Sequence[Tensor], samples: int, *, gradients: bool = False
) -> float | None:
    """How far the ranks' tensors, put together, are from one process's; None: they don't fit.

    Together along the one dimension in which they differ; the rows of a sample, where it has
    several, may be neighbours or lie in blocks (two views, one after the other). What has no
    samples (an embedding of positions) each rank has as one process does; gradients of it add up.
    """
    if any(part.dim() != wanted.dim() for part in parts):
        return None
    if all(part.shape == wanted.shape for part in parts):
        if gradients:
            return difference(wanted, torch.stack(list(parts)).sum(0))
        return max(difference(wanted, part) for part in parts)
    for dim in range(wanted.dim()):
        rest = [[*part.shape[:dim], *part.shape[dim + 1 :]] for part in (wanted, *parts)]
        sizes = [part.shape[dim] for part in parts]
        if sum(sizes) != wanted.shape[dim] or any(each != rest[0] for each in rest):
            continue
        apart = difference(wanted, torch.cat(list(parts), dim))
        rows, left = divmod(wanted.shape[dim], samples)
        if apart and rows > 1 and not left and all(size % rows == 0 for size in sizes):
            views = [torch.unflatten(part, dim, (rows, -1)) for part in parts]
            blocks = torch.cat(views, dim + 1).flatten(dim, dim + 1)
            apart = min(apart, difference(wanted, blocks))
        return apart
    return None
