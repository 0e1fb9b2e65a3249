"""Ranges with a layer's name around its forward and backward, while one of torch's profilers runs.

Who calls asks for that first: the rest takes a thousand times as long as the question.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch.nn as nn
from torch import Tensor
from torch.autograd import profiler

from .identity import identity_of, name_in_model


@contextmanager
def profiled(layer: nn.Module | None, inputs: Sequence[Any]) -> Iterator[list[Tensor]]:
    """A range around a forward, whose output is to be put into the list: backward gets one, too."""
    name = name_in_model(layer) or identity_of(layer)
    outputs: list[Tensor] = []
    with profiler.record_function(f"syncbn forward: {name}"):
        yield outputs
    ends = {x.grad_fn for x in inputs if isinstance(x, Tensor)}
    first = outputs[0].grad_fn
    is_replica = getattr(layer, "_is_replica", False)  # from its node on the others' graphs go on
    for node in {first} if is_replica and first else _nodes_between(first, ends):
        _Range(f"syncbn backward: {name}").around(node)


def _nodes_between(begin: Any, ends: set[Any]) -> set[Any]:
    """The nodes of a graph from begin on, up to the ends and to the leaves, which are left out."""
    found: set[Any] = set()
    waiting = [begin]
    while waiting:
        node = waiting.pop()
        if node is not None and not (node in ends or node in found or hasattr(node, "variable")):
            found.add(node)
            waiting += [following for following, _ in node.next_functions]
    return found


class _Range:
    """A range around a node of the graph whenever it runs while a profiler does."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._open: list[Any] = []

    def around(self, node: Any) -> None:
        node.register_prehook(self._begin)
        node.register_hook(self._end)

    def _begin(self, *_: Any) -> None:
        if profiler._is_profiler_enabled:
            opened: Any = profiler.record_function(self._name)
            self._open.append(opened.__enter__())

    def _end(self, *_: Any) -> None:
        if self._open:
            self._open.pop().__exit__(None, None, None)
