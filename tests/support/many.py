"""Few ranks that exchange as many do: by sums alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any
from unittest import mock

from torch import Tensor

from support.in_threads import in_threads
from syncbn.comm import sums


def as_many() -> Any:
    """A context in which two ranks are many. Communicators must be made, and used, inside of it."""
    return mock.patch.object(sums, "HEARD", 1)


def by_sums(
    function: Callable[[Any, Callable[[Tensor], Tensor]], Tensor], owns: Sequence[Any]
) -> list[Tensor]:
    """What each rank's function makes of its own and of sums over ranks."""
    return in_threads(len(owns), lambda comm: function(owns[comm.rank], comm.all_reduce))
