"""Lightning's switch: ``Trainer(plugins=[SyncBN()])``. For lightning and for pytorch_lightning."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from importlib.util import find_spec
from typing import Any

import torch.nn as nn

from ..layers.modules import SyncBatchNorm
from ..models.convert import choose_group_size, convert_layers
from ..models.names import check_where
from ..models.revert import revert, revert_wrapper

# Two packages with the same content, each of which knows its own classes alone.
_PACKAGES = ("lightning.pytorch", "pytorch_lightning")

if not any(find_spec(package.partition(".")[0]) for package in _PACKAGES):
    raise ImportError(
        "syncbn.integrations.lightning: expected the package lightning or pytorch_lightning, found "
        "neither; pip install lightning"
    )


class SyncBN:
    """A LayerSync plugin: Trainer converts the model as fit begins, and reverts it as fit ends.

    Within fit each BatchNorm of the model normalises over all ranks, on CPUs too; validation is in
    eval mode and local. Afterwards the layers have the very classes that they had; layers that were
    syncbn's before fit stay as they are, with their own options. Checkpoints have the names
    and values of a plain model's. On one process Lightning has no use for such a plugin, and the
    model stays as it is.

    Lightning calls LayerSync plugins under DDPStrategy and FSDPStrategy. With other strategies on
    several processes fit raises, where this package was installed with its entry points; there,
    call :func:`syncbn.convert` in ``configure_model`` or before fit.

    Args:
        group_size, samples, batch_per_rank, where, reproducible, skip_nonfinite: as for
            :func:`syncbn.convert`. ``where`` gets names within the LightningModule.

    Raises:
        ImportError: neither ``lightning`` nor ``pytorch_lightning`` can be imported.
        TypeError: ``where`` is not callable.
        ValueError: from fit, for a ``group_size`` that does not divide the number of ranks, or a
            strategy that does not call the plugin.

    Source: https://lightning.ai/docs/pytorch/stable/api/lightning.pytorch.plugins.html

    Example:
        >>> from lightning.pytorch.plugins import LayerSync
        >>> from syncbn.integrations.lightning import SyncBN
        >>> plugin = SyncBN(where=lambda name, layer: name.startswith("backbone"))
        >>> isinstance(plugin, LayerSync)  # for Trainer(plugins=[plugin])
        True
    """

    _made = False  # whether this process has made one: others' Trainers get no callback

    def __init__(
        self,
        *,
        group_size: int | None = None,
        samples: int | None = None,
        batch_per_rank: int | None = None,
        where: Callable[[str, nn.Module], bool] | None = None,
        reproducible: bool | None = None,
        skip_nonfinite: bool | None = None,
    ) -> None:
        check_where("SyncBN", where)
        self._groups = (group_size, samples, batch_per_rank)
        self._options: dict[str, Any] = {
            "where": where,
            "reproducible": reproducible,
            "skip_nonfinite": skip_nonfinite,
        }
        self._converted: list[nn.Module] = []
        self._applied = False
        SyncBN._made = True
        _register()

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)
        _register()  # in a process that Lightning started, whose classes are new

    def apply(self, model: nn.Module) -> nn.Module:
        """:func:`syncbn.convert` the model, in place, but for layers that are syncbn's already."""
        before = {each: type(each) for each in model.modules()}
        size = choose_group_size(None, *self._groups)
        convert_layers(model, None, group_size=size, **self._options, keep_ours=True, stacklevel=3)
        self._converted += [each for each, kind in before.items() if type(each) is not kind]
        self._applied = True
        return model

    def revert(self, model: nn.Module) -> nn.Module:
        """:func:`syncbn.revert` what apply has converted, in place."""
        for each in self._converted:
            if isinstance(each, SyncBatchNorm):
                revert(each)
            else:  # a DataParallel, whose layers may have been syncbn's before
                revert_wrapper(each)
        self._converted, self._applied = [], False
        return model


def _register() -> None:
    """Make SyncBN a LayerSync of each package that is imported, or else of each that can be."""
    found = [package for package in _PACKAGES if package in sys.modules]
    found = found or [name for name in _PACKAGES if find_spec(name.partition(".")[0])]
    for package in found:
        importlib.import_module(f"{package}.plugins").LayerSync.register(SyncBN)


def lightning_callbacks() -> list[Any]:
    """What Lightning adds to each Trainer's callbacks (entry point)."""
    return [_watch("lightning.pytorch")] if SyncBN._made else []


def pytorch_lightning_callbacks() -> list[Any]:
    """The same of pytorch_lightning."""
    return [_watch("pytorch_lightning")] if SyncBN._made else []


def _watch(package: str) -> Any:
    """A callback that looks whether the strategy has called the plugin: it cannot look itself."""
    callback = importlib.import_module(f"{package}.callbacks").Callback
    own = {"on_fit_start": _check, "__reduce__": lambda _: (_watch, (package,))}
    return type("WatchSyncBN", (callback,), own)()


def _check(self: Any, trainer: Any, pl_module: Any) -> None:
    # Not the strategy's: one that knows no plugins has no place for them.
    plugin = getattr(trainer._accelerator_connector, "_layer_sync", None)
    if isinstance(plugin, SyncBN) and not plugin._applied and trainer.world_size > 1:
        raise ValueError(
            "SyncBN: expected a strategy that applies LayerSync plugins, as DDPStrategy and "
            f"FSDPStrategy do, got {type(trainer.strategy).__name__} on rank "
            f"{trainer.global_rank}; leave the plugin out and call syncbn.convert(self) in the "
            f"configure_model of {type(pl_module).__name__}"
        )
