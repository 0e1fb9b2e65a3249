"""Batch norms inside compiled graphs, where no layer is left; and how to do without graphs."""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import torch
import torch.nn as nn
from torch.fx import Graph, GraphModule, Node


def compiled_batch_norms(model: nn.Module) -> Iterator[tuple[str, nn.Module, str]]:
    """(its name, the module that holds it, what it is) of each that takes a batch's statistics.

    They are the operators in the graphs of torch.fx and torch.export, and the innermost modules of
    torch.jit.script and torch.jit.trace that run one.
    """
    for name, module in model.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            inside = [child for child in module.modules() if child is not module]
            if _runs_one(module) and not any(map(_runs_one, inside)):
                yield name, module, f"{module.original_name} in {type(module).__qualname__}"
        graph = _graph_of(module)
        if isinstance(graph, Graph):
            kind = GraphModule if isinstance(module, GraphModule) else type(module)
            for node in filter(_is_one, graph.nodes):
                yield _place(name, node), module, f"{_spelled(node.target)} in {kind.__name__}"


def has_graphs(model: nn.Module) -> bool:
    """Whether a part of it is a compiled graph, whatever that does."""
    return any(
        isinstance(module, torch.jit.ScriptModule) or isinstance(_graph_of(module), Graph)
        for module in model.modules()
    )


def _graph_of(module: nn.Module) -> Any:
    return vars(module).get("_graph", vars(module).get("graph"))


def _runs_one(module: Any) -> bool:
    """Whether a scripted or traced module's graph has a batch norm that may train."""
    try:
        graph = module.inlined_graph
    except (AttributeError, RuntimeError):  # one without a compiled forward
        return False
    nodes = graph.findAllNodes("aten::batch_norm")
    return any(node.inputsAt(5).toIValue() is not False for node in nodes)


def _is_one(node: Node) -> bool:
    """Whether a node of torch.fx is a batch norm that may train."""
    name = _spelled(node.target)
    known = node.op == "call_function" and "batch_norm" in name and not name.startswith("syncbn.")
    if not known or any(word in name for word in ("no_training", "no_update", "backward")):
        return False
    place = 3 if name.endswith(".no_stats") else 5
    default = node.args[place] if len(node.args) > place else False
    return node.kwargs.get("training", default) is not False


def _spelled(target: Any) -> str:
    """aten.batch_norm.default, torch.nn.functional.batch_norm"""
    if isinstance(target, torch._ops.OpOverload):
        return str(target)
    module = getattr(target, "__module__", None) or "torch"
    return f"{module}.{getattr(target, '__name__', target)}"


def _place(name: str, node: Node) -> str:
    """Where the node was in the model that was captured as ``name``, as far as is known."""
    stack = list(node.meta.get("nn_module_stack", {}).values())
    inside = stack[-1][0] if stack else node.name
    return name if name.endswith(inside) else f"{name}.{inside}".lstrip(".")


class _WithoutGraphs:
    """A context in which what torch.compile has compiled is not: graphs know no new hooks.

    The process has one such setting, and ranks may be threads: the first sets it, the last resets.
    """

    def __init__(self) -> None:
        self._changing, self._inside, self._stance = threading.Lock(), 0, ExitStack()

    def __enter__(self) -> None:
        with self._changing:
            if not self._inside and "torch._dynamo" in sys.modules:
                self._stance.enter_context(torch.compiler.set_stance("force_eager"))
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._changing:
            self._inside -= 1
            if not self._inside:
                self._stance.close()


without_graphs = _WithoutGraphs()
