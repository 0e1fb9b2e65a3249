"""Where the compiled operators are missing: training says so once, and how to have them."""

from __future__ import annotations

import threading
import warnings

import pytest
import torch

import syncbn
from support.in_threads import in_threads
from syncbn import kernels, library
from syncbn.kernels import native

SAYS = (
    "syncbn trains tensors on the CPU with plain torch operations, which are slower than its "
    "compiled ones: libsyncbn.so was not built with this installation: c++: error: no such thing; "
    "with torch 2.10 or newer and g++ 11 or clang 14, or newer, installed, run 'pip install what' "
    "(https://syncbn.github.io/syncbn/install.html). To do without a warning, set "
    "SYNCBN_KERNELS=composite"
)


@pytest.fixture
def warned(monkeypatch, tmp_path):
    """The warnings so far of a process that has no library and has trained nothing."""
    (tmp_path / "libsyncbn.txt").write_text("c++: error: no such thing\npip install what\n")
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "libsyncbn.so")
    monkeypatch.setattr(library, "WHY_NOT", tmp_path / "libsyncbn.txt")
    monkeypatch.setattr(native, "_load", native._load.__wrapped__)
    monkeypatch.setattr(kernels, "_usable", None)
    monkeypatch.setattr(kernels, "_unsaid", threading.Lock())
    monkeypatch.delenv(kernels.VARIABLE, raising=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        yield caught


def train() -> None:
    x = torch.randn(4, 3, 5, requires_grad=True)
    syncbn.SyncBatchNorm(3)(x).sum().backward()


def test_training_warns_once(warned):
    for _ in range(3):
        train()
    assert [str(warning.message) for warning in warned] == [SAYS]
    assert warned[0].category is UserWarning


def test_ranks_that_are_threads_warn_once(warned):
    in_threads(4, lambda rank: train())
    assert len(warned) == 1


def test_nothing_is_said_where_nothing_is_missed(warned, monkeypatch):
    layer = syncbn.SyncBatchNorm(3)
    layer.eval()(torch.randn(4, 3))
    torch.compile(layer.train(), backend="eager", fullgraph=True)(torch.randn(4, 3))
    assert kernels.describe()["cpu"].startswith("composite (libsyncbn.so was not built")
    monkeypatch.setenv(kernels.VARIABLE, "composite")
    train()
    assert warned == []


@pytest.mark.usefixtures("warned")
def test_kernels_that_are_asked_for_but_missing_are_an_error(monkeypatch):
    monkeypatch.setenv(kernels.VARIABLE, "native")
    with pytest.raises(RuntimeError, match=r"got 'native', but libsyncbn\.so was not built with"):
        train()
