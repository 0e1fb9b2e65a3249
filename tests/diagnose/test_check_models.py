"""syncbn.check on networks of transformers: each right, and with a fault of each kind planted."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest

import syncbn
from support.processes import forked_launches

pytest.importorskip("transformers", reason="needs the extra [models]")

from support.transformers_models import (
    BUILD,
    FAULTS,
    INPUT,
    expected,
    factory,
    labelled,
    uneven_loss,
)


@pytest.fixture(scope="module", autouse=True)
def _forked() -> Iterator[None]:
    with forked_launches():
        yield


def slow_but_for(first: str, cases: list[tuple[str, ...]]) -> list[object]:
    """All in make test-all; one network in make test."""
    return [
        pytest.param(*case, id="-".join(case), marks=() if case[0] == first else pytest.mark.slow)
        for case in cases
    ]


@pytest.mark.parametrize("name", slow_but_for("resnet", [(name,) for name in BUILD]))
def test_right_ones_are_equal(name):
    report = syncbn.check(factory(name), input=INPUT[name], batch=5, steps=2)
    assert report.ok, str(report)


@pytest.mark.parametrize(
    ("name", "fault"), slow_but_for("", [(name, fault) for name in BUILD for fault in FAULTS])
)
def test_a_planted_fault_is_named(name, fault):
    report = syncbn.check(factory(name, fault), input=INPUT[name], batch=5, steps=1)
    assert report.first == expected(name, fault), str(report)
    assert report.causes[0].kind == fault, str(report)


@pytest.mark.parametrize("name", slow_but_for("", [(name,) for name in BUILD]))
def test_a_loss_that_is_averaged_over_uneven_ranks_is_named(name):
    data = functools.partial(labelled, INPUT[name])
    report = syncbn.check(factory(name), data=data, loss=uneven_loss, batch=5, steps=1)
    assert report.first == "(loss)", str(report)
    assert "averaged over uneven ranks (3 + 2 samples)" in report.causes[0].text
