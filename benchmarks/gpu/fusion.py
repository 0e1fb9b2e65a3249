"""The kernels that inductor makes of a block for a GPU, and the bytes they move, without one.

A block is traced on the CPU; what inductor gets is moved to a GPU that is not there, an H100 as far
as it asks. Its code is made and counted, but not run. It needs Triton.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils import _pytree

import syncbn
from syncbn.kernels import composite

from .calls import Case, laid_out
from .peer import Mirror

_H100 = SimpleNamespace(
    major=9,
    minor=0,
    multi_processor_count=132,
    regs_per_multiprocessor=65536,
    max_threads_per_multi_processor=2048,
    max_threads_per_block=1024,
    warp_size=32,
    total_memory=80 * 2**30,
    L2_cache_size=50 * 2**20,
    gcnArchName="",
)
_DEVICE = torch.device("cuda", 0)
_LARGE = 0.1  # of a tensor: less is numbers per channel


@dataclass(frozen=True)
class Pass:
    """tensors: reads and writes of kernels over whole tensors, in sizes of the input.

    wide: whether one of these computes in float64.
    """

    kernels: int
    tensors: tuple[float, ...]
    wide: bool

    @property
    def moved(self) -> float:
        return sum(self.tensors)


class _Counted(Exception):
    """The code is there: nothing is to be loaded."""


def layers(channels: int) -> dict[str, nn.Module]:
    ours = syncbn.SyncBatchNorm2d(channels, process_group=Mirror())
    return {"syncbn": ours, "batchnorm": nn.BatchNorm2d(channels)}


def count(block: nn.Module, case: Case, residual: bool = True) -> dict[str, Pass]:
    """Forward and backward of a block of an input and, where it takes one, a residual."""
    import torch._functorch.config
    from torch._inductor.compile_fx import compile_fx

    size = math.prod(case.shape) * case.dtype.itemsize
    found: dict[str, Pass] = {}

    def compile_inner(graph: Any, inputs: Any, **options: Any) -> Any:
        _compile_for_gpu(graph, inputs, options, size, found)

        def run(arguments: Any) -> Any:
            return graph(*arguments)

        run._boxed_call = True  # type: ignore[attr-defined]
        return run

    def backend(graph: Any, inputs: Any) -> Any:
        return compile_fx(graph, inputs, inner_compile=compile_inner)

    x, other = (
        laid_out(torch.zeros(case.shape, dtype=case.dtype), case.layout).requires_grad_()
        for _ in range(2)
    )
    torch._dynamo.reset()
    compiled = torch.compile(block, backend=backend, fullgraph=True, dynamic=False)
    serving = mock.patch("syncbn.kernels._usable", frozenset((composite.NAME,)))
    with serving, torch._functorch.config.patch(force_non_lazy_backward_lowering=True):
        compiled(*((x, other) if residual else (x,)))
    return found


def _compile_for_gpu(
    graph: Any, inputs: Any, options: Any, size: int, found: dict[str, Pass]
) -> None:
    from torch._inductor import metrics
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.exc import InductorError
    from torch._inductor.graph import GraphLowering

    mode = next(each.fake_mode for each in inputs if hasattr(each, "fake_mode"))

    def moved(value: Any) -> Any:
        if isinstance(value, torch.device):
            return _DEVICE
        if not isinstance(value, Tensor):
            return value
        with mode:
            return torch.empty_strided(
                value.shape, value.stride(), dtype=value.dtype, device=_DEVICE
            )

    def counted(lowering: Any) -> None:
        metrics.reset()
        lowering.codegen()
        name = "backward" if lowering.is_backward else "forward"
        found[name] = _counted(lowering, size, metrics.generated_kernel_count)
        raise _Counted

    there = copy.deepcopy(graph)
    for node in there.graph.nodes:
        if "val" in node.meta:
            node.meta["val"] = _pytree.tree_map(moved, node.meta["val"])
        node.args, node.kwargs = _pytree.tree_map(moved, (tuple(node.args), dict(node.kwargs)))
    there.recompile()
    with _gpu(), mock.patch.object(GraphLowering, "compile_to_module", counted):
        try:
            compile_fx_inner(there, [moved(each) for each in inputs], **options)
        except (_Counted, InductorError) as error:
            if not isinstance(getattr(error, "inner_exception", error), _Counted):
                raise


def _counted(lowering: Any, size: int, kernels: int) -> Pass:
    tensors, wide = [], False
    for node in lowering.scheduler.nodes:
        if node.is_extern():
            continue
        share = _bytes_of(lowering, node) / size
        if share > _LARGE:
            tensors.append(round(share, 2))
            wide |= any(_is_wide(lowering, dep.name) for dep in node.read_writes.reads)
    return Pass(kernels, tuple(tensors), wide)


def _bytes_of(lowering: Any, node: Any) -> int:
    """What a kernel reads and writes of memory; what it only hands on within it is neither."""
    reads, writes = node.read_writes.reads, node.read_writes.writes
    made = {dep.name for dep in writes}
    outside = [dep for dep in reads if dep.name not in made]
    outside += [dep for dep in writes if dep.name not in lowering.removed_buffers]
    return sum(lowering.get_dep_size_hint(dep) for dep in outside)


def _is_wide(lowering: Any, name: str) -> bool:
    dtype: torch.dtype = lowering.get_dtype(name)
    return dtype == torch.float64


@contextmanager
def _gpu() -> Iterator[None]:
    """A GPU, for all that inductor asks."""
    import torch._inductor.config
    from torch._dynamo.device_interface import CudaInterface

    def always(value: Any) -> Any:
        return lambda *_: value

    told = (
        (torch.cuda, "get_device_properties", _H100),
        (torch.cuda, "get_device_capability", (9, 0)),
        (torch.cuda, "current_device", 0),
        (CudaInterface, "get_device_properties", _H100),
        (CudaInterface, "get_compute_capability", 90),
        (CudaInterface, "is_available", True),
        (CudaInterface.Worker, "get_device_properties", _H100),
        (CudaInterface.Worker, "current_device", 0),
    )
    names = {
        "torch._inductor.scheduler.has_triton": True,
        "torch._inductor.compile_fx._check_triton_bf16_support": None,
        "torch.utils._triton.triton_hash_with_backend": "",
    }
    with ExitStack() as stack:
        for owner, name, value in told:
            answer: Any = always(value)
            if isinstance(owner, type):
                answer = staticmethod(answer)
            stack.enter_context(mock.patch.object(owner, name, answer))
        for path, value in names.items():
            stack.enter_context(mock.patch(path, always(value)))
        options = {"force_disable_caches": True, "compile_threads": 1}
        stack.enter_context(torch._inductor.config.patch(options))
        yield
