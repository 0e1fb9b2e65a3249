"""setup.py: which torch a build takes, the command that it names, the version."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

import syncbn
from support.paths import ROOT
from support.sources import copy_sources
from syncbn import _version

COMMAND = "pip install --force-reinstall --no-deps ."


@pytest.fixture
def setup(monkeypatch) -> ModuleType:
    """setup.py, read but not run, where no torch is in reach as it is in an isolated build."""
    spec = importlib.util.spec_from_file_location("syncbn_setup", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setitem(sys.modules, "torch", None)
    return module


def test_an_isolated_build_finds_the_environments_torch(setup, monkeypatch, tmp_path):
    """As pip isolates it: the same Python, with another path."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    home, why_not = setup.find_torch()
    assert (home, why_not) == (Path(torch.__file__).parent, "")


def test_the_environments_that_are_asked_for_torch(setup, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    for name in ("venv", "conda", ".venv", "other"):
        (tmp_path / name / "bin").mkdir(parents=True)
        (tmp_path / name / "bin/python").touch()
    monkeypatch.setenv("VIRTUAL_ENV", str(tmp_path / "venv"))
    monkeypatch.setenv("CONDA_PREFIX", str(tmp_path / "conda"))
    monkeypatch.setenv("PATH", str(tmp_path / "other/bin"))
    first, *others = setup.pythons()
    assert first == Path(sys.executable)
    asked = [path.parent.parent.name for path in others[:4]]
    assert asked == ["venv", "conda", ".venv", "other"]


def planted(folder: Path, version: str | None, *, headers: bool = True) -> Path:
    """A Python that says where its torch is."""
    home = folder / "torch"
    (home / "lib").mkdir(parents=True)
    if headers:
        (home / "include/torch/csrc/stable").mkdir(parents=True)
    (home / "version.py").write_text(f"__all__ = []\n__version__ = '{version}'\n")
    python = folder / "python"
    python.write_text(f"#!/bin/sh\n{'exit 1' if version is None else f'echo {home}/__init__.py'}\n")
    python.chmod(0o755)
    return python


def test_a_torch_that_will_do_is_found_behind_others(setup, monkeypatch, tmp_path):
    none = planted(tmp_path / "none", None)
    old = planted(tmp_path / "old", "2.9.1+cpu")
    bare = planted(tmp_path / "bare", "2.13.0", headers=False)
    good = planted(tmp_path / "good", "2.10.0+cu130")
    garbage = tmp_path / "garbage"
    garbage.write_text("")
    for pythons, home, why_not in (
        ([garbage, none, old, bare, good], tmp_path / "good/torch", ""),
        ([none, bare, old], None, "torch 2.9.1+cpu is older than 2.10, the oldest that will do"),
        ([none, bare], None, "torch 2.13.0 came without its headers"),
        (
            [none, garbage],
            None,
            "torch was found neither by the Python that built syncbn nor in an active environment",
        ),
    ):
        monkeypatch.setattr(setup, "pythons", lambda pythons=pythons: pythons)
        assert setup.find_torch() == (home, why_not)


@pytest.mark.parametrize(
    ("uv", "from_index", "command"),
    [
        (False, False, COMMAND),
        (True, False, "uv pip install --reinstall-package syncbn ."),
        (
            *(False, True),
            "pip install --force-reinstall --no-deps --no-cache-dir --no-binary syncbn syncbn",
        ),
        (
            *(True, True),
            "uv pip install --reinstall-package syncbn --no-binary-package syncbn syncbn",
        ),
    ],
)
def test_the_command_that_builds_the_library(setup, monkeypatch, tmp_path, uv, from_index, command):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("UV", raising=False)
    if uv:
        monkeypatch.setenv("UV", "/bin/uv")
    if from_index:
        (tmp_path / "PKG-INFO").touch()
    assert setup.command_to_build(editable=False) == command
    if not from_index:
        assert setup.command_to_build(editable=True) == command.replace(" .", " -e .")


def numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.match(r"\d+\.\d+\.\d+", version).group().split(".")))


def test_the_version_without_tags_is_later_than_every_release(setup, monkeypatch, tmp_path):
    released = re.findall(r"^## \[?(\d[\w.]*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert all(numbers(_version.UNINSTALLED) > numbers(each) for each in ["0.1.0", *released])
    copy = copy_sources(tmp_path, ("src", "csrc"))
    monkeypatch.chdir(copy)
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: None)
    assert setup.version() == {"version": _version.UNINSTALLED}
    monkeypatch.setattr(setup.importlib.util, "find_spec", lambda name: name)
    from_git = {"use_scm_version": {"fallback_version": _version.UNINSTALLED}}
    archive = copy / ".git_archival.txt"
    for described, version in (
        ("$Format:%(describe:tags=true)$", from_git),
        ("v0.3.0", from_git),
        ("", {"version": _version.UNINSTALLED}),
    ):
        archive.write_text(f"node: 1a2b3c4\ndescribe-name: {described}\n")
        assert setup.version() == version


def test_sources_that_were_never_installed_have_a_version(tmp_path):
    """python -S: no site-packages, in which syncbn may be."""
    source = Path(syncbn.__file__).parent / "_version.py"
    program = f"import runpy; print(runpy.run_path({str(source)!r})['__version__'])"
    command = [sys.executable, "-S", "-c", program]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    said = subprocess.run(
        command, check=True, capture_output=True, text=True, cwd=tmp_path, env=environment
    )
    assert said.stdout.strip() == _version.UNINSTALLED
