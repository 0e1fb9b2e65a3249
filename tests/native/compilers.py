"""Builds the library with every compiler of this machine and holds each to the tests.

python tests/native/compilers.py [compiler …]   (make test-compilers, make test-aarch64)

Each has to compile loops for every instruction set into files that keep nothing that another file
could take for its own; `syncbn info` has to name the processor's best set; the loops are compared
with long double; and all compilers have to give the same reproducible bits, those for AArch64, in
an emulator, too. The library of the first and of the last one also runs the operators' own tests.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
WORK = ROOT / "build/compilers"
CROSS = "aarch64-linux-gnu-g++"
KNOWN = (
    *(f"g++-{version}" for version in range(11, 18)),
    *(f"clang++-{version}" for version in range(14, 25)),
    CROSS,
)
REQUIRED = ("g++-11", "g++-12", "clang++-14", "clang++-15", "clang++-16", "clang++-19", CROSS)
FLAGS = ("-std=c++17", "-fno-math-errno", "-fno-strict-aliasing", "-Wno-psabi", "-pthread")


def run(*command: str | Path, **environment: str) -> str:
    """What a command prints; what it complained of, if it fails."""
    result = subprocess.run(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
        check=False,
    )
    if result.returncode != 0:
        raise AssertionError(f"{' '.join(map(str, command))}\n{result.stdout}")
    return result.stdout


def build(compiler: str) -> list[Path]:
    """The library, as setup.py builds it; returns the object files of the loops."""
    home = WORK / compiler
    places = (f"--build-lib={home}/lib", f"--build-temp={home}/temp")
    said = run(sys.executable, "setup.py", "-q", "build", *places, CC=compiler, CXX=compiler)
    assert (home / "lib/syncbn/libsyncbn.so").exists(), said
    return sorted((home / "temp/csrc/loops").glob("isa_*.o"))


def build_loops(compiler: str) -> list[Path]:
    """The loops that need no flags of their own."""
    loops = WORK / compiler / "isa_baseline.o"
    run(compiler, *FLAGS, "-O3", "-Icsrc", "-c", "csrc/loops/isa_baseline.cpp", "-o", loops)
    return [loops]


def check_symbols(loops: Path) -> None:
    """What others could link to must be the instruction set's own."""
    space = f"syncbn::{loops.stem.removeprefix('isa_')}::"
    for line in run("nm", "-C", "--defined-only", loops).splitlines():
        _, kind, name = line.split(maxsplit=2)
        assert kind.islower() or space in name, f"{loops} defines {name}"


def check_info(compiler: str) -> str:
    """The set that `syncbn info` names: the processor's best."""
    library = {"PYTHONPATH": str(WORK / compiler / "lib"), "SYNCBN_KERNELS": "native"}
    info = run(sys.executable, "-m", "syncbn", "info", "--json", **library)
    named = json.loads(info)["kernels"]["cpu"]
    best = {"AVX2": "x86-64-v3", "AVX512": "x86-64-v4"}
    expected = best.get(torch.backends.cpu.get_cpu_capability(), r"x86-64|AArch64")
    assert re.fullmatch(rf"native \({expected}\)", named), f"{named} is not {expected}"
    return named


def check_loops(compiler: str, loops: list[Path]) -> str:
    """The native tests; returns the reproducible sums' bits."""
    static, emulator = (["-static"], ["qemu-aarch64"]) if compiler == CROSS else ([], [])
    said = ""
    for test in ("test_exchange", "test_loops", "test_samples"):
        program = WORK / compiler / test
        source = f"tests/native/{test}.cpp"
        run(compiler, *FLAGS, "-O1", *static, "-Icsrc", source, *loops, "-o", program)
        first = "24" if emulator else "0"  # of the loops' cases: an emulator is slow
        said = run(*emulator, program, "1", "40", first)
    (bits,) = re.findall(r"bits ([0-9a-f]+)", said)
    return bits


def check(compiler: str) -> str:
    """Builds and tests with one compiler; returns the reproducible sums' bits."""
    (WORK / compiler).mkdir(parents=True)
    if compiler == CROSS:
        loops, named = build_loops(compiler), "AArch64"
    else:
        loops = build(compiler)
        named = check_info(compiler)
    for one in loops:
        check_symbols(one)
    bits = check_loops(compiler, loops)
    print(f"{compiler}: {named}, the loops are right, reproducible bits {bits}", flush=True)
    return bits


def check_operators(compiler: str) -> None:
    library = {"PYTHONPATH": str(WORK / compiler / "lib"), "SYNCBN_KERNELS": "native"}
    tests = ("tests/kernels/test_native.py", "tests/kernels/test_kernels.py")
    said = run(sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *tests, **library)
    print(f"{compiler}: {said.splitlines()[-1]}", flush=True)


def main(wanted: list[str]) -> None:
    shutil.rmtree(WORK, ignore_errors=True)
    found = [name for name in wanted or KNOWN if shutil.which(name)]
    for name in wanted or REQUIRED:
        if name not in found:
            print(f"{name}: skipped, it is not installed", flush=True)
    if CROSS in found and not shutil.which("qemu-aarch64"):
        found.remove(CROSS)
        print(f"{CROSS}: skipped, qemu-aarch64 is not installed", flush=True)
    with ThreadPoolExecutor(2) as pool:
        bits = set(pool.map(check, found))
    assert len(bits) <= 1, f"compilers differ in reproducible bits: {bits}"
    own = [name for name in found if name != CROSS]
    for name in dict.fromkeys(own[:1] + own[-1:]):
        check_operators(name)


if __name__ == "__main__":
    main(sys.argv[1:])
