"""Each framework's example equals one process with the whole batch, on two ranks."""

from __future__ import annotations

import re
from importlib.util import find_spec

import pytest

from support.paths import ROOT
from support.scripts import execute, execute_anew

FOLDER = ROOT / "examples/frameworks"
EXAMPLES = sorted(FOLDER.glob("with_*.py"))
# What a script is told where torchrun starts it: from the first of them Lightning knows.
TORCHRUN = {"TORCHELASTIC_RUN_ID": "1", "GROUP_RANK": "0", "LOCAL_WORLD_SIZE": "2"}
# DeepSpeed compiles a library for CPUs at its first start: a minute. Without it all is the same.
UNCOMPILED = """
import os, runpy, sys
import deepspeed
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
path = {!r}
os.chdir(os.path.dirname(path))
sys.path.insert(0, os.path.dirname(path))
runpy.run_path(path, run_name="__main__")
"""


def packages(path) -> set[str]:
    found = re.findall(r"^(?:import|from) (\w+)", path.read_text(), re.MULTILINE)
    needed = {name for name in found if name not in ("toy", "syncbn")}
    return needed | ({"accelerate"} if "transformers" in needed else set())


def check(said: str) -> None:
    verdicts = re.findall(r"^2 ranks equal one process: (\w+)", said, re.MULTILINE)
    assert verdicts, said
    assert set(verdicts) == {"True"}, said


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_two_ranks_equal_one_process(path):
    missing = [name for name in packages(path) if find_spec(name) is None]
    if missing:
        pytest.skip(f"needs the extra [frameworks]: {', '.join(missing)}")
    program = UNCOMPILED.format(str(path)) if "deepspeed" in path.name else path
    ended = execute(program, ranks=2, timeout=150, **TORCHRUN)
    said = "\n".join(rank.stdout + rank.stderr for rank in ended)
    assert [rank.code for rank in ended] == [0, 0], said
    check(said)


def test_lightning_starts_its_ranks_itself():
    if find_spec("lightning") is None:
        pytest.skip("needs the extra [frameworks]: lightning")
    ended = execute_anew(FOLDER / "with_lightning.py", timeout=240)
    assert ended.code == 0, ended.stderr
    check(ended.stdout)


def test_examples_are_short():
    for path in EXAMPLES:
        assert len(path.read_text().splitlines()) <= 75, path.name
