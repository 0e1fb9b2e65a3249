"""Other programs: the project's own tests, and NVIDIA's compute-sanitizer on small tensors."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

from .machine import Machine, kernels_of
from .sections import Result, Skipped

_ROOT = Path(__file__).parents[2]
TOOLS = ("memcheck", "racecheck")
_PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin")
_SECONDS = 38  # of each
_CODE = 86  # of what finds something


def run_tests(machine: Machine) -> Result:
    """The tests of the kernels, whose tensors go to the device; in a rehearsal a few of them."""
    needed = ("pytest", "hypothesis", "numpy")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise Skipped(f"{' and '.join(missing)} not installed")
    name = kernels_of(machine)
    wanted = name if machine.is_gpu else f"{name} and packed"
    options = ["-p", "no:cacheprovider", "-x", "-k", wanted, "tests/kernels/test_kernels.py"]
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *options],
        cwd=_ROOT,
        env=os.environ | {"SYNCBN_TEST_DEVICE": machine.device.type},
        capture_output=True,
        text=True,
        check=False,
    )
    lines = ended.stdout.strip().splitlines() or [""]
    if ended.returncode:
        errors = [line for line in lines if line.startswith(("E  ", "FAILED", "ERROR"))]
        raise AssertionError(f"{' '.join(errors)[:300]} {lines[-1]} {ended.stderr[-200:]}")
    return Result(f"tests/kernels/test_kernels.py -k '{wanted}': {lines[-1]}")


def check_with_sanitizer(machine: Machine) -> Result:
    """Accesses out of bounds, races in shared memory."""
    program = shutil.which("compute-sanitizer") or next(
        (found for place in _PLACES if (found := shutil.which("compute-sanitizer", path=place))),
        None,
    )
    if not machine.is_gpu:
        raise Skipped("compute-sanitizer needs a GPU")
    if program is None:
        raise Skipped(f"compute-sanitizer is neither on PATH nor in {' or '.join(_PLACES)}")
    script = Path(__file__).parents[1] / "gpu_check.py"
    steps = [sys.executable, str(script), "--toy", "--only", "steps", "--json", "/dev/null"]
    done = []
    for tool in TOOLS:
        options = [program, "--tool", tool, "--error-exitcode", str(_CODE)]
        try:
            ended = subprocess.run(
                [*options, *steps], capture_output=True, text=True, timeout=_SECONDS, check=False
            )
        except subprocess.TimeoutExpired:
            done.append(f"{tool} not done within {_SECONDS} s")
            continue
        if ended.returncode:
            raise AssertionError(f"{tool} ends with {ended.returncode}: {ended.stdout[-300:]}")
        done.append(f"{tool} clean")
    if not any("clean" in words for words in done):
        raise Skipped(", ".join(done))
    return Result(", ".join(done))
