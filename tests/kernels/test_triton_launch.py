"""How kernels start: with a stand-in for Triton, and tensors on the CPU in place of a device's."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from support.cases import laid_out
from support.launches import Stand
from syncbn import kernels
from syncbn.kernels import Affine, Running, Statistics
from syncbn.kernels import triton as gpu
from syncbn.kernels.triton import launch, steps


@pytest.fixture
def stand(monkeypatch):
    """A driver of one device that is the CPU, on which nothing runs."""
    stand = Stand()
    monkeypatch.setattr(launch, "kernel", stand.kernel)
    monkeypatch.setattr(launch, "_modules", lambda: (stand, None, None))
    monkeypatch.setattr(launch, "_keeps", lambda: True)
    monkeypatch.setattr(launch, "_kept", {})
    monkeypatch.setattr(launch, "_scratch", {})
    launch.dtypes.cache_clear()
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda device: 7, raising=False)
    yield stand
    launch.dtypes.cache_clear()


def test_a_kernel_is_compiled_once(stand):
    x = torch.randn(4, 8, 6, 6)
    for _ in range(3):
        gpu.measure(x)
    assert [name for name, *_ in stand.compiled] == ["measure"]
    assert len(stand.runs) == 2
    _, grid, arguments, warps = stand.compiled[0]
    for run in stand.runs:
        assert run[:9] == (*grid, 1, 7, "a function", "its metadata", None, None, None)
        assert run[9] is x
        assert run[13:] == arguments[4:]
        assert len(run) == 9 + len(arguments)
    assert warps in (1, 2, 4, 8)


@pytest.mark.parametrize(
    "other",
    [
        torch.randn(4, 8, 6, 6).double(),
        torch.randn(4, 8, 6, 6).half(),
        torch.randn(1 + 4 * 8 * 6 * 6)[1:].view(4, 8, 6, 6),  # not aligned
        laid_out(torch.randn(4, 8, 6, 6), "channels_last"),
        torch.randn(4, 8, 7, 7),
    ],
    ids=["float64", "float16", "unaligned", "channels_last", "7×7"],
)
def test_arguments_of_another_kind_have_a_kernel_of_their_own(stand, other):
    for x in (torch.randn(4, 8, 6, 6), other):
        gpu.measure(x)
        gpu.measure(x)
    assert len(stand.compiled) == len(stand.runs) == 2


def test_sizes_share_a_kernel(stand):
    for shape in ((4, 8, 64, 64), (4, 24, 64, 64), (9, 8, 64, 128)):
        gpu.measure(torch.randn(shape))
    assert len(stand.compiled) == 1


def test_options_of_a_layer_have_kernels_of_their_own(stand):
    x, (weight, bias) = torch.randn(4, 8, 6, 6), torch.rand(2, 8)
    sets = torch.zeros(3, 17, dtype=torch.float64)
    for affine, running in (
        (Affine(weight, bias), Running()),
        (Affine(weight, None), Running()),
        (Affine(weight.half(), bias), Running()),
        (Affine(weight, bias), Running(torch.zeros(8), torch.ones(8), torch.tensor(0))),
        (Affine(weight, bias), Running(None, None, torch.tensor(0), None)),
    ):
        for momentum in (running.momentum, running.momentum and 0.2):
            gpu.normalise(
                x, sets, affine=affine, running=running._replace(momentum=momentum), eps=1e-5
            )
    assert len(stand.compiled) == len(stand.runs) == 5


def test_versions_that_were_not_tried_start_by_the_public_call(stand, monkeypatch):
    monkeypatch.setattr(launch, "_keeps", lambda: False)
    x = torch.randn(4, 8, 6, 6)
    for _ in range(2):
        gpu.measure(x)
    _, grid, arguments, warps = stand.compiled[0]
    called = launch.PublicCall("measure", warps)
    called.run(*grid, 1, 7, called.function, called.packed_metadata, None, None, None, *arguments)
    assert stand.compiled[2] == ("measure", (*grid, 1), arguments, warps)
    assert (len(stand.compiled), stand.runs) == (3, [])


def test_the_first_use_may_not_be_in_a_capture(stand, monkeypatch):
    x = torch.randn(4, 8, 6, 6)
    gpu.measure(x)
    monkeypatch.setattr(launch, "_is_capturing", lambda device: True)
    gpu.measure(x)
    said = r"got the first measure of tensors of this kind in the middle of one; run the model once"
    with pytest.raises(RuntimeError, match=said):
        gpu.measure(x.double())


def test_calls_of_a_stream_share_memory_and_those_of_a_capture_do_not(stand, monkeypatch):
    x = torch.randn(2, 3)
    first = launch.meeting_place(x, 10, 10)
    assert launch.meeting_place(x, 20, 30)[0] is first[0]
    grown = launch.meeting_place(x, 5000, 10)
    assert grown[0].numel() >= 5000
    assert grown[1].numel() >= first[1].numel()
    assert not grown[0].any()
    monkeypatch.setattr(launch, "_is_capturing", lambda device: True)
    assert launch.meeting_place(x, 10, 10)[0] is not launch.meeting_place(x, 10, 10)[0]


def pair():
    return torch.randn(4, 3, 5), torch.zeros(2, 7, dtype=torch.float64)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda x, sets: gpu.measure(x[0, 0]), r"measure: expected x of shape \(N, C, \*\)"),
        (lambda x, sets: gpu.measure(x.int()), r"got shape \(4, 3, 5\) and torch.int32"),
        (lambda x, sets: gpu.normalise(x, sets[:, :5], eps=1e-5), r"sets as float64 of shape"),
        (lambda x, sets: gpu.normalise(x, sets.float(), eps=1e-5), r"got torch.float32 of shape"),
        (
            lambda x, sets: gpu.normalise(x, sets, affine=Affine(torch.ones(4)), eps=1e-5),
            r"normalise: expected parameters and running statistics as floating tensors of shape "
            r"\(3,\) on cpu, got torch.float32 of shape \(4,\)",
        ),
        (
            lambda x, sets: gpu.measure_checked(
                x, affine=Affine(), running=Running(batches=torch.tensor([0, 1]))
            ),
            "measure: expected num_batches_tracked as one real number",
        ),
        (
            lambda x, sets: gpu.gradient_sums(x[:2], x, Statistics(*sets[:, :3], sets[0, 0])),
            "gradient_sums: expected dy of x's dtype and shape",
        ),
        (
            lambda x, sets: gpu.gradient_sums(x, x, Statistics(*sets[:, ::3], sets[0, 0])),
            "gradient_sums: expected mean contiguous",
        ),
    ],
    ids=["x", "integers", "sets", "floats", "parameters", "counter", "dy", "mean"],
)
def test_memory_is_not_read_before_it_is_seen_to_be_fit(stand, call, said):
    with pytest.raises(RuntimeError, match=said):
        call(*pair())
    assert not stand.compiled


def test_a_freed_storage_is_refused(stand):
    x, sets = pair()
    weight = torch.ones(3)
    for tensor, call in (
        (weight, lambda: gpu.normalise(x, sets, affine=Affine(weight), eps=1e-5)),
        (x, lambda: gpu.measure(x)),
    ):
        tensor.untyped_storage().resize_(0)
        with pytest.raises(RuntimeError, match="was freed or shrunk"):
            call()
    assert not stand.compiled


@pytest.mark.parametrize("layout", ["contiguous", "strided"])
def test_without_memory_for_the_output_nothing_moves(stand, monkeypatch, layout):
    def none(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory")

    x = laid_out(torch.randn(4, 8, 6, 6), layout)
    batches = torch.tensor(0)
    running = Running(torch.zeros(8), torch.ones(8), batches, None)
    monkeypatch.setattr(torch, "empty_like", none)
    for call in (
        lambda: gpu.batch_norm(x, affine=Affine(), running=running, eps=1e-5),
        lambda: gpu.normalise(
            x, torch.zeros(1, 17, dtype=torch.float64), running=running, eps=1e-5
        ),
    ):
        with pytest.raises(torch.OutOfMemoryError):
            call()
    assert batches == 0
    assert "normalise" not in [name for name, *_ in stand.compiled]


def test_a_launch_that_fails_counts_no_batch(stand, monkeypatch):
    """Of a cumulative average, which counts it beforehand."""

    def failing(*_, **__):
        raise RuntimeError("no such kernel")

    batches = torch.tensor(3)
    running = Running(torch.zeros(8), torch.ones(8), batches, None)
    x, sets = torch.randn(4, 8, 6, 6), torch.zeros(1, 17, dtype=torch.float64)
    gpu.normalise(x, sets, running=running, eps=1e-5)
    monkeypatch.setattr(steps, "launch", failing)
    with pytest.raises(RuntimeError, match="no such kernel"):
        gpu.normalise(x, sets, running=running, eps=1e-5)
    assert batches == 4


def test_who_asks_is_told_what_serves_gpus():
    said = kernels.describe()["cuda"]
    if gpu.unavailable():
        assert said == f"composite ({gpu.unavailable()})"
    else:
        assert said.startswith(("triton (", "composite (SYNCBN_KERNELS says so"))


def test_only_tensors_on_gpus_are_taken(monkeypatch):
    monkeypatch.delenv("SYNCBN_KERNELS", raising=False)
    assert not gpu.supports(torch.empty(2, 2))
    assert not gpu.supports(torch.empty(2, 2, device="meta"))
    assert not gpu.supports_others(Affine(torch.ones(2)), Running())


@pytest.mark.parametrize("backend", ["nvidia", "amd"])
def test_triton_compiles_for_nothing_that_the_key_of_a_kept_kernel_lacks(backend):
    """Types of tensors, the alignment of the first ones, constants: not sizes, nor momentum."""
    pytest.importorskip("triton")
    import triton.language as tl
    from triton.backends.amd.compiler import HIPBackend
    from triton.backends.compiler import GPUTarget
    from triton.backends.nvidia.compiler import CUDABackend
    from triton.runtime.jit import JITFunction, create_function_from_signature

    from syncbn.kernels.triton import backward, forward

    if not isinstance(forward.measure, JITFunction):
        pytest.skip("TRITON_INTERPRET is set")
    target = GPUTarget("cuda", 90, 32) if backend == "nvidia" else GPUTarget("hip", "gfx942", 64)
    made = (CUDABackend if backend == "nvidia" else HIPBackend)(target)
    for kernel in (
        *(forward.measure, forward.merge_sets, forward.normalise),
        *(backward.gradient_sums, backward.input_gradient),
    ):
        bind = create_function_from_signature(kernel.signature, kernel.params, made)
        found = []
        for shift, size, real in ((0, 16, 1.0), (1, 1, 0.1), (1, 2**40, 1e-5)):
            arguments: list[Any] = []
            for parameter in kernel.params:
                if parameter.is_constexpr:
                    arguments.append(tl.float32)
                elif parameter.annotation_type:
                    arguments.append(size if parameter.annotation_type == "i64" else real)
                else:
                    first = len(arguments) < launch.ALIGNED
                    arguments.append(torch.zeros(9)[0 if first else shift :])
            found.append(bind(*arguments, num_warps=8)[1])
        assert found[0] == found[1] == found[2], kernel.__name__
