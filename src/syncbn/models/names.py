"""The names of a model's modules: one that is shared has several."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn as nn


def names_of_modules(model: nn.Module) -> dict[nn.Module, list[str]]:
    """All names of each module, in the order of named_modules(), which gives only the first."""
    names: dict[nn.Module, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(module, []).append(name)
    return names


def described(name: str, layer: nn.Module) -> str:
    """A layer, as warnings name it."""
    return f"{name or 'the module itself'} ({_shortest(_class_of(layer))})"


def grouped(layers: Sequence[tuple[str, nn.Module]], room: int) -> str:
    """Layers by class, the most frequent first, in about ``room`` characters.

    "49 × timm.layers.norm_act.BatchNormAct2d (bn1, blocks.0.bn1, blocks.0.bn2, …), 1 × a.Norm (b)"
    """
    names: dict[str, list[str]] = {}
    for name, layer in layers:
        names.setdefault(_class_of(layer), []).append(shortened(name or "the module itself", 50))
    by_count = sorted(names.items(), key=lambda item: -len(item[1]))
    parts: list[str] = []
    for cls, members in by_count:
        left = room - sum(len(part) + 2 for part in parts) - 25 * (len(by_count) > 1)
        part = next((p for p in _shown(cls, members) if len(p) <= left), None)
        if part is None and parts:
            break
        parts.append(part or _shown(cls, members)[-1])
    if rest := by_count[len(parts) :]:
        count = sum(len(members) for _, members in rest)
        parts.append(f"{count} of {len(rest)} more class{'es'[: 2 * (len(rest) > 1)]}")
    return ", ".join(parts)


def _shown(cls: str, members: list[str]) -> list[str]:
    """A class and its layers, of which three are named, or two, or one."""
    few = [[*members[:n], *["…"][: len(members) > n]] for n in (3, 2, 1)]
    return [f"{len(members)} × {_shortest(cls)} ({', '.join(names)})" for names in few]


def shortened(text: str, most: int) -> str:
    """The end of a text, which tells names apart, where it has more than ``most`` characters."""
    return text if len(text) <= most else f"…{text[1 - most :]}"


def _shortest(cls: str) -> str:
    return shortened(cls, 80)


def _class_of(layer: nn.Module) -> str:
    return f"{type(layer).__module__}.{type(layer).__qualname__}"


def check_module(operation: str, module: object) -> None:
    """Refuse what is no Module."""
    if not isinstance(module, nn.Module):
        raise TypeError(f"{operation}: expected a torch.nn.Module, got {type(module).__name__}")


def check_where(operation: str, where: object) -> None:
    """Refuse what is no function of a layer's name and the layer."""
    if where is not None and not callable(where):
        raise TypeError(
            f"{operation}: expected where to be a function of a layer's name and the layer, got "
            f"{type(where).__name__}"
        )
