"""syncbn.check: what is right is equal; what is planted is named, with its cause."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import syncbn
from support import planted
from support.processes import forked_launches
from syncbn.diagnose.check.capture import thinned
from syncbn.diagnose.check.differences import difference, joined_difference
from syncbn.diagnose.check.options import Task

SHARED = Path("/dev/shm")


@pytest.fixture(scope="module", autouse=True)
def _forked() -> Iterator[None]:
    with forked_launches():
        yield


def checked(factory: str, **options: Any) -> Any:
    """One check of a planted model, over two ranks and two steps."""
    for name in ("data", "loss"):
        if name in options:
            options[name] = f"support.planted:{options[name]}"
    if "data" not in options:
        options.setdefault("input", (3, 8, 8))
    return syncbn.check(f"support.planted:{factory}", **{"steps": 2} | options)


@pytest.mark.parametrize(
    ("factory", "options"),
    [
        ("right", {}),
        ("right", {"batch": 5, "ranks": 3}),
        ("right", {"batch": 3, "data": "labelled", "loss": "cross_entropy"}),
        ("right", {"dtype": "float32"}),
        ("right", {"dtype": "bfloat16"}),
        ("plain", {"convert": True, "batch": 2}),
        ("torchs_own", {"convert": True}),
        ("pooled", {"convert": True, "batch": 3}),
        ("right", {"ranks": 1}),
        ("frozen", {}),
        ("lazy", {}),
        ("two_views", {"batch": 5}),
        ("with_positions", {"batch": 5}),
        ("checkpointed", {}),
        ("unused", {}),
        ("without_weights", {}),
    ],
)
def test_what_is_right_is_equal(factory, options):
    report = checked(factory, **options)
    assert report.ok, str(report)
    assert (report.first, report.verdict, report.causes) == (None, "equal", ())
    assert {row.verdict for row in report.rows} <= {"equal", "not compared"}
    assert "EQUAL" in str(report)
    for row in report.rows:
        assert all(value <= report.task.tolerance for value in row.differences.values())


@pytest.mark.parametrize(
    ("factory", "options", "first", "kind", "words"),
    [
        ("plain", {}, "bn1", "not converted", "(and so does bn2)"),
        ("second_not_converted", {}, "bn2", "not converted", "syncbn.convert(model)"),
        ("left_alone", {"convert": True}, "bn2", "left alone", "register_conversion(Scaled"),
        ("asleep", {}, "bn2", "eval", "in eval mode on all ranks"),
        ("asleep_on_one", {"batch": 5}, "bn2", "eval", "in eval mode on rank 1"),
        ("dropping", {}, "between", "random", "dropout of probability 0"),
        ("dropping_in_a_function", {}, "between", "random", "Randomness"),
        ("drawing_with_python", {}, "between", "random", "another seed"),
        ("small_group", {}, "bn2", "group", "a group of 1 of 2 ranks"),
        ("repeating", {"batch": 5, "ranks": 3}, "between.layer", "calls", "rank 0 4 times"),
        ("skipping_on_one", {}, "bn2", "raises", "call different layers"),
        (
            "leaving_out_on_one",
            {"timeout": 24, "steps": 1},
            "bn2",
            "raises",
            "rank 1 has not arrived",
        ),
        ("halving", {}, "between", "half", "bfloat16"),
        ("chaotic", {}, "between", "rounding", "chaos"),
        ("centring", {}, "between", "unknown", "of all samples"),
        ("functional", {}, "between", "function", "syncbn.sync_batch_norm"),
        ("wrong_backward", {}, "between", "backward", "not the gradient"),
        ("wrong_momentum", {}, "bn2", "unknown", "not its own statistics"),
        ("torchs_own", {}, "bn1", "not converted", "GPUs alone"),
        ("pooled", {"batch": 3}, "bn", "not converted", "Rank 1 raised ValueError in step 1"),
        ("right", {"data": "other_data"}, "(model)", "data", "different data"),
        ("right", {"data": "labelled", "loss": "summed"}, "(loss)", "loss", "a sum over samples"),
        ("right", {"data": "labelled", "loss": "pairwise"}, "(loss)", "loss", "with each other"),
        (
            *("right", {"data": "labelled", "loss": "averaged_over_ranks", "batch": 5}),
            *("(loss)", "loss", "averaged over uneven ranks (3 + 2 samples)"),
        ),
        (
            *("right", {"data": "labelled", "loss": "weighed_itself", "batch": 5}),
            *("(loss)", "loss", "weighs uneven ranks (3 + 2 samples) by itself"),
        ),
    ],
)
def test_a_planted_fault_is_named(factory, options, first, kind, words):
    report = checked(factory, **options)
    (cause,) = report.causes
    assert (report.ok, report.first, cause.layer, cause.kind) == (False, first, first, kind), str(
        report
    )
    assert words in cause.text
    assert report.verdict == ("rounding" if kind in ("half", "rounding") else "different")
    (marked,) = (row for row in report.rows if row.first)
    assert marked.layer == first
    assert f"\n> {first} " in str(report)


def test_the_report_says_what_was_done_and_what_is_no_fault():
    report = checked("dropping", batch=5)
    assert [row.layer for row in report.rows] == [
        *("conv1", "bn1", "between", "conv2", "bn2", "head", "(model)", "(loss)")
    ]
    assert [row.synchronised for row in report.rows[:3]] == [None, True, None]
    assert {row.calls for row in report.rows[:-1]} == {2}
    assert any("5 samples on 2 ranks are 3 + 2" in note for note in report.notes)


def test_values_that_are_not_finite_show_nothing_and_it_says_so():
    report = checked("not_finite", steps=1)
    assert report.ok
    assert "Nan or infinity in one process, too, first in bn1" in " ".join(report.notes)
    assert not any("infinity" in note for note in checked("right", steps=1).notes)


def test_large_outputs_are_compared_in_part_and_without_a_note():
    report = checked("right", input=(3, 48, 48), batch=2, steps=1)
    assert report.ok
    assert report.notes == ()
    x = torch.randn(4, 6, 46, 46)
    part = thinned(x)
    assert part.shape == (4, 6, 8, 8)
    assert torch.equal(part[2:], thinned(x[2:]))
    sequence = torch.randn(50, 4, 3000)  # (length, samples, features)
    assert thinned(sequence).shape == (50, 4, 64)
    assert torch.equal(thinned(sequence)[:, 2:], thinned(sequence[:, 2:]))


def test_a_function_is_a_factory():
    report = syncbn.check(planted.right, data=planted.data, batch=2, steps=1)
    assert report.ok
    assert "support.planted:right" in str(report)


@pytest.mark.parametrize(
    ("factory", "options", "text"),
    [
        ("right", {"ranks": 0}, "expected ranks ≥ 1, got 0"),
        ("right", {"ranks": 5}, "expected a sample for each rank, got a batch of 4 for 5 ranks"),
        ("right", {"steps": 0}, "expected steps ≥ 1"),
        ("right", {"dtype": "int8"}, "expected dtype in float64"),
        ("right", {"lr": 0.0}, "expected lr > 0"),
        ("right", {"timeout": float("inf")}, "timeout > 0, up to 1e+09 s, got 0.01 and inf"),
        ("right", {"seed": 2**64}, "expected seed from 0 to 4294967295, got 18446744073709551616"),
        ("right", {"seed": -1}, "expected seed from 0 to"),
        ("right", {"loss": "nothing"}, "loss support.planted:nothing: support.planted has no"),
        ("right", {"data": "too_few"}, "expected tensors of 4 samples, got none"),
        ("right", {"data": "data", "loss": "summed"}, "expected (inputs, target), got Tensor"),
        ("right", {"data": "labelled", "loss": "no_number"}, "expected a tensor of one number"),
        ("nothing", {}, "support.planted has no 'nothing'"),
        ("not_callable", {}, "expected a function, got int"),
        ("no_module", {}, "expected a torch.nn.Module, got int"),
        ("broken", {}, "raised KeyError: 'no such\\nconfiguration'"),
        ("broken_on_one", {}, "broken_on_one raised RuntimeError: rank 1 alone"),
        ("dying", {}, "left with exit status 7"),
        ("dying_well", {"ranks": 1}, "rank 0 left with exit status 0 before its end"),
        ("exiting", {}, "factory support.planted:exiting raised SystemExit: 0"),
        ("hanging", {"timeout": 2.0}, "no result within 2 s, the timeout; last: calling the fact"),
    ],
)
def test_what_cannot_be_checked_is_one_line(factory, options, text):
    before = set(SHARED.iterdir()) if SHARED.exists() else set()
    with pytest.raises(ValueError, match=re.escape(text)) as raised:
        checked(factory, **options)
    assert "\n" not in str(raised.value)
    if SHARED.exists():
        assert not {path for path in set(SHARED.iterdir()) - before if "syncbn" in path.name}


@pytest.mark.parametrize(
    ("given", "text"),
    [
        ({"factory": "support.planted"}, "expected factory as 'package.module:name'"),
        ({"factory": 3}, "expected factory as 'package.module:name' or a function, got 3"),
        ({"factory": lambda: None}, "which other processes import"),
        ({"input": None}, "got neither"),
        ({"data": "a:b"}, "got both"),
        ({"input": (3, 0)}, "expected input of sizes ≥ 1"),
        ({"factory": "nowhere.at_all:f"}, "no module named 'nowhere'"),
        ({"input": (4, 8, 8)}, "one process raised RuntimeError in conv1 for input (4, 8, 8)"),
    ],
)
def test_bad_arguments_are_refused(given, text):
    with pytest.raises(ValueError, match=re.escape(text)):
        syncbn.check(**{"factory": "support.planted:right", "input": (3, 8, 8)} | given)


def test_shares_are_as_even_as_can_be():
    task = Task(factory="a:b", input=(1,), batch=11, ranks=4)
    assert task.shares == [3, 3, 3, 2]
    assert [n for rank in range(4) for n in list(range(11))[task.share(rank)]] == list(range(11))


def test_parts_of_ranks_are_put_together():
    whole = torch.arange(24.0).view(6, 4)
    assert joined_difference(whole, [whole[:2], whole[2:]], 6) == 0
    assert joined_difference(whole.T, [whole.T[:, :2], whole.T[:, 2:]], 6) == 0
    assert joined_difference(whole, [whole, whole], 6) == 0
    views = whole.view(2, 3, 4)
    blocks = [views[:, :1].flatten(0, 1), views[:, 1:].flatten(0, 1)]
    assert joined_difference(whole, blocks, 3) == 0
    assert joined_difference(whole, [whole[2:], whole[:2]], 6) == 16
    assert joined_difference(whole, [whole[:2], whole[:2]], 6) is None


def test_nan_and_infinity_are_equal_to_themselves_alone():
    odd = torch.tensor([float("nan"), float("inf"), 1.0])
    assert difference(odd, odd) == 0
    assert difference(odd, torch.tensor([0.0, float("inf"), 1.0])) == float("inf")
    assert difference(odd, torch.tensor([float("nan"), -float("inf"), 1.0])) == float("inf")
