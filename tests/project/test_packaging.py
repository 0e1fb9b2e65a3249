"""What an installation contains: the compiled operators where they can be built, else none."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import torch
import wheel_contents

import syncbn
from support.paths import ROOT
from syncbn import _version

FOLDERS = (
    *("src", "csrc", "tests", "docs", "examples", "benchmarks"),
    *("changelog.d", ".github", ".ci"),
)
FILES = (
    *("setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "constraints.txt"),
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "CITATION.cff", "SECURITY.md"),
    *(".clang-format", ".pre-commit-config.yaml", ".gitignore"),
)
BUILT = ("*.so", "*.o", "__pycache__", "*.egg-info", "libsyncbn.txt", "_build")


def copy_sources(to: Path, folders: tuple[str, ...]) -> Path:
    """The sources, without anything built."""
    for name in folders:
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns(*BUILT))
    for name in FILES:
        shutil.copy(ROOT / name, to / name)
    return to


@pytest.fixture
def copy(tmp_path):
    return copy_sources(tmp_path, ("src", "csrc"))


def build(copy: Path, *options: str, **environment: str) -> tuple[list[str], str, str]:
    """What the wheel contains, its tag, and what was said while it was built."""
    command = [sys.executable, *options, "setup.py", "bdist_wheel", "--dist-dir", "dist"]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        timeout=300,
        cwd=copy,
        env=os.environ | environment,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    (wheel,) = (copy / "dist").glob("*.whl")
    return zipfile.ZipFile(wheel).namelist(), wheel.name, result.stdout


@pytest.mark.slow  # make wheel builds and uses one, too
@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
def test_one_wheel_for_every_python(copy):
    names, tag, _ = build(copy)
    assert "syncbn/libsyncbn.so" in names
    assert "-py3-none-" in tag
    assert not tag.endswith("-any.whl")


COMPILER = """#!/bin/sh
echo "$0: warning: this compiler is only a test" >&2
echo "csrc/loops/isa_v3.cpp:1:1: error: what is a vector?" >&2
echo "compilation terminated." >&2
exit 1
"""
SAID = "csrc/loops/isa_v3.cpp:1:1: error: what is a vector?"
COMMAND = "pip install --force-reinstall --no-deps ."


def test_without_a_compiler_there_is_a_pure_python_wheel(copy):
    """It keeps what the compiler said, and no library that an earlier build left behind."""
    compiler = copy / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    names, tag, said = build(copy, CC=str(compiler), CXX=str(compiler))
    assert not [name for name in names if name.endswith(".so")]
    assert tag.endswith("-py3-none-any.whl")
    assert said.count(f"syncbn: without compiled CPU operators ({SAID})") == 1
    assert said.count(f"syncbn: to have them: {COMMAND}") == 1
    assert "syncbn/kernels/composite.py" in names
    assert "syncbn/libsyncbn.txt" in names
    zipfile.ZipFile(copy / "dist" / tag).extractall(copy / "installed")
    result = subprocess.run(
        [sys.executable, "-m", "syncbn", "info"],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"PYTHONPATH": str(copy / "installed"), "SYNCBN_KERNELS": ""},
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert (
        f"libsyncbn.so was not built with this installation: {SAID}; with torch 2.10 or newer and "
        f"g++ 11 or clang 14, or newer, installed, run '{COMMAND}' (https://" in result.stdout
    )


def test_a_failed_build_removes_what_an_earlier_one_left(copy):
    library = copy / "src/syncbn/libsyncbn.so"
    library.touch()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = os.environ | {"CC": "no-such-compiler", "CXX": "no-such-compiler"}
    subprocess.run(command, timeout=300, cwd=copy, env=environment, check=True)
    assert not library.exists()
    why_not = library.with_suffix(".txt").read_text()
    assert why_not == f"the compiler no-such-compiler is missing\n{COMMAND[:-1]}-e .\n"


HIDING = """
import os, runpy, sys
sys.modules["torch"] = None
sys.executable = sys.base_prefix = os.environ["PATH"] = "/nowhere"
for name in ("VIRTUAL_ENV", "CONDA_PREFIX"):
    os.environ.pop(name, None)
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def test_without_torch_there_is_a_pure_python_wheel(copy):
    runner = copy / "without_torch.py"
    runner.write_text(HIDING)
    names, tag, said = build(copy, runner.name)
    assert not [name for name in names if name.endswith(".so")]
    assert tag.endswith("-py3-none-any.whl")
    assert said.count("syncbn: without compiled CPU operators (torch was found neither by") == 1


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


def test_the_version_without_tags_is_later_than_every_release(setup, monkeypatch, copy):
    released = re.findall(r"^## \[?(\d[\w.]*)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert all(numbers(_version.UNINSTALLED) > numbers(each) for each in ["0.1.0", *released])
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


def test_the_source_distribution_is_complete(tmp_path):
    """Without git's help too: everything that make test, make wheel and the operators need."""
    copy_sources(tmp_path, FOLDERS)
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", "dist"]
    subprocess.run(command, timeout=300, cwd=tmp_path, check=True)
    (archive,) = (tmp_path / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        packed = {name.partition("/")[2] for name in file.getnames()}
    copied = {
        path.relative_to(tmp_path).as_posix()
        for folder in FOLDERS
        for path in (tmp_path / folder).rglob("*")
        if path.is_file() and ".egg-info" not in path.as_posix()
    }
    assert {"csrc/torch/register.cpp", "tests/support/ranks.py", "docs/demo.png"} <= copied
    assert copied <= packed
    assert {"PKG-INFO", *FILES} <= packed


def wheel(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w") as file:
        for name, content in files.items():
            file.writestr(name, content)
    return path


LIBRARY, WHY_NOT = "syncbn/libsyncbn.so", "syncbn/libsyncbn.txt"
GOOD_NAME = "syncbn-1.0-py3-none-manylinux_2_28_x86_64.whl"


@pytest.mark.skipif(sys.platform != "linux", reason="looks into ELF")
@pytest.mark.skipif(shutil.which("readelf") is None, reason="needs binutils")
def test_what_is_wrong_with_a_wheel_is_found(tmp_path):
    library = Path(torch._C.__file__).read_bytes()  # it needs what is not of the stable ABI
    file = wheel(tmp_path / GOOD_NAME, {"syncbn/a.py": b"", LIBRARY: library})
    found = wheel_contents.faults(file)
    assert "it needs libtorch_python.so" in found
    assert any("stable ABI" in fault for fault in found)
    pure = wheel(tmp_path / "syncbn-1.0-py3-none-any.whl", {WHY_NOT: b"", "tests": b""})
    assert wheel_contents.faults(pure) == [
        f"expected a name py3-none-manylinux or py3-none-macosx, got {pure.name}",
        "syncbn/libsyncbn.txt does not belong here",
        "tests does not belong here",
        "syncbn/libsyncbn.so is missing",
    ]
    large = wheel(tmp_path / GOOD_NAME, {"syncbn/a.py": os.urandom(3_100_000)})
    assert wheel_contents.faults(large)[0] == "expected 3 MB at most, got 3.1 MB"
