"""What messages begin with, where no kernel writes it."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from syncbn.tensors import prefix
from syncbn.tensors.prefix import Prefix, prefixed

CONTENT = torch.ones(1, 2, dtype=torch.float64)


@pytest.mark.parametrize(
    ("words", "at", "expected"),
    [((), 0, [0, 0, 0, 0]), ((1.0,) * 4, 0, [1, 1, 1, 1]), ((2.0, 3.0), 1, [0, 2, 3, 0])],
)
def test_words_come_before_the_content(words, at, expected):
    assert prefixed(CONTENT, Prefix(words, at, 4)).tolist() == [*expected, 1, 1]


@pytest.mark.parametrize("words", [(), (0.0,) * 4, (1.0,) * 4])
def test_what_a_captured_step_says_takes_no_memory_of_the_host(words):
    """A CUDA graph reads that again in each replay, when others may have written there."""
    with mock.patch.object(prefix, "_on", side_effect=AssertionError):
        prefixed(CONTENT, Prefix(words, 0, 4))
