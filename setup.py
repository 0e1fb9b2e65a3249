"""Compiles csrc/ into syncbn/libsyncbn.so, where torch and a GNU C++ compiler are present.

The library has no Python in it and uses only LibTorch's stable ABI, so that one wheel serves every
Python and every torch from 2.10 on. Any of them serves to build it, too: it is looked for where an
isolated build hides it. Where the library can't be built, syncbn is pure Python, and
syncbn/libsyncbn.txt says why, and by which command it comes: `syncbn info` shows both. Everything
else about the package, but for its version, stands in pyproject.toml.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain
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


OLDEST_TORCH = (2, 10)
WHERE_IS_TORCH = "from importlib.util import find_spec; print(find_spec('torch').origin)"


def pythons() -> Iterator[Path]:
    """Those whose torch may be meant, the likeliest first.

    pip runs an isolated build in the environment's own Python; build and uv run it in another, with
    that of an active environment in PATH. uv finds .venv by itself.
    """
    yield Path(sys.executable)
    names = ("VIRTUAL_ENV", "CONDA_PREFIX")
    prefixes = [*(os.environ[name] for name in names if name in os.environ), ".venv"]
    folders = [Path(prefix, "bin") for prefix in prefixes]
    for folder in (*folders, *map(Path, os.get_exec_path()), Path(sys.base_prefix, "bin")):
        yield from (folder / name for name in ("python", "python3") if (folder / name).exists())


def torch_of(python: Path) -> Path | None:
    """Where this Python's torch lies, which need not be imported."""
    hiding = ("PYTHONPATH", "PYTHONNOUSERSITE", "PYTHONHOME")  # by these pip isolates a build
    environment = {name: value for name, value in os.environ.items() if name not in hiding}
    command = [python, "-c", WHERE_IS_TORCH]
    try:
        said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):  # no Python, in spite of its name
        return None
    return Path(said.stdout.strip()).parent if said.returncode == 0 else None


def find_torch() -> tuple[Path | None, str]:
    """The folder of a torch to build against; else None, and why."""
    spec = importlib.util.find_spec("torch")
    own = [Path(spec.origin).parent] if spec and spec.origin else []
    why_not = "torch was found neither by the Python that built syncbn nor in an active environment"
    for home in chain(own, map(torch_of, dict.fromkeys(pythons()))):
        if home is None or not (home / "version.py").exists():
            continue
        found = re.search(r"__version__ = '((\d+)\.(\d+)[^']*)", (home / "version.py").read_text())
        if found is None or tuple(map(int, found.group(2, 3))) < OLDEST_TORCH:
            version = found.group(1) if found else "of unknown version"
            why_not = f"torch {version} is older than 2.10, the oldest that will do"
        elif not (home / "include/torch/csrc/stable").is_dir() or not (home / "lib").is_dir():
            why_not = f"torch {found.group(1)} came without its headers"
        else:
            return home, ""
    return None, why_not


def command_to_build(*, editable: bool) -> str:
    """What to type where torch and a compiler are, for an installation that has the library."""
    uv = "UV" in os.environ  # which it tells the builds that it starts
    if uv:
        command, without_wheel = "uv pip install --reinstall-package syncbn", "--no-binary-package"
    else:
        command, without_wheel = "pip install --force-reinstall --no-deps", "--no-binary"
    if not Path("PKG-INFO").exists():
        return f"{command} -e ." if editable else f"{command} ."
    kept = "" if uv else " --no-cache-dir"  # what was built before
    return f"{command}{kept} {without_wheel} syncbn syncbn"  # from an index


def native() -> Extension:
    return Extension(
        LIBRARY,
        SOURCES,
        depends=[str(path) for path in Path("csrc").rglob("*.h")],
        include_dirs=["csrc"],
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
            except Exception as error:  # whatever a compiler may raise
                reason = first_error(said) or textwrap.shorten(str(error), 200)
            said.seek(0)
            sys.stderr.write(said.read())
        self.inplace = inplace
        library = Path(self.get_ext_fullpath(LIBRARY))
        why_not = library.with_suffix(".txt")
        why_not.unlink(missing_ok=True)
        if reason:
            command = command_to_build(editable=bool(inplace))
            print(f"syncbn: without compiled CPU operators ({reason})")
            print(f"syncbn: to have them: {command}")
            library.unlink(missing_ok=True)  # of an earlier build: its operators may be others
            library.parent.mkdir(parents=True, exist_ok=True)
            why_not.write_text(f"{reason}\n{command}\n")
            self.extensions = self.distribution.ext_modules = []

    def build_extension(self, ext: Extension) -> None:
        if os.name == "nt":
            raise RuntimeError("on Windows, whose compiler does not speak GNU C++")
        home, why_not = find_torch()
        if home is None:
            raise RuntimeError(why_not)
        ext.include_dirs.append(str(home / "include"))
        ext.library_dirs.append(str(home / "lib"))
        compiler, compile_all = self.compiler, self.compiler.compile
        for program in (compiler.compiler_so_cxx[0], compiler.linker_so_cxx[0]):
            if shutil.which(program) is None:
                raise RuntimeError(f"the compiler {program} is missing")

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


def version() -> dict[str, object]:
    """From the tag and the commits since; from the file where nothing tells them."""
    written = Path("src/syncbn/_version.py").read_text()
    last_resort = re.search(r'^UNINSTALLED = "(.+)"', written, re.MULTILINE).group(1)
    archive = Path(".git_archival.txt")
    untagged = archive.exists() and re.search(
        "^describe-name: *$", archive.read_text(), re.MULTILINE
    )
    # Not there without build isolation; and of an archive before the first tag it makes 0.0.
    if untagged or importlib.util.find_spec("setuptools_scm") is None:
        return {"version": last_resort}
    return {"use_scm_version": {"fallback_version": last_resort}}


if __name__ == "__main__":
    commands = {"build_ext": BuildLibrary, "bdist_wheel": Wheel}
    setup(ext_modules=[native()], cmdclass=commands, **version())
