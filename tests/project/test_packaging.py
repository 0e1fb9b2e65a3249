"""What an installation contains: the compiled operators where they can be built, else none."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from support.paths import ROOT

SOURCES = ("src", "csrc", "setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE")


@pytest.fixture
def copy(tmp_path):
    """The sources, without anything built."""
    for name in SOURCES:
        source = ROOT / name
        if source.is_dir():
            ignore = shutil.ignore_patterns("*.so", "__pycache__", "*.egg-info")
            shutil.copytree(source, tmp_path / name, ignore=ignore)
        else:
            shutil.copy(source, tmp_path / name)
    return tmp_path


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


@pytest.mark.slow  # make test-wheel builds and uses one, too
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


def test_without_a_compiler_there_is_a_pure_python_wheel(copy):
    """It keeps what the compiler said, and no library that an earlier build left behind."""
    compiler = copy / "compiler"
    compiler.write_text(COMPILER)
    compiler.chmod(0o755)
    names, tag, said = build(copy, CC=str(compiler), CXX=str(compiler))
    assert not [name for name in names if name.endswith(".so")]
    assert tag.endswith("-py3-none-any.whl")
    assert said.count(f"syncbn: without compiled CPU operators ({SAID})") == 1
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
        f"libsyncbn.so was not built with this installation: {SAID}; with g++ 11" in result.stdout
    )


def test_a_failed_build_removes_what_an_earlier_one_left(copy):
    library = copy / "src/syncbn/libsyncbn.so"
    library.touch()
    command = [sys.executable, "setup.py", "-q", "build_ext", "--inplace"]
    environment = os.environ | {"CC": "no-such-compiler", "CXX": "no-such-compiler"}
    subprocess.run(command, timeout=300, cwd=copy, env=environment, check=True)
    assert not library.exists()
    assert "no-such-compiler" in library.with_suffix(".txt").read_text()


def test_without_torch_there_is_a_pure_python_wheel(copy):
    hidden = "import sys, runpy; sys.modules['torch'] = None; sys.argv = sys.argv[1:]; "
    runner = copy / "without_torch.py"
    runner.write_text(hidden + "runpy.run_path(sys.argv[0], run_name='__main__')\n")
    names, tag, said = build(copy, runner.name)
    assert not [name for name in names if name.endswith(".so")]
    assert tag.endswith("-py3-none-any.whl")
    assert said.count("syncbn: without compiled CPU operators (torch is not installed where") == 1


def test_the_source_distribution_has_every_source_of_the_operators(copy):
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", "dist"]
    subprocess.run(command, timeout=300, cwd=copy, check=True)
    (archive,) = (copy / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as file:
        packed = {name.partition("/")[2] for name in file.getnames()}
    sources = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.*")}
    assert len({source.split("/")[1] for source in sources}) == 5
    assert sources <= packed
