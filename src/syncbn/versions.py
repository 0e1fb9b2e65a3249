"""The versions that results depend on."""

from __future__ import annotations

import platform

import torch

from ._version import __version__


def versions() -> dict[str, str]:
    """Of syncbn and what its results depend on."""
    return {
        "syncbn": __version__,
        "torch": str(torch.__version__),
        "python": platform.python_version(),
    }
