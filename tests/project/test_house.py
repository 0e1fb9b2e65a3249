"""The house rules that a machine can keep: arrows point one way, importing starts nothing."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import syncbn
from support.paths import ROOT

SOURCE = Path(syncbn.__file__).parent
CSRC = ROOT / "csrc"
# From the ground up. A room imports from rooms on floors below its own, never from its own floor.
FLOORS = (
    {"_interrupts", "_version", "library", "pictures", "progress", "tensors"},
    {"versions"},
    {"numerics"},
    {"comm", "kernels"},
    {"step"},
    {"layers"},
    {"batches"},
    {"models"},
    {"launch"},
    {"diagnose"},
    {"demo", "integrations"},
    {"info"},
    {"cli"},
    {"__main__"},
)
# Within a room: who is imported by whom, from the ground up.
ROOMS = {
    "tensors": (
        {"inductor", "layout", "operators", "prefix", "transforms"},
        {"storages"},
        {"graphs", "recomputation"},
    ),
    "numerics": ({"moments"}, {"reproducible"}),
    "kernels/triton": (
        {"checks", "plan", "tiles"},
        {"backward", "forward"},
        {"launch"},
        {"layout", "steps"},
    ),
    "step": (
        {"nested"},
        {"checks", "collectives", "identity", "masked", "mode"},
        {"accumulation"},
        {"derivatives", "profiling", "records", "speaker", "tracking"},
        {"as_torch", "exchange", "transformed"},
        {"function"},
        {"dtensors", "fused", "replicas"},
        {"dispatch"},
    ),
    "layers": ({"functional", "replaced"}, {"copies"}, {"modules"}, {"lazy"}),
    "diagnose": (
        {"agreement", "traces"},
        {"buffers", "desync", "recalibrate"},
    ),
    "diagnose/monitor": (
        {"advice", "exchanging", "layers", "measuring", "picture"},
        {"figures", "observing"},
        {"record"},
        {"tables"},
        {"monitor"},
    ),
    "diagnose/check": (
        {"capture", "differences", "options", "words"},
        {"build", "observe"},
        {"train"},
        {"compare"},
        {"judge"},
        {"causes", "rows"},
        {"report"},
        {"page", "supervise"},
        {"command", "run"},
    ),
    "diagnose/bench": (
        {"naive", "options", "timing"},
        {"finding", "measure"},
        {"figures"},
        {"report"},
        {"picture", "run"},
        {"command"},
    ),
    "batches": ({"nested"}, {"empty", "scatter", "transfer"}, {"uneven"}),
    "models": (
        {"becoming", "graphs", "names", "quantisation", "registry", "replicate"},
        {"data_parallel", "freezing", "inputs", "masking", "plan"},
        {"measuring", "revert", "words"},
        {"accumulating"},
        {"convert"},
    ),
    "models/known": (
        {"fronts", "rules"},
        {
            *("apex", "detectron2", "inplace_abn", "openmmlab", "sparse", "spikingjelly"),
            *("timm", "torch_geometric", "torchvision"),
        },
        {"table"},
    ),
}
# torch's name for convert() is a classmethod of the layer: it calls upwards, when called.
EXCEPTIONS = {("layers", "models")}


def imports(path: Path) -> set[tuple[str, ...]]:
    """What a file imports from this package, inside functions too: ("step", "masked")."""
    package = ("syncbn", *path.relative_to(SOURCE).parent.parts)
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            full = (*base, *node.module.split(".")) if node.module else base
            names = [(*full, alias.name) for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [tuple(alias.name.split(".")) for alias in node.names]
        found |= {name[1:] for name in names if name[0] == "syncbn"}
    return found


def floors(storeys: tuple[set[str], ...]) -> dict[str, int]:
    return {name: number for number, names in enumerate(storeys) for name in names}


FLOOR = floors(FLOORS)


def test_arrows_point_one_way_between_rooms():
    used = set()
    for path in SOURCE.rglob("*.py"):
        if path == SOURCE / "__init__.py":
            continue
        room = path.relative_to(SOURCE).parts[0].removesuffix(".py")
        assert room in FLOOR, f"{room} has no floor: add it to FLOORS, and to DESIGN's house"
        used |= {(room, name[0]) for name in imports(path) if name[:1] != (room,)}
    used = {(a, b) for a, b in used if b in FLOOR}
    upwards = {(a, b) for a, b in used if FLOOR[b] >= FLOOR[a]}
    assert upwards == EXCEPTIONS
    assert {("models", "layers"), ("step", "kernels"), ("kernels", "numerics")} <= used


@pytest.mark.parametrize("room", ROOMS)
def test_arrows_point_one_way_within_a_room(room):
    floor = floors(ROOMS[room])
    files = {path.stem: path for path in (SOURCE / room).glob("*.py") if path.stem != "__init__"}
    assert floor.keys() == files.keys()
    parts = tuple(room.split("/"))
    for name, path in files.items():
        for imported in imports(path):
            inner = imported[len(parts) :][:1]
            if imported[: len(parts)] == parts and inner and inner[0] in floor:
                assert floor[inner[0]] < floor[name], f"{name} imports {inner[0]}"


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
from syncbn.cli import main
sys.stdout = sys.stderr
assert main(["info"]) == 0
assert main(["trace", "/nowhere"]) == 2
print(*sorted(name for name in set(sys.modules) - before), file=sys.__stdout__)
"""


