"""What copies and pickles of a layer take over of it."""

from __future__ import annotations

import copy
import warnings
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..step.accumulation import Accumulator
from ..step.identity import Number, take_number
from .replaced import Watched, watch_replacements

if TYPE_CHECKING:
    from typing_extensions import Self


class Copied(Watched):
    """A layer whose copies have its process group, and whose pickles have none."""

    def _state(self) -> dict[str, Any]:
        """What copies take over: some belongs to a context around this layer, a number to it."""
        own = {"_mask_sources": tuple, "_accumulator": Accumulator}
        own |= {"_identity": Number, "_token": Tensor}
        return {k: v for k, v in vars(self).items() if k not in own or not isinstance(v, own[k])}

    def __copy__(self) -> Self:
        new = type(self).__new__(type(self))
        new.__setstate__(self._state())
        return new

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        new = type(self).__new__(type(self))
        memo[id(self)] = new
        memo[id(self.process_group)] = self.process_group  # a group belongs to the process
        new.__setstate__(copy.deepcopy(self._state(), memo))
        return new

    def __getstate__(self) -> dict[str, Any]:
        state = self._state()
        if state.get("process_group") is not None:
            state["process_group"] = None
            warnings.warn(
                f"{type(self).__name__} is pickled without its process group; set "
                "layer.process_group after loading, or the default group is used",
                stacklevel=2,
            )
        return state

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[no-untyped-call]
        take_number(self)
        watch_replacements()
