"""What exchanges raise."""

from __future__ import annotations

REMEDY = (
    "every rank must run the same layers in the same order, and backward where the others do: look "
    "for a branch that some ranks take, a layer that eval() or torch.no_grad() leaves out on some, "
    "loaders of different lengths (iterate over syncbn.until_all_done(loader)), and options or "
    "convert(where=...) that differ"
)


class DesyncError(RuntimeError):
    """Ranks are out of step: what they call differs. Raised on every rank alike; of calls on a
    device at a later call, which may be another one on each (docs/hangs.md).

    layer: the name of the layer that this rank called; "" where no layer called.
    ranks: what each rank called, in words, by its number.
    """

    def __init__(self, text: str, layer: str = "", ranks: dict[int, str] | None = None) -> None:
        super().__init__(text)
        self.layer, self.ranks = layer, ranks or {}


class Unsent(RuntimeError):
    """A message that no other rank knows of."""


class InVain(RuntimeError):
    """Why to wait no longer, in words that need no others."""
