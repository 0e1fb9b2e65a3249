"""Large results of the compiled operators ask for huge pages, which changes no number."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from support import oracle
from support.kernels import needs_native
from support.scripts import execute
from syncbn.kernels import native
from syncbn.kernels.interface import NO_AFFINE, NO_RUNNING

LEAST = 32 << 20  # bytes
SMAPS = Path("/proc/self/smaps")

pytestmark = needs_native
where_they_are = pytest.mark.skipif(
    not Path("/sys/kernel/mm/transparent_hugepage").exists()
    or not SMAPS.exists()
    or "VmFlags" not in SMAPS.read_text(),
    reason="no huge pages in this kernel, or it does not say where",
)


def asks(t: Tensor) -> bool:
    """Whether the mapping that holds the middle of t is marked for huge pages."""
    middle, inside = t.data_ptr() + t.nbytes // 2, False
    for line in SMAPS.read_text().splitlines():
        first = line.split(maxsplit=1)[0]
        if "-" in first:  # a mapping's range of addresses, before what is said of it
            begin, end = (int(address, 16) for address in first.split("-"))
            inside = begin <= middle < end
        elif inside and first == "VmFlags:":
            return "hg" in line.split()
    raise AssertionError("no mapping holds the tensor")


def fused(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """y and dx of one process."""
    y, saved = native.batch_norm(x, affine=NO_AFFINE, running=NO_RUNNING, eps=1e-5)
    dx, *_ = native.batch_norm_backward(dy, x, affine=NO_AFFINE, saved=saved)
    return y, dx


def steps(x: Tensor, dy: Tensor) -> tuple[Tensor, Tensor]:
    """y and dx as over ranks."""
    sets = native.measure(x)[None]
    y, found = native.normalise(x, sets, affine=NO_AFFINE, eps=1e-5)
    sums = native.gradient_sums(dy, x, found)
    return y, native.input_gradient(dy, x, weight=None, statistics=found, sums=sums)


@where_they_are
@pytest.mark.parametrize("train", [fused, steps])
def test_large_results_ask(train):
    x = torch.randn(LEAST // 256, 64)
    assert [asks(result) for result in train(x, x)] == [True, True]


def print_who_asks() -> None:
    """Of a size below the least, then of the least, whose memory the other could get again."""
    for rows in (LEAST // 256 - 1, LEAST // 256):
        x = torch.randn(rows, 64)
        print([asks(result) for result in fused(x, x)])


@where_they_are
def test_smaller_results_do_not():
    program = "from kernels.test_huge_pages import print_who_asks; print_who_asks()"
    (done,) = execute(program, THP_MEM_ALLOC_ENABLE="0")
    assert (done.stderr, done.stdout) == ("", "[False, False]\n[True, True]\n")


def test_numbers_are_right():
    """Of a channel in the midst, whose values lie on huge pages and between them."""
    x, dy = torch.randn(2, 10, 64, 128, 128)
    y, dx = fused(x, dy)
    expected = oracle.batch_norm(x[:, 31:32], dy[:, 31:32])
    oracle.assert_close(y[:, 31:32], expected.y)
    oracle.assert_close(dx[:, 31:32], expected.dx)


PROGRAM = """
import ctypes, torch, syncbn
torch.set_num_threads(1)
x = torch.randn(10, 64, 128, 128, requires_grad=True)  # of 40 MiB
dy = torch.randn(x.shape)
layer = syncbn.SyncBatchNorm(64)

def step():
    x.grad = None
    y = layer(x)
    y.backward(dy)
    return y.detach(), x.grad

before = step()
assert ctypes.CDLL(None).prctl(41, 1, 0, 0, 0) == 0  # PR_SET_THP_DISABLE
for one, other in zip(before, step()):
    assert torch.equal(one, other)
print("same")
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs prctl")
def test_switched_off_for_a_process():
    (done,) = execute(PROGRAM)
    assert (done.code, done.stdout, done.stderr) == (0, "same\n", "")
