"""What DataParallel does with inputs and outputs of every kind."""

from __future__ import annotations

import collections
from typing import NamedTuple

import pytest
import torch
from torch import nn

import syncbn
from syncbn.batches.scatter import gather, scatter

CPU = torch.device("cpu")


class Point(NamedTuple):
    x: torch.Tensor
    label: object


class Batch(dict):
    pass


@pytest.mark.parametrize(
    ("samples", "sizes"), [(4, [2, 1, 1]), (2, [1, 1]), (1, [1]), (0, [0]), (7, [3, 2, 2])]
)
def test_shares_are_as_even_as_possible(samples, sizes):
    x = torch.arange(2.0 * samples).view(samples, 2)
    shares = scatter(x, [CPU] * 3)
    assert [len(share) for share in shares] == sizes
    assert torch.equal(torch.cat(shares), x)
    assert torch.equal(torch.cat(scatter(x.t(), [CPU] * 3, dim=1), 1), x.t())


def test_every_nesting():
    tensor, marker = torch.arange(4), object()
    nested = (
        [tensor, {"a": tensor, "b": (marker, None, "text", 3)}],
        Point(tensor, "point"),
        collections.OrderedDict(z=tensor, a=[]),
        collections.defaultdict(list, x=[tensor]),
        Batch(x=tensor),
        torch.tensor(5.0),
        (),
    )
    shares = scatter(nested, [CPU] * 2)
    assert len(shares) == 2
    for number, share in enumerate(shares):
        assert [type(item) for item in share] == [type(item) for item in nested]
        half = tensor[2 * number : 2 * number + 2]
        for found in (
            share[0][0],
            share[0][1]["a"],
            share[1].x,
            share[2]["z"],
            share[3]["x"][0],
            share[4]["x"],
        ):
            assert torch.equal(found, half)
        assert share[0][1]["b"] == (marker, None, "text", 3)
        assert share[3].default_factory is list
        assert share[5] == 5
    together = gather([share[:5] for share in shares], CPU)
    again = gather([share[:5] for share in scatter(nested, [CPU])], CPU)
    assert repr(together).replace(hex(id(marker)), "") == repr(again).replace(hex(id(marker)), "")
    assert together[1].label == "point"


def test_tensors_of_different_lengths_lose_nothing():
    a, b = torch.arange(5), torch.arange(2)
    shares = scatter((a, b), [CPU] * 3)
    assert [(len(x), len(y)) for x, y in shares] == [(3, 1), (2, 1)]
    assert len(scatter((a, torch.ones(1)), [CPU] * 3)) == 1


def test_scalars_become_a_vector():
    losses = [torch.tensor(1.0, requires_grad=True), torch.tensor(2.0)]
    assert gather(losses, CPU).tolist() == [1.0, 2.0]
    assert gather(losses, CPU).requires_grad


@pytest.mark.parametrize(
    ("outputs", "error", "words"),
    [
        ([torch.ones(1), None], TypeError, "got Tensor, NoneType"),
        ([[torch.ones(1)], (torch.ones(1),)], TypeError, "got list, tuple"),
        ([[torch.ones(1)], []], ValueError, "got lists of lengths 1, 0"),
        ([{"a": 1}, {"b": 1}], ValueError, r"got dicts with the keys \['a'\], \['b'\]"),
        ([{"n": 1}, {"n": 2}], TypeError, "got 1, 2; return what differs as tensors"),
        ([object(), object()], TypeError, "got <object"),
    ],
)
def test_outputs_that_differ(outputs, error, words):
    with pytest.raises(error, match=f"same nesting of tuples, lists and dicts of tensors, {words}"):
        gather(outputs, CPU)


class Asked(nn.Module):
    """Returns what it gets, with its batch norm applied to the first."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = syncbn.SyncBatchNorm1d(2, affine=False)

    def forward(self, x=None, *rest, scale=1, **others):
        return {"y": None if x is None else self.norm(x) * scale, "rest": rest, **others}


def test_inputs_by_position_and_keyword():
    x = torch.randn(5, 2).double()
    model = syncbn.DataParallel(Asked().double(), ["cpu"] * 3)
    expected = nn.functional.batch_norm(x, None, None, training=True)
    by_position = model(x, [x, (x, "a")], scale=2, mask=x > 0)
    torch.testing.assert_close(by_position["y"], 2 * expected)
    assert torch.equal(by_position["rest"][0][1][0], x)
    assert torch.equal(by_position["mask"], x > 0)
    by_keyword = model(scale=x[:, :1], x=x)
    torch.testing.assert_close(by_keyword["y"], expected * x[:, :1])
    assert model() == {"y": None, "rest": ()}
    assert model(None, 3) == {"y": None, "rest": (3,)}


def test_replicas_do_not_change_their_callers_tensors():
    x = torch.randn(5, 2)
    before = x.clone()
    syncbn.DataParallel(nn.ReLU(inplace=True), ["cpu"] * 3)(x)
    assert torch.equal(x, before)


def test_a_module_that_changes_a_graphs_tensor_in_place():
    x = torch.randn(5, 2, requires_grad=True)
    y = syncbn.DataParallel(nn.Sequential(nn.ReLU(inplace=True), nn.Tanh()), ["cpu"] * 3)(x * 1)
    y.sum().backward()
    torch.testing.assert_close(x.grad, (1 - y.detach() ** 2) * (x > 0))
