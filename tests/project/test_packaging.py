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
import torch
import wheel_contents

from support.sources import FILES, FOLDERS, copy_sources


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
