"""Whether tensors have their values in memory: sharding and offloading free or shrink storages."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from .inductor import input_behind, lower
from .operators import define
from .transforms import exporting, unwrapped

PLAIN = (Tensor, Parameter)


def is_dtensor(tensor: Tensor | None) -> bool:
    """Whether this is a DTensor, without importing what makes them."""
    if tensor is None or type(tensor) in PLAIN:
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def check_held(named: dict[str, Tensor | None], operation: str = "sync_batch_norm") -> None:
    """Refuse tensors whose storage ends before their sizes and strides do: it was freed since."""
    for name, given in named.items():
        if given is not None and not is_held(given):
            tensor = _innermost(given)
            raise RuntimeError(
                f"{operation}: expected {name} with its values in memory, got a storage of "
                f"{tensor.untyped_storage().nbytes()} bytes where it needs {_needed(tensor)}; it "
                "was freed or shrunk, as sharding and offloading do: gather it or bring it back "
                "first"
            )


def held_in_graph(
    copied: dict[str, Tensor], others: dict[str, Tensor | None] | None = None
) -> list[Tensor]:
    """Copies of tensors, made in a compiled graph once they and the others were seen to be held.

    A graph is free to read what does not depend on this before it. DTensors aren't looked at, nor
    is what an exported program, which runs without syncbn, will be given.
    """
    if exporting() or any(map(is_dtensor, copied.values())):
        return [tensor.clone() for tensor in copied.values()]
    given = {name: tensor for name, tensor in (others or {}).items() if tensor is not None}
    copies: list[Tensor] = torch.ops.syncbn.held.default(
        list(copied.values()), list(given.values()), [*copied, *given]
    )
    return copies


def _held(copied: list[Tensor], others: list[Tensor], names: list[str]) -> list[Tensor]:
    check_held(dict(zip(names, (*copied, *others), strict=True)))
    return [tensor.clone() for tensor in copied]


def _held_shapes(copied: list[Tensor], *_: Any) -> list[Tensor]:
    lower(torch.ops.syncbn.held.default, _look_at_inputs_alone)
    return [torch.empty_like(tensor) for tensor in copied]


def _look_at_inputs_alone(lowerings: Any) -> Callable[..., Any]:
    """What a graph of inductor's computes nobody frees: to be looked at it would have to be written
    to memory first, and could not fuse.
    """
    operator = torch.ops.syncbn.held.default
    call = lowerings.fallback_handler(operator, add_to_fallback_set=False)

    def lowered(copied: Any, others: Any, names: Any) -> Any:
        inputs = [input_behind(tensor) for tensor in others]
        pairs = zip(inputs, names[len(copied) :], strict=True)
        given = [(tensor, name) for tensor, name in pairs if tensor is not None]
        looked_at = [*names[: len(copied)], *(name for _, name in given)]
        return call(copied, [tensor for tensor, _ in given], looked_at)

    return lowered


define("held(Tensor[] copied, Tensor[] others, str[] names) -> Tensor[]", _held, _held_shapes)


def _innermost(tensor: Tensor) -> Tensor:
    """The tensor with the values, inside a transform's wrappers or a DTensor."""
    tensor = unwrapped(tensor)
    return tensor._local_tensor if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def is_held(tensor: Tensor) -> bool:
    return torch.compiler.is_compiling() or has_storage(tensor)  # there are no values yet


def has_storage(tensor: Tensor) -> bool:
    """:func:`is_held` where nothing compiles."""
    try:
        held = tensor.untyped_storage().nbytes()
    except NotImplementedError:
        inner = _innermost(tensor)
        return inner is tensor or has_storage(inner)
    if type(tensor) not in PLAIN and is_dtensor(tensor):
        return has_storage(_innermost(tensor))
    if held == tensor.nbytes and tensor.is_contiguous() and not tensor.storage_offset():
        return True  # as mostly: in half the time
    return held >= _needed(tensor)


def _needed(tensor: Tensor) -> int:
    """How many bytes of a storage sizes and strides reach."""
    if not tensor.numel():
        return 0
    pairs = zip(tensor.shape, tensor.stride(), strict=True)
    last = int(tensor.storage_offset()) + sum((size - 1) * stride for size, stride in pairs)
    return (last + 1) * tensor.itemsize


def form_of(tensor: Tensor) -> str | None:
    """What keeps a tensor from having strides of its own, in words."""
    if tensor.is_nested:
        return "nested"
    dense = tensor.layout is torch.strided
    return None if dense else str(tensor.layout).removeprefix("torch.").strip("_")
