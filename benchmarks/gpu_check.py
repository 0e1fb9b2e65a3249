"""Check and time syncbn on this machine's GPU, in at most five minutes.

    python benchmarks/gpu_check.py              (make gpu-check)
    python benchmarks/gpu_check.py --rehearse   (make gpu-check REHEARSE=1)

Each section prints one line: [ok] with figures, [skip] with the reason, or [FAIL] with the error,
after which the others go on; the exit status is 1 if any failed. A rehearsal runs them on the CPU,
on tiny tensors, as far as they go. Details go to --json, or to gpu-check.json in the folder $OUT.
It needs torch, and Triton, which comes with it; nothing else.
"""

from __future__ import annotations

import argparse
import faulthandler
import importlib.util
import os
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gpu.machine import Machine
    from gpu.sections import Result, Section

SOURCE = Path(__file__).parents[1] / "src"


def rehearse_on_the_cpu() -> None:
    """The kernels of a GPU run in Triton's interpreter: said before Triton is imported."""
    os.environ |= {"CUDA_VISIBLE_DEVICES": "", "HIP_VISIBLE_DEVICES": ""}
    if importlib.util.find_spec("triton"):
        os.environ.setdefault("TRITON_INTERPRET", "1")
        os.environ.setdefault("SYNCBN_KERNELS", "triton")


def make_sections() -> list[Section]:
    """In the order in which they run: what decides most comes first."""
    from gpu import compiling, correct, speed, tools, training, waits
    from gpu.sections import Section

    def compile_all(machine: Machine) -> Result:
        cases = [*correct.cases(machine), *speed.speed_cases(machine)]
        return compiling.compile_all(machine, cases)

    return [
        Section("environment", 15, describe),
        Section("compile", 90, compile_all),
        Section("steps", 60, correct.check_steps),
        Section("huge", 20, correct.check_huge),
        Section("tests", 60, tools.run_tests),
        Section("waits", 30, waits.check_waits),
        Section("graphs", 30, waits.check_graphs),
        Section("nccl", 45, training.over_nccl),
        Section("gloo", 60, training.over_gloo),
        Section("speed", 90, speed.measure_device),
        Section("host", 30, speed.measure_host),
        Section("compiled", 75, speed.measure_compiled),
        Section("sanitizer", 80, tools.check_with_sanitizer),
    ]


def describe(machine: Machine) -> Result:
    """Versions, and how fast the device copies."""
    from gpu.machine import GIGABYTE, copy_bandwidth, environment
    from gpu.sections import Result

    found = environment(machine)
    found["copy_bytes_per_second"] = copy_bandwidth(machine)
    if machine.is_gpu and found["kernels"] != "triton":
        raise AssertionError(f"tensors here train on {found['kernels']}: {found['triton']}")
    versions = f"torch {found['torch']}, {found['kernels']} kernels"
    copied = f"copies {found['copy_bytes_per_second'] / GIGABYTE:.0f} GB/s"
    return Result(f"{found['device']}, {versions}, {copied}", found)


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rehearse", action="store_true", help="on the CPU, tiny tensors")
    parser.add_argument("--toy", action="store_true", help="tiny tensors on the GPU")
    parser.add_argument("--only", nargs="+", metavar="SECTION", help="run these sections alone")
    parser.add_argument("--json", type=Path, metavar="PATH", help="where details go")
    return parser.parse_args(arguments)


def place_of_details(given: Path | None) -> Path | None:
    folder = os.environ.get("OUT")
    return Path(folder, "gpu-check.json") if folder and given is None else given


def main(arguments: list[str]) -> int:
    options = parse(arguments)
    if options.rehearse:
        rehearse_on_the_cpu()
    if importlib.util.find_spec("syncbn") is None:
        sys.path.insert(0, str(SOURCE))
        paths = [str(SOURCE), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # of the programs that sections start
    from gpu.machine import find_machine
    from gpu.sections import WHOLE, Report, run_sections

    machine = find_machine(options.toy)
    if not (machine.is_gpu or options.rehearse):
        print("gpu_check: no GPU that torch sees; --rehearse runs on the CPU", file=sys.stderr)
        return 2
    sections = make_sections()
    names = [section.name for section in sections]
    for name in options.only or ():
        if name not in names:
            expected = ", ".join(names)
            print(f"gpu_check: expected sections of {expected}, got {name!r}", file=sys.stderr)
            return 2
    wanted = [each for each in sections if each.name in (options.only or names)]
    report = Report(shlex.join(["gpu_check.py", *arguments]), place_of_details(options.json))
    # A call of the driver that never returns hears no signal.
    if machine.is_gpu:
        faulthandler.dump_traceback_later(WHOLE + 30, exit=True)
    run_sections(wanted, machine, report)
    faulthandler.cancel_dump_traceback_later()
    return 1 if report.failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
