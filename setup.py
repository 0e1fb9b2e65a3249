"""Compiles csrc/ into syncbn/libsyncbn.so, where torch and a C++ compiler are present.

The library has no Python in it and uses only LibTorch's stable ABI, so that one wheel serves every
Python and every torch from 2.10 on. Where it can't be built, syncbn is pure Python and says so.
Everything else about the package stands in pyproject.toml.
"""

import importlib.util
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

SOURCES = ["isa_baseline.cpp", "isa_v3.cpp", "isa_v4.cpp", "register.cpp"]
FLAGS = [
    *("-std=c++17", "-O3", "-g0", "-fno-math-errno", "-fno-strict-aliasing", "-fvisibility=hidden"),
    *("-Wno-psabi", "-Wno-maybe-uninitialized"),  # of GCC: vectors as arguments, its own headers
]


def native() -> list[Extension]:
    """The library, if torch's headers are here and the platform's compilers speak GNU C++."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None or os.name == "nt":
        reason = "torch is not installed" if torch is None else "no GNU C++ compiler"
        print(f"syncbn: without compiled CPU operators ({reason})")
        return []
    home = Path(torch.origin).parent
    return [
        Extension(
            "syncbn.libsyncbn",
            [f"csrc/{name}" for name in SOURCES],
            depends=[str(path) for path in Path("csrc").glob("*.h")],
            include_dirs=[str(home / "include")],
            library_dirs=[str(home / "lib")],
            libraries=["torch_cpu"],
            define_macros=[("TORCH_TARGET_VERSION", "0x020a000000000000")],  # 2.10
            extra_compile_args=FLAGS,
            language="c++",
        )
    ]


class BuildLibrary(build_ext):
    """Build a plain shared library, or none."""

    def run(self) -> None:
        try:
            super().run()
        except Exception as error:  # whatever a compiler, or the lack of one, may raise
            print(f"syncbn: without compiled CPU operators ({error})")
            self.extensions = self.distribution.ext_modules = []

    def build_extension(self, ext: Extension) -> None:
        compiler, compile_all = self.compiler, self.compiler.compile

        def compile_in_parallel(sources: list[str], *args: object, **options: object) -> list[str]:
            with ThreadPoolExecutor() as pool:
                compiled = pool.map(lambda one: compile_all([one], *args, **options), sources)
                return [name for names in compiled for name in names]

        compiler.compile = compile_in_parallel
        super().build_extension(ext)

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []


class Wheel(bdist_wheel):
    """Tag the wheel py3-none-<platform>, or py3-none-any without the library."""

    def run(self) -> None:
        self.run_command("build_ext")  # only then it is known
        self.root_is_pure = not self.distribution.ext_modules
        super().run()

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        return "py3", "none", platform


setup(ext_modules=native(), cmdclass={"build_ext": BuildLibrary, "bdist_wheel": Wheel})
