"""The house rules that a machine can keep: arrows point one way, importing starts nothing."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import syncbn

SOURCE = Path(syncbn.__file__).parent
CSRC = Path(__file__).parents[1] / "csrc"
# From the ground up. A room imports from rooms on floors below its own, never from its own floor.
FLOORS = (
    {"layout", "transforms"},
    {"storages"},
    {
        "_version",
        "checks",
        "graphs",
        "moments",
        "names",
        "nested",
        "quantisation",
        "recomputation",
    },
    {"empty", "masks", "reproducible", "scatter", "tracking", "transfer"},
    {"comm", "kernels"},
    {"collectives", "share"},
    {"differentiable"},
    {"autograd", "joint", "local", "transformed", "uneven"},
    {"dtensors"},
    {"functional"},
    {"modules"},
    {"lazy", "masking"},
    {"data_parallel", "registry"},
    {"convert"},
    {"demo"},
    {"info"},
    {"cli"},
    {"__main__"},
)
FLOOR = {room: number for number, rooms in enumerate(FLOORS) for room in rooms}
# torch's name for convert() is a classmethod of the layer: it calls upwards, when called.
EXCEPTIONS = {("modules", "convert")}


def rooms_imported(path: Path) -> set[str]:
    """The rooms of this package that a file imports from, inside functions too."""
    package = ("syncbn", *path.relative_to(SOURCE).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            full = (*base, *(node.module or "").split(".")) if node.module else base
            names = [(*full, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        found |= {name[1] for name in names if name[0] == "syncbn" and len(name) > 1}
    return found & FLOOR.keys()


def test_arrows_point_one_way():
    used = set()
    for path in SOURCE.rglob("*.py"):
        if path == SOURCE / "__init__.py":
            continue
        room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        assert room in FLOOR, f"{room} has no floor: add it to FLOORS, and to DESIGN's house"
        for imported in rooms_imported(path) - {room}:
            used.add((room, imported))
    upwards = {(a, b) for a, b in used if FLOOR[b] >= FLOOR[a]}
    assert upwards == EXCEPTIONS
    assert {("convert", "modules"), ("share", "kernels"), ("kernels", "moments")} <= used


def test_every_floor_is_inhabited():
    rooms = {path.name.removesuffix(".py") for path in SOURCE.iterdir()}
    assert FLOOR.keys() <= rooms


IMPORT = """
import os, sys, threading
import torch, torch.distributed
before = set(sys.modules)
class Watched(dict):
    reads = []
    def __getitem__(self, key):
        self.reads.append(key)
        return super().__getitem__(key)
    def get(self, key, default=None):
        self.reads.append(key)
        return super().get(key, default)
    def __contains__(self, key):
        self.reads.append(key)
        return super().__contains__(key)
os.environ = Watched(os.environ)
os.getenv = os.environ.get
import logging
handlers = list(logging.getLogger().handlers)
import syncbn
assert not Watched.reads, f"reads the environment: {Watched.reads}"
assert logging.getLogger().handlers == handlers
assert threading.active_count() == 1
assert not torch.distributed.is_initialized()
print(*sorted(name for name in set(sys.modules) - before))
"""


def test_importing_starts_nothing():
    """torch alone: no extras, no MPI, no Triton, no compiler, no environment, no threads."""
    result = subprocess.run(
        [sys.executable, "-c", IMPORT], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    roots = {name.split(".")[0] for name in result.stdout.split()}
    assert roots == {"syncbn"}
    assert not {"syncbn.cli", "syncbn.demo"} & set(result.stdout.split())


def test_files_stay_short():
    for path in (*SOURCE.rglob("*.py"), *CSRC.iterdir()):
        assert len(path.read_text().splitlines()) <= 250, f"{path.name} wants to be two files"


def test_every_public_name_is_documented():
    for name in syncbn.__all__:
        thing = getattr(syncbn, name)
        assert isinstance(thing, str) or (thing.__doc__ or "").strip(), name
