"""freeze() and unfreeze(): running statistics that are used, and stay, whatever train() says.

A frozen layer has a ``train`` of its own, in place of its class's. So it stays the same object of
the same class, with the same state dict; copies, pickles, convert and revert take that along.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch.nn as nn

from .names import check_module, check_where, names_of_modules
from .registry import is_candidate

ModuleT = TypeVar("ModuleT", bound=nn.Module)
_PARAMETERS = ("weight", "bias")


class Frozen:
    """The ``train`` of a frozen layer: all but the normalisation follows the mode.

    mode: the one that the layer was told last. wanted: whether each of its parameters wanted
    gradients, of those that stopped.
    """

    def __init__(self, layer: nn.Module) -> None:
        self.layer, self.mode = layer, layer.training
        self.wanted: dict[str, bool] = {}

    def __call__(self, mode: bool = True) -> nn.Module:
        layer = self.layer
        type(layer).train(layer, mode)  # what a subclass holds beside it, an activation, follows
        self.mode, layer.training = mode, False
        return layer


def is_frozen(layer: nn.Module) -> bool:
    return isinstance(vars(layer).get("train"), Frozen)


def freeze(
    module: ModuleT,
    where: Callable[[str, nn.Module], bool] | None = None,
    affine: bool = False,
) -> ModuleT:
    """Let BatchNorm layers normalise by their running statistics, which stay, in train mode too.

    For fine-tuning with batches too small for statistics of their own. In place, and for torch's
    layers as for syncbn's: each keeps its class, its hooks and the keys of its state dict, and only
    its ``training`` stays False whatever ``train()`` says. The layer stays frozen in
    ``copy.deepcopy``, in pickles of the model, through :func:`syncbn.convert` and
    :func:`syncbn.revert`, and when a state dict is loaded, whose statistics it then uses. A frozen
    layer says nothing to other ranks; freeze the same layers on all of them. :func:`unfreeze`
    undoes it.

    Args:
        module: a model, or a single layer. Without a BatchNorm nothing happens, as in convert.
        where: called with each layer's qualified name and the layer; False leaves it as it is. A
            layer that is shared has several names and freezes if where says so for one of them.
        affine: stop the gradients of weight and bias, too (``requires_grad=False``). Before
            wrapping in DistributedDataParallel, which remembers what wants gradients.

    Returns:
        ``module`` itself.

    Raises:
        TypeError: ``module`` is no Module, or ``where`` not callable.
        ValueError: a layer without running statistics (``track_running_stats=False``), before any
            layer is frozen.

    Source: what torchvision's, detectron2's and timm's FrozenBatchNorm2d do by another class,
    https://detectron2.readthedocs.io/en/latest/modules/layers.html

    Example:
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
        >>> _ = syncbn.freeze(model).train()(torch.randn(4, 2))
        >>> int(model[1].num_batches_tracked)
        0
    """
    layers = _chosen("freeze", module, where)
    lacking = [name or "the module itself" for name, layer in layers if not _has_statistics(layer)]
    if lacking:
        raise ValueError(
            "freeze: expected layers with running statistics, got some without "
            f"(track_running_stats=False): {', '.join(lacking)}; leave them out with where="
        )
    for _, layer in layers:
        if not is_frozen(layer):
            vars(layer)["train"] = Frozen(layer)
            layer.training = False
        if affine:
            _stop_gradients(layer)
    return module


def unfreeze(module: ModuleT, where: Callable[[str, nn.Module], bool] | None = None) -> ModuleT:
    """Undo :func:`freeze`: layers are in the mode that they were told last, and statistics move.

    Where freeze stopped gradients of weight and bias, these want them again as they did before.
    Layers that are not frozen are left as they are.

    Args:
        module: a model, or a single layer. Returned.
        where: as for :func:`freeze`.

    Raises TypeError where ``module`` is no Module, or ``where`` not callable.

    Example:
        >>> layer = syncbn.freeze(torch.nn.BatchNorm1d(3), affine=True)
        >>> layer.training, layer.weight.requires_grad
        (False, False)
        >>> layer = syncbn.unfreeze(layer)
        >>> layer.training, layer.weight.requires_grad
        (True, True)
    """
    for _, layer in _chosen("unfreeze", module, where):
        if is_frozen(layer):
            frozen: Frozen = vars(layer).pop("train")
            layer.training = frozen.mode
            for name, wanted in frozen.wanted.items():
                parameter = layer._parameters.get(name)
                if parameter is not None:
                    parameter.requires_grad = wanted
    return module


def _chosen(
    operation: str, module: nn.Module, where: Callable[[str, nn.Module], bool] | None
) -> Sequence[tuple[str, Any]]:
    """The BatchNorm layers of a model that where chooses, each with its first name."""
    check_module(operation, module)
    check_where(operation, where)
    return [
        (names[0], layer)
        for layer, names in names_of_modules(module).items()
        if is_candidate(layer) and (where is None or any(where(name, layer) for name in names))
    ]


def _has_statistics(layer: nn.Module) -> bool:
    return all(getattr(layer, name, None) is not None for name in ("running_mean", "running_var"))


def _stop_gradients(layer: nn.Module) -> None:
    frozen: Frozen = vars(layer)["train"]
    for name in _PARAMETERS:
        parameter = layer._parameters.get(name)
        if parameter is not None:
            frozen.wanted.setdefault(name, parameter.requires_grad)
            parameter.requires_grad = False  # a lazy one refuses requires_grad_()
