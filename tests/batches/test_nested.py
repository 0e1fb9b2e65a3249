"""Every container that a batch may be made of: empty batches and DataParallel take the same."""

from __future__ import annotations

import collections
import types
from dataclasses import dataclass, field
from typing import NamedTuple

import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import syncbn
from syncbn.batches.empty import samples_in, without_samples
from syncbn.batches.nested import mapped, parts
from syncbn.batches.scatter import gather, scatter

CPU = torch.device("cpu")
X = torch.arange(10.0).view(5, 2)


class Named(NamedTuple):
    x: torch.Tensor


class OwnList(list):
    pass


class OwnDict(dict):
    pass


@dataclass(frozen=True)
class Frozen:
    x: torch.Tensor
    threshold: float = 0.5


@dataclass(slots=True)
class Slotted:
    x: torch.Tensor
    later: object = field(init=False, default=None)


def with_attribute(container):
    container.note = "kept"
    return container


CONTAINERS = [
    *([X], (X,), Named(X), OwnList([X]), {"x": X}, OwnDict(x=X), Frozen(X), Slotted(X)),
    *(collections.OrderedDict(x=X), collections.defaultdict(list, x=X), collections.UserDict(x=X)),
    *(types.MappingProxyType({"x": X}), collections.ChainMap({"x": X}), torch.max(X, 1)),
    *(with_attribute(OwnList([X])), with_attribute(OwnDict(x=X))),
    *([{"a": (X, [Named(X)])}], {}, []),
]


@pytest.mark.parametrize("container", CONTAINERS, ids=lambda c: type(c).__name__)
def test_empty_batches_and_shares_are_containers_of_the_same_kind(container):
    empty, shares = without_samples(container), scatter(container, [CPU] * 2)
    for other in (empty, *shares, gather(shares, CPU)):
        assert type(other) is type(container)
        assert vars(other) == vars(container) if isinstance(container, (OwnDict, OwnList)) else True
    tensors = [list(syncbn.batches.nested.tensors(other)) for other in (empty, *shares)]
    whole = list(syncbn.batches.nested.tensors(container))
    for x, none, first, second in zip(whole, *tensors, strict=True):
        assert none.shape == (0, *x.shape[1:])
        assert torch.equal(torch.cat((first, second)), x)
    again = list(syncbn.batches.nested.tensors(gather(shares, CPU)))
    assert all(torch.equal(one, other) for one, other in zip(again, whole, strict=True))
    if whole:
        assert samples_in(container) == 5
        assert len(shares[0]) == len(container) if isinstance(container, (list, dict)) else True


def test_what_is_no_tensor_stays():
    empty = without_samples(Frozen(X, 0.25))
    assert empty.threshold == 0.25
    assert without_samples(collections.defaultdict(list, x=X)).default_factory is list
    assert without_samples((X, ["a", "b"], ("c",), None, 3, 2j))[1:] == ([], (), None, 3, 2j)
    marker = object()
    assert mapped(lambda leaf: leaf, [marker, {1: marker}]) == [marker, {1: marker}]
    assert parts(Frozen) is None


def test_batches_of_transformers():
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    outputs = pytest.importorskip("transformers.modeling_outputs")
    for batch in (
        transformers.BatchEncoding({"input_ids": X}),
        outputs.BaseModelOutput(last_hidden_state=X),
    ):
        empty, shares = without_samples(batch), scatter(batch, [CPU] * 2)
        (name,) = batch.keys()
        assert type(empty) is type(shares[0]) is type(gather(shares, CPU)) is type(batch)
        assert empty[name].shape == (0, 2)
        assert torch.equal(gather(shares, CPU)[name], X)
        assert torch.equal(getattr(shares[0], name), X[:3])


def test_sparse_batches():
    x = X.to_sparse()
    assert without_samples(x).shape == (0, 2)
    shares = scatter((x,), [CPU] * 2)
    assert torch.equal(gather(shares, CPU)[0].to_dense(), X)


@pytest.mark.filterwarnings("ignore:.*(nested tensors|CSR).*:UserWarning")
@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda: torch.nested.nested_tensor([X, X[:2]], layout=torch.jagged), "nested tensor"),
        (lambda: torch.nested.nested_tensor([X, X[:2]]), "nested tensor"),
        (lambda: pack_sequence([X, X[:2]]), "packed sequence"),
        (lambda: X.to_sparse_csr(), "compressed tensor"),
    ],
    ids=["jagged", "strided", "packed", "csr"],
)
def test_samples_of_different_sizes_are_refused_in_words(make, kind):
    ragged = make()
    with pytest.raises(TypeError, match=rf"until_all_done: .* got a {kind} among .*pass empty="):
        without_samples([ragged])
    with pytest.raises(TypeError, match=f"DataParallel: .* can be split, got a {kind}; give"):
        scatter([ragged], [CPU] * 2)
    with pytest.raises(TypeError, match=f"got {kind}s, which cannot be concatenated"):
        gather([[ragged], [make()]], CPU)
    assert type(scatter([ragged], [CPU])[0][0]) is type(ragged)


def test_a_default_dict_in_training(ranks):
    def run(rank):
        batch = collections.defaultdict(list, x=torch.ones(2, 3), names=["a", "b"])
        batches = list(syncbn.until_all_done([batch] * (2 * rank)))
        return [(type(b).__name__, b.default_factory, b["x"].shape, b["names"]) for b in batches]

    first, second = ranks(2, run)
    assert first == [("defaultdict", list, (0, 3), [])] * 2
    assert second == [("defaultdict", list, (2, 3), ["a", "b"])] * 2
