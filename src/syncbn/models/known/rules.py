"""What a foreign class becomes, as data; and the classes that come of it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch.nn as nn

from ...layers.modules import SyncBatchNorm

# What every layer needs to become one of ours.
_COMMON = ("num_features", "eps", "momentum", "weight", "bias", "running_mean", "running_var")


@dataclass(frozen=True, eq=False)
class Rule:
    """What layers of one foreign class become.

    sources: the class's qualified names, over the library's versions, the newest first.
    base: which of our layers normalises.
    keeps: whether the class's own methods stay, before base's: it normalises by super().forward.
    front: methods before all others, of a class that normalises by itself. They take `inputs`
    inputs; where there is no front either, base's forward does.
    needs: the attributes, beyond those of a BatchNorm, that the methods read.
    group: the attribute that holds its process group, where it has one.
    check: says what else is wrong with a layer, in words; "" for nothing.
    view: of (layer, input), the values (N, C, *) that the layer normalises.
    """

    sources: tuple[str, ...]
    base: type[SyncBatchNorm]
    keeps: bool = False
    front: type | None = None
    inputs: int = 1
    needs: tuple[str, ...] = ()
    group: str = ""
    check: Callable[[Any], str] = lambda layer: ""
    view: Callable[[Any, Any], Any] = lambda layer, input: input
    _made: dict[type, type[SyncBatchNorm]] = field(default_factory=dict, init=False)

    def attribute(self, source: str) -> str:
        """The name that pickles know the target of a source by, an attribute of syncbn.

        Short for the first source; the others' have the whole path, as several may be imported.
        """
        library, *path, name = source.split(".")
        between = () if source == self.sources[0] else path
        return "_".join(("", library, *between, name.lstrip("_")))

    def target(self, source: type[nn.Module]) -> type[SyncBatchNorm]:
        """What a layer of class ``source`` becomes, once :meth:`misfit` has nothing to say."""
        if self.front is None and not self.keeps:
            return self.base
        if source not in self._made:
            front = () if self.front is None else (self.front,)
            bases = (*front, *((source,) if self.keeps else ()), self.base)
            name = source.__name__.lstrip("_")
            own = {"_rule": self}
            made = type(name if name.startswith("Sync") else f"Sync{name}", bases, own)
            made.__module__, made.__qualname__ = "syncbn", self.attribute(_named(source))
            made.__doc__ = f"{self.base.__name__} with what {_named(source)} does beside it."
            self._made[source] = made
        return self._made[source]

    def misfit(self, source: type[nn.Module], layer: nn.Module | None = None) -> str:
        """ "" or, of a class of another version's layout, what was expected and what is there."""
        if self.keeps and (problem := self._unrelated(source)):
            return problem
        if not self.keeps or self.front is not None:
            inputs = list(inspect.signature(source.forward).parameters)[1:]
            if len(inputs) > self.inputs:
                count = f"{self.inputs} input{'s'[: self.inputs > 1]}"
                return f"expected a forward of {count}, got forward({', '.join(inputs)})"
        if problem := _foreign_forward(source):
            return problem
        if layer is None:
            return ""
        needs = (*_COMMON, *self.needs)
        if lacking := [name for name in needs if not hasattr(layer, name)]:
            return f"expected attributes {_listed(needs)}, got none named {_listed(lacking)}"
        return self.check(layer)

    def _unrelated(self, source: type[nn.Module]) -> str:
        """Whether the class's bases aren't those that its methods' super() is to pass through."""
        torchs = next(base for base in self.base.__mro__ if base.__module__.startswith("torch.nn"))
        related = self.front is not None or issubclass(source, torchs)
        if issubclass(source, nn.SyncBatchNorm) or not related:
            bases = ", ".join(_named(base) for base in source.__bases__)
            return f"expected a subclass of {_named(torchs)}, got one of {bases}"
        return ""


def _foreign_forward(source: type[nn.Module]) -> str:
    """Whether a program has put another forward into the class, which ours would not run."""
    holder = next(cls for cls in source.__mro__ if "forward" in vars(cls))
    forward = vars(holder)["forward"]
    names = (getattr(forward, name, "?") for name in ("__module__", "__qualname__"))
    found = ".".join(map(str, names))
    if holder.__module__.startswith("torch.") or found == f"{_named(holder)}.forward":
        return ""
    return f"expected {holder.__name__}'s own forward, got {found}"


def _listed(names: Any) -> str:
    return ", ".join(names)


def _named(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"
