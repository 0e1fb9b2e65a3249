"""Training steps never wait for the device, and CUDA graphs replay what eager steps do."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import syncbn

from .machine import Machine
from .networks import make_data, make_network, training_step
from .peer import BesideEmpty, Mirror
from .sections import Result, Skipped

_CHANNELS = 16
_REPLAYS = 3


def check_waits(machine: Machine) -> Result:
    """Whole training steps of one process, over ranks, and of a rank without samples."""
    if machine.is_gpu:
        _check_that_waits_are_noticed(machine)
    peers = {"alone": None, "over ranks": Mirror(), "empty rank": BesideEmpty()}
    failures = []
    for name, peer in peers.items():
        samples = 0 if isinstance(peer, BesideEmpty) else 4
        model = make_network(2 if machine.toy else _CHANNELS)
        model = syncbn.convert(model, peer).to(machine.device)
        failures += _failures(name, machine, model, samples)
    if machine.is_gpu and dist.is_nccl_available():
        failures += _failures_under_ddp(machine)
    if failures:
        raise AssertionError("; ".join(failures))
    if not machine.is_gpu:
        raise Skipped(f"steps run ({', '.join(peers)}); whether they wait needs a GPU")
    return Result(f"no step waits: {', '.join(peers)}, DDP over one NCCL rank")


def _failures(name: str, machine: Machine, model: nn.Module, samples: int) -> list[str]:
    """What is wrong with steps that must not wait, in words."""
    images, labels = make_data(samples)
    images, labels = images.float().to(machine.device), labels.to(machine.device)
    step = training_step(model, images, labels, share=0.1)
    for _ in range(1 if machine.toy else 3):  # compiles, and lets DDP arrange its buckets
        step()
    try:
        with _refusing_waits(machine):
            step()
    except Exception as error:
        return [f"{name}: {type(error).__name__}: {str(error)[:200]}"]
    return []


def _failures_under_ddp(machine: Machine) -> list[str]:
    """One NCCL rank; nothing where torch's own layers wait there, too."""
    with tempfile.TemporaryDirectory() as folder:
        place = f"file://{folder}/store"
        dist.init_process_group("nccl", init_method=place, rank=0, world_size=1)
        try:
            plain, ours = (make_network(_CHANNELS).to(machine.device) for _ in range(2))
            parallel = nn.parallel.DistributedDataParallel
            if _failures("torch", machine, parallel(plain, broadcast_buffers=False), 4):
                return []
            model = parallel(syncbn.convert(ours), broadcast_buffers=False)
            return _failures("DDP over NCCL", machine, model, 4) + _failures_of_messages(machine)
        finally:
            dist.destroy_process_group()


def _failures_of_messages(machine: Machine) -> list[str]:
    """What a layer sends over ranks, among the one rank of NCCL's group."""
    comm = syncbn.comm.resolve(dist.group.WORLD)
    tensor = torch.arange(9.0, dtype=torch.float64, device=machine.device)
    for send in (comm.all_gather, comm.all_reduce):
        send(tensor)  # the first makes a group
        try:
            with _refusing_waits(machine):
                found = send(tensor)
            torch.testing.assert_close(found.view(-1), tensor, rtol=0, atol=0)
        except Exception as error:
            return [f"{send.__name__} over NCCL: {type(error).__name__}: {str(error)[:200]}"]
    return []


@contextmanager
def _refusing_waits(machine: Machine) -> Iterator[None]:
    if not machine.is_gpu:
        yield
        return
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def _check_that_waits_are_noticed(machine: Machine) -> None:
    value = torch.ones((), device=machine.device)
    try:
        with _refusing_waits(machine):
            value.item()
    except RuntimeError:
        return
    raise AssertionError("torch.cuda.set_sync_debug_mode did not notice .item()")


def check_graphs(machine: Machine) -> Result:
    """A layer's step captured once and replayed equals the same steps in eager mode."""
    tried = 0
    for peer in (None, Mirror()):
        for layout in (torch.contiguous_format, torch.channels_last):
            for dtype in (torch.float32, torch.bfloat16):
                if machine.toy and tried:
                    break
                _check_graph(machine, peer, layout, dtype)
                tried += 1
    if not machine.is_gpu:
        raise Skipped("the steps run in eager mode; capture needs a GPU")
    return Result(f"{tried} layers, {_REPLAYS} replays each: bits as in eager mode")


def _check_graph(
    machine: Machine, peer: Mirror | None, layout: torch.memory_format, dtype: torch.dtype
) -> None:
    shape = (2, 3, 4, 5) if machine.toy else (4, 64, 56, 56)
    torch.manual_seed(0)
    batches = [
        torch.randn(shape, device=machine.device).to(dtype).contiguous(memory_format=layout)
        for _ in range(_REPLAYS)
    ]
    layers = [
        syncbn.SyncBatchNorm2d(shape[1], process_group=peer, device=machine.device)
        for _ in range(2)
    ]
    x = batches[0].clone().requires_grad_()
    step, eager = (_layer_step(layer, x) for layer in layers)
    replay = _captured(step, layers[0]) if machine.is_gpu else step
    for batch in batches:
        with torch.no_grad():
            x.copy_(batch)
        found = [t.clone() for t in (*replay(), *layers[0].state_dict().values())]
        expected = (*eager(), *layers[1].state_dict().values())
        for number, (a, b) in enumerate(zip(found, expected, strict=True)):
            assert torch.equal(a, b), f"tensor {number} of {dtype} differs in a replay"


def _layer_step(layer: nn.Module, x: Tensor) -> Callable[[], tuple[Tensor, ...]]:
    """y and all gradients."""

    def run() -> tuple[Tensor, ...]:
        y = layer(x)
        return y, *torch.autograd.grad(y, (x, *layer.parameters()), y.detach().square())

    return run


def _captured(
    step: Callable[[], tuple[Tensor, ...]], layer: nn.Module
) -> Callable[[], tuple[Tensor, ...]]:
    """The step as a graph; the layer's state is as before it was captured."""
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    stream: Any = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step()
    layer.load_state_dict(before)

    def replay() -> tuple[Tensor, ...]:
        graph.replay()
        return results

    return replay
