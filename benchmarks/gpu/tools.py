"""NVIDIA's compute-sanitizer over the steps on small tensors."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from .machine import Machine
from .sections import Result, Skipped

TOOLS = ("memcheck", "racecheck")
_PLACES = ("/usr/local/cuda/bin", "/opt/cuda/bin")
_SECONDS = 38  # of each
_CODE = 86  # of what finds something


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
