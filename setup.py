"""Compiles csrc/ into syncbn/libsyncbn.so, where torch and a GNU C++ compiler are present.

The library has no Python in it and uses only LibTorch's stable ABI, so that one wheel serves every
Python and every torch from 2.10 on. Where it can't be built, syncbn is pure Python, and
syncbn/libsyncbn.txt says why: `syncbn info` shows it. Everything else about the package stands in
pyproject.toml.
"""

import importlib.util
import os
import re
import sys
import sysconfig
import tempfile
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

LIBRARY = "syncbn.libsyncbn"
SOURCES = [
    *("csrc/loops/isa_baseline.cpp", "csrc/loops/isa_v3.cpp", "csrc/loops/isa_v4.cpp"),
    *("csrc/exchange/shared_memory.cpp", "csrc/torch/register.cpp"),
]
FLAGS = [
    *("-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fno-strict-aliasing", "-fvisibility=hidden"),
    # of GCC: vectors as arguments, its own headers; of Clang, that it does not know the second
    *("-Wno-psabi", "-Wno-maybe-uninitialized", "-Wno-unknown-warning-option"),
]
LEVELS = {"isa_v3.cpp": "-march=x86-64-v3", "isa_v4.cpp": "-march=x86-64-v4"}


def flags_of(source: str) -> list[str]:
    """The flags of one source file: some are for newer processors than the others."""
    level = LEVELS.get(Path(source).name)
    if level is None or not sysconfig.get_platform().endswith(("x86_64", "universal2")):
        return FLAGS
    only_x86 = ["-Xarch_x86_64"] if sys.platform == "darwin" else []  # of several in one file
    return [*FLAGS, *only_x86, level]


def native() -> Extension:
    torch = importlib.util.find_spec("torch")
    home = Path(torch.origin).parent if torch and torch.origin else None
    return Extension(
        LIBRARY,
        SOURCES,
        depends=[str(path) for path in Path("csrc").rglob("*.h")],
        include_dirs=["csrc", *([str(home / "include")] if home else [])],
        library_dirs=[str(home / "lib")] if home else [],
        libraries=["torch_cpu"],
        define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],  # 2.10
        language="c++",
    )


class BuildLibrary(build_ext):
    """Build a plain shared library, or write down why not."""

    def run(self) -> None:
        inplace, reason = self.inplace, ""  # setuptools forgets the first if building fails
        with tempfile.TemporaryFile("w+", errors="replace") as said:
            try:
                with stderr_into(said):
                    super().run()
            except Exception as error:  # whatever a compiler, or the lack of one, may raise
                reason = first_error(said) or textwrap.shorten(str(error), 200)
            said.seek(0)
            sys.stderr.write(said.read())
        self.inplace = inplace
        library = Path(self.get_ext_fullpath(LIBRARY))
        why_not = library.with_suffix(".txt")
        why_not.unlink(missing_ok=True)
        if reason:
            print(f"syncbn: without compiled CPU operators ({reason})")
            library.unlink(missing_ok=True)  # of an earlier build: its operators may be others
            library.parent.mkdir(parents=True, exist_ok=True)
            why_not.write_text(reason + "\n")
            self.extensions = self.distribution.ext_modules = []

    def build_extension(self, ext: Extension) -> None:
        if os.name == "nt":
            raise RuntimeError("on Windows, whose compiler does not speak GNU C++")
        if not ext.library_dirs:
            raise RuntimeError("torch is not installed where syncbn was built")
        compiler, compile_all = self.compiler, self.compiler.compile

        def compile_in_parallel(sources: list[str], **options: object) -> list[str]:
            def compile_one(source: str) -> list[str]:
                return compile_all([source], **options | {"extra_postargs": flags_of(source)})

            with ThreadPoolExecutor() as pool:
                return [name for names in pool.map(compile_one, sources) for name in names]

        compiler.compile = compile_in_parallel
        super().build_extension(ext)

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []


@contextmanager
def stderr_into(file: TextIO) -> Iterator[None]:
    """What is written to standard error, by processes started here too, goes to the file."""
    sys.stderr.flush()
    before = os.dup(2)
    os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        sys.stderr.flush()
        os.dup2(before, 2)
        os.close(before)


def first_error(said: TextIO) -> str:
    """The line in which a compiler or linker named its first error, or nothing."""
    said.seek(0)
    lines = (line.strip() for line in said)
    return next((line for line in lines if re.search(r"\berror:|cannot find", line)), "")


class Wheel(bdist_wheel):
    """Tag the wheel py3-none-<platform>, or py3-none-any without the library."""

    def run(self) -> None:
        self.run_command("build_ext")  # only then it is known
        self.root_is_pure = not self.distribution.ext_modules
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        return "py3", "none", platform


setup(ext_modules=[native()], cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel})
