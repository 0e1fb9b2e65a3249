"""What a message begins with: numbers for whoever carries it, which a kernel writes for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

WORDS = 4  # the most that a prefix may have


class Prefix(NamedTuple):
    """Zeros, so many as there is room for, but for words, the first of which is at ``at``."""

    words: tuple[float, ...] = ()
    at: int = 0
    room: int = 0


NO_PREFIX = Prefix()


def prefixed(content: Tensor, prefix: Prefix) -> Tensor:
    """Prefix and content in one dimension, the content alone if there is no room before it."""
    words, at, room = prefix
    if not room:
        return content
    content = content.reshape(-1)
    # A graph says one word, again and again. A captured one would read the host's memory anew.
    if len(words) < 2 or words == words[:1] * room or torch.compiler.is_compiling():
        return pad(content, (room, 0), value=words[0] if words else 0.0)
    numbers = (*(0.0,) * at, *words, *(0.0,) * (room - at - len(words)))
    return torch.cat((_on(content.device, numbers, content.dtype), content))


def _on(device: torch.device, numbers: Sequence[float], dtype: torch.dtype) -> Tensor:
    """Numbers on a device, which are sent there from memory that need not be waited for."""
    host = torch.tensor(numbers, dtype=dtype, device="cpu")
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)
