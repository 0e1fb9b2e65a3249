"""The table of transforms in docs/guides/transforms.md: every cell is what happens."""

from __future__ import annotations

import re

import pytest
import test_transforms as alone
import test_transforms_ranks as together
import torch
from torch.autograd import functional

import syncbn
from support.paths import ROOT
from support.transforms import TRANSFORMS

PAGE = (ROOT / "docs" / "guides" / "transforms.md").read_text()
ROWS = re.findall(r"^\| (.+?) \| (\w.*?) \| (\w.*?) \|$", PAGE, re.MULTILINE)[1:]
# Row → what shows it on one process, and over ranks
SHOWN = {
    "`torch.func.grad`, `vjp`": (["grad", "vjp"], ["grad", "vjp", "grad_of_grad"]),
    "`torch.func.jvp`": (["jvp"], ["jvp", "jvp_of_grad"]),
    "`torch.func.vmap`, around any of them or inside": (
        ["vmap", "vmap of vmap", "vmap of grad", "grad of vmap", "vmap of jvp"],
        ["vmap", "vmap_of_vmap", "vmap_of_grad", "grad_of_vmap", "vmap_of_a_recorded_backward"],
    ),
    "`torch.func.jacrev`, `jacfwd`, `hessian`": (["jacrev", "jacfwd", "hessian"], "func"),
    "`torch.func.linearize`": (["linearize"], "recorded"),
    "`torch.autograd.forward_ad`": (["dual numbers", "dual gradients"], ["forward_mode"]),
    "`is_grads_batched=True`, with `create_graph=True` or without": (
        ["is_grads_batched", "is_grads_batched, create_graph"],
        ["is_grads_batched", "is_grads_batched_create_graph"],
    ),
    "`torch.autograd.functional`, with `vectorize=True` or without": (
        [name for name in TRANSFORMS if name.startswith("functional.")],
        "functional",
    ),
    "all of them, in eval mode": (list(TRANSFORMS), "eval"),
    "running statistics that the transformed function captures": (
        "captured",
        "captured statistics",
    ),
}
JACOBIANS = {  # and whether their columns belong together, or their rows
    "func": [(torch.func.jacrev, False), (torch.func.jacfwd, True)],
    "functional": [
        (lambda f: lambda x: functional.jacobian(f, x), False),
        (lambda f: lambda x: functional.jacobian(f, x, vectorize=True), False),
        (
            lambda f: lambda x: functional.jacobian(f, x, vectorize=True, strategy="forward-mode"),
            True,
        ),
    ],
}


def test_every_row_is_shown():
    assert [row for row, *_ in ROWS] == list(SHOWN)


@pytest.mark.parametrize(("row", "cell"), [(row, cell) for row, cell, _ in ROWS])
def test_a_cell_of_one_process(row, cell):
    names, _ = SHOWN[row]
    if names == "captured":
        assert cell == "refused"
        alone.test_statistics_of_outside_are_refused_and_stay("grad", {})
        return
    assert cell == "works"
    for name in names:
        option = "eval, mask" if row.endswith("eval mode") else "masking"
        alone.test_every_option_under_every_transform(name, option)


@pytest.mark.parametrize(("row", "cell"), [(row, cell) for row, _, cell in ROWS])
def test_a_cell_over_ranks(ranks, row, cell):
    _, names = SHOWN[row]
    if isinstance(names, list):
        assert cell == "works"
        for name in names:
            together.test_the_whole_batch_under_transforms(ranks, name, (2, 1), "masked")
    elif names == "eval":
        assert cell == "works"
        together.test_eval_mode_says_nothing_in_any_transform()
    elif names in JACOBIANS:
        assert cell == "together"
        for jacobian, forwards in JACOBIANS[names]:
            check_jacobian(ranks, jacobian, forwards)
    else:
        assert cell == "refused"
        together.test_what_is_refused_on_all_ranks_alike(ranks, names)


def check_jacobian(ranks, jacobian, forwards):
    """Of two ranks, of one sample each."""
    x = torch.randn(2, 2, 2, dtype=torch.float64)
    options = {"dtype": torch.float64, "track_running_stats": False}

    def run(rank):
        layer = syncbn.SyncBatchNorm(2, **options)
        return jacobian(lambda x: layer(x))(x[rank : rank + 1])

    whole = functional.jacobian(torch.nn.BatchNorm1d(2, **options), x)
    own, others = (0, 3) if forwards else (3, 0)
    found = torch.cat(ranks(2, run), dim=own)
    torch.testing.assert_close(found, whole.sum(others, keepdim=True))
