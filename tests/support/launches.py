"""Triton without Triton, and what runs on a device beside its kernels."""

from __future__ import annotations

from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode


class Others(TorchDispatchMode):
    """Operations of torch beside the kernels that compute: allocations and views do not."""

    FREE = (
        "empty",
        "new_empty",
        "empty_like",
        "view",
        "slice",
        "select",
        "unsqueeze",
        "unbind",
        "detach",
    )

    def __init__(self, found: list[str] | None = None) -> None:
        super().__init__()
        self.found: list[str] = [] if found is None else found

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        name = operation.overloadpacket.__name__
        if name not in self.FREE:
            self.found.append(name)
        return operation(*arguments, **(options or {}))


class Compiled:
    """What Triton's call returns: a kernel for arguments of one kind."""

    function, packed_metadata = "a function", "its metadata"

    def __init__(self, runs: list[tuple[Any, ...]]) -> None:
        self.runs = runs

    def run(self, *arguments: Any) -> None:
        self.runs.append(arguments)


class Language:
    float32, float64 = "float32", "float64"


class Stand:
    """Triton, which notes what it compiles and what runs afterwards."""

    language = Language

    def __init__(self) -> None:
        self.compiled: list[tuple[Any, ...]] = []
        self.runs: list[tuple[Any, ...]] = []

    def kernel(self, name: str) -> Any:
        stand = self

        class Function:
            def __getitem__(self, grid: tuple[int, ...]) -> Any:
                def start(*arguments: Any, num_warps: int) -> Compiled:
                    stand.compiled.append((name, grid, arguments, num_warps))
                    return Compiled(stand.runs)

                return start

        return Function()
