"""What travels to a rank without a batch: data that is the same there, and never code."""

from __future__ import annotations

import collections
import io
import pickle
import sys
from typing import NamedTuple

import pytest
import torch

import syncbn
from support.layers import Silent
from syncbn.batches.transfer import packed, unpacked

RUN = []  # what a peer has made this process do


class Labelled(NamedTuple):
    image: torch.Tensor
    label: object


class Own(Labelled):
    def __new__(cls, *args):
        RUN.append("constructor")
        return super().__new__(cls, *args)


def note(what):
    RUN.append(what)


class Evil:
    def __reduce__(self):
        return note, ("reduce",)


def same(one, other):
    assert type(one) is type(other)
    if isinstance(one, torch.Tensor):
        torch.testing.assert_close(one, other, rtol=0, atol=0)
    elif isinstance(one, dict):
        assert list(one) == list(other)
        for key in one:
            same(one[key], other[key])
    elif isinstance(one, (tuple, list)):
        for pair in zip(one, other, strict=True):
            same(*pair)
    else:
        assert one == other


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.bool, torch.int64])
def test_plain_data_arrives_as_it_was(dtype):
    tensors = torch.empty(0, 3, 5, dtype=dtype), torch.tensor(1).to(dtype)
    batch = {
        "list": [*tensors, ["a", b"b", None, True, 3, 0.5, 2j]],
        3: (tensors[0].contiguous(), (), torch.Size((2, 3))),
        (1, "x"): collections.OrderedDict(b=tensors[0], a=1),
        "default": collections.defaultdict(list, a=tensors[0]),
        "none": collections.defaultdict(None, a=1),
        "named": Labelled(tensors[0], [Labelled(tensors[1], "text")]),
    }
    there = unpacked(packed(batch))
    same(there, batch)
    assert there["default"].default_factory is list
    assert there["none"].default_factory is None


@pytest.mark.parametrize(
    "thing",
    [
        *(object(), {1, 2}, collections.UserDict(), collections.deque(), slice(1), torch.float32),
        *(collections.defaultdict(lambda: 1), collections.Counter(), torch.eye(2).to_sparse()),
        *(collections.namedtuple("Unknown", "x")(1), Evil()),
    ],
    ids=lambda thing: type(thing).__name__,
)
def test_other_things_are_refused_by_the_sender(thing):
    with pytest.raises(TypeError, match=type(thing).__name__):
        packed([thing])


def saved(obj):
    stream = io.BytesIO()
    torch.save(obj, stream)
    return stream.getvalue()


ATTACKS = {
    "pickle": lambda: pickle.dumps(Evil()),
    "saved": lambda: saved(Evil()),
    "inside": lambda: saved(["list", ["value", Evil()]]),
    "old format": lambda: pickle.dumps(Evil(), protocol=0),
    "a function as a class": lambda: saved(["named", "os", "system", ["value", "true"]]),
    "a class with code": lambda: saved(["named", "builtins", "list", ["value", 1]]),
    "a module not imported": lambda: saved(["named", "this", "s", ["value", 1]]),
    "a factory": lambda: saved(["defaultdict", "exec"]),
    "another kind": lambda: saved(["eval", "RUN"]),
    "no structure": lambda: saved(3),
    "nothing": lambda: b"",
    "noise": lambda: b"PK\x03\x04" + bytes(range(200)),
    "a part": lambda: saved(["list"])[:-30],
}


class Peer(Silent):
    """Rank 1 has batches and sends what it likes; this rank 0 has none."""

    def __init__(self, content):
        self.content = content
        self.answers = [[(0, 0, 0), (1, 2, 1)], [(0, 0), (len(content), 0)], [(1,), (0,)]]

    def all_gather(self, tensor):
        answer = torch.tensor(self.answers.pop(0), dtype=torch.float64)
        assert tensor.shape == answer.shape[1:]
        return answer

    def all_reduce(self, tensor):
        return tensor + torch.tensor(list(self.content), dtype=torch.float64)


@pytest.mark.parametrize("attack", ATTACKS)
def test_a_peers_bytes_execute_nothing(attack):
    RUN.clear()
    content = ATTACKS[attack]()
    before = set(sys.modules)
    with pytest.raises(TypeError, match=r"rank 1, .* cannot travel without running code") as caught:
        next(iter(syncbn.until_all_done([], Peer(content))))
    assert RUN == []
    assert "this" not in set(sys.modules) - before
    assert "let empty= return such a batch" in str(caught.value)


def test_a_named_tuples_own_constructor_does_not_run():
    there = unpacked(packed(Own(torch.zeros(0), 3)))
    assert type(there) is Own
    RUN.clear()
    assert unpacked(packed(there))[1] == 3
    assert RUN == []


def test_the_attack_would_work():
    """So that the tests above can fail."""
    RUN.clear()
    torch.load(io.BytesIO(ATTACKS["inside"]()), weights_only=False)
    pickle.loads(ATTACKS["pickle"]())
    assert RUN == ["reduce"] * 2


def test_a_class_that_only_one_rank_has_ends_all(ranks):
    def run(rank):
        import sys
        import types

        if rank:
            module = sys.modules["only_there"] = types.ModuleType("only_there")
            module.Pair = collections.namedtuple("Pair", "x y", module="only_there")
        batch = rank and module.Pair(torch.ones(2, 3), torch.ones(2))
        try:
            return len(list(syncbn.until_all_done([batch] * rank)))
        except TypeError as error:
            return str(error)

    first, second = ranks(2, run)
    assert "only_there.Pair, which is no named tuple that is imported here; let empty=" in first
    assert "rank 0 cannot read it; let empty= return such a batch, or give every" in second


def test_a_view_travels_without_the_rest_of_its_storage():
    assert len(packed(torch.zeros(1000, 1000)[:0])) < 10_000