@pytest.fixture(scope="module")
def imported():
    """The modules that come with syncbn, in a new process, and those after info and trace."""
    result = subprocess.run(
        [sys.executable, "-c", IMPORT], capture_output=True, text=True, timeout=120, check=False
    )
    assert result.returncode == 0, result.stderr
    return [set(line.split()) for line in result.stdout.splitlines()]


def roots(names):
    return {name.partition(".")[0] for name in names}


def test_importing_starts_nothing(imported):
    """torch alone: no extras, no MPI, no Triton, no compiler, no environment, no threads."""
    names, _ = imported
    assert roots(names) == {"syncbn"}
    assert not {"syncbn.cli", "syncbn.demo"} & names


def test_importing_takes_no_dtensors(imported):
    names, _ = imported
    assert "torch.distributed.tensor" not in names


WINDOWS = """
import sys, torch
sys.modules["fcntl"] = None
sys.platform = "win32"
import syncbn
from syncbn.comm.memory import unavailable
assert "the system is win32" in unavailable()
"""


def test_importing_without_fcntl():
    """On Windows no memory is shared: the rest works."""
    subprocess.run([sys.executable, "-c", WINDOWS], timeout=120, check=True)


def test_info_and_trace_take_torch_alone(imported):
    """And Triton, where there is a GPU for it."""
    _, names = imported
    usual = sys.stdlib_module_names | {name for name in names if name.startswith("_sysconfigdata")}
    assert roots(names) - usual - {"triton"} == {"syncbn"}


# From the top down: a folder of csrc/ includes from itself and from those after it. Only the first
# may include torch: the others are tested without it.
FOLDERS = ("torch", "steps", "plan", "loops", "exchange")


def test_includes_point_one_way():
    for path in (*CSRC.rglob("*.h"), *CSRC.rglob("*.cpp")):
        own = path.relative_to(CSRC).parts[0]
        text = path.read_text()
        included = re.findall(r'^#include "(\w+)/', text, re.MULTILINE)
        assert set(included) <= set(FOLDERS[FOLDERS.index(own) :]), f"{path} includes upwards"
        assert own == "torch" or "#include <torch/" not in text, f"{path} includes torch"


def test_files_stay_short():
    for path in (*SOURCE.rglob("*.py"), *CSRC.rglob("*.h"), *CSRC.rglob("*.cpp")):
        assert len(path.read_text().splitlines()) <= 250, f"{path.name} wants to be two files"


def test_every_public_name_is_documented():
    for name in syncbn.__all__:
        thing = getattr(syncbn, name)
        assert isinstance(thing, str) or (thing.__doc__ or "").strip(), name


def test_public_names_do_not_tell_where_they_live():
    for home in (syncbn, syncbn.comm):
        for name in home.__all__:
            thing = getattr(home, name)
            if isinstance(thing, type) or callable(thing):
                where = thing.__module__
                assert where == "syncbn" or (
                    home is syncbn.comm and where.startswith("syncbn.comm")
                )
    assert syncbn.comm.MPI.__module__ == "syncbn.comm"
