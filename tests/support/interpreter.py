"""Triton's interpreter, several times as fast."""

from __future__ import annotations

from typing import Any

import pytest


def patch_language_once(patch: pytest.MonkeyPatch) -> None:
    """Let a function that a kernel calls not put the interpreter's language in place again.

    It does so in every call, most of the time of a tiny kernel; the kernel has done it for its own
    modules, and what a first call did for Triton's own stays.
    """
    from triton.runtime import interpreter

    seen: set[int] = set()

    def call(self: Any, *arguments: Any, **options: Any) -> Any:
        space = self.fn.__globals__
        if id(space) not in seen:
            interpreter._patch_lang(self.fn)
            seen.add(id(space))
        return self.rewrite()(*arguments, **options)

    patch.setattr(interpreter.InterpretedFunction, "__call__", call)
