"""Whether a wheel that is to be given away carries the compiled operators, and nothing else.

python tests/project/wheel_contents.py dist/syncbn-*.whl
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

NAME = re.compile(r"syncbn-[^-]+-py3-none-(manylinux_\d+_\d+_\w+|macosx_\d+_\d+_\w+)\.whl")
LIBRARY = "syncbn/libsyncbn.so"
MEGABYTES = 3  # 0.6 on x86-64, which has three sets of loops
# LibTorch's stable ABI, which stays what it is from torch to torch; nothing else of torch does.
STABLE = re.compile(
    r"_?(aoti_torch_|torch_(call_dispatcher|library_impl|get_|parallel_for|exception_))"
)
# libc and libstdc++: their symbols carry versions, or are C++'s own; the weak ones may be missing.
SYSTEM = re.compile(r"\S+@+(GLIBC|GLIBCXX|CXXABI|GCC)_[\d.]+$")
NEEDED = {"libtorch_cpu.so", "libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6"}


def faults(wheel: Path) -> list[str]:
    """What is wrong with the wheel, in words."""
    found = []
    if not NAME.fullmatch(wheel.name):
        found.append(f"expected a name py3-none-manylinux or py3-none-macosx, got {wheel.name}")
    if wheel.stat().st_size > MEGABYTES * 1_000_000:
        found.append(f"expected {MEGABYTES} MB at most, got {wheel.stat().st_size / 1e6:.1f} MB")
    with zipfile.ZipFile(wheel) as file, tempfile.TemporaryDirectory() as folder:
        names = [name for name in file.namelist() if not name.endswith("/")]
        metadata = re.compile(r"syncbn-[^/]+\.dist-info/")
        found += [
            f"{name} does not belong here"
            for name in names
            if not (metadata.match(name) or re.fullmatch(r"syncbn/.+\.py|syncbn/py\.typed", name))
            and name != LIBRARY
        ]
        if LIBRARY not in names:
            return [*found, f"{LIBRARY} is missing"]
        library = Path(file.extract(LIBRARY, folder))
        return found + (faults_of_elf(library) if sys.platform == "linux" else [])


def faults_of_elf(library: Path) -> list[str]:
    """Symbols that it expects elsewhere than in the stable ABI and the system, and libraries."""
    found = []
    for line in lines("nm", "-D", "--undefined-only", str(library)):
        kind, symbol = line.split()
        if kind not in "wv" and not (STABLE.match(symbol) or SYSTEM.match(symbol)):
            found.append(f"{symbol} is no symbol of LibTorch's stable ABI, nor of the system")
    for line in lines("readelf", "-d", str(library)):
        needed = re.search(r"\(NEEDED\).*\[(.+)\]", line)
        if needed and needed.group(1) not in NEEDED and not needed.group(1).startswith("ld-linux"):
            found.append(f"it needs {needed.group(1)}")
        if re.search(r"\(R(UN)?PATH\)", line):
            found.append(f"it looks for libraries in a folder of its own: {line.strip()}")
    return found


def lines(*command: str) -> list[str]:
    if shutil.which(command[0]) is None:
        raise SystemExit(f"wheel_contents.py: needs {command[0]}, of binutils")
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()


def main() -> int:
    wheels = [Path(name) for name in sys.argv[1:]]
    if not wheels:
        raise SystemExit("wheel_contents.py: expected a wheel, got none")
    told = [f"{wheel.name}: {fault}" for wheel in wheels for fault in faults(wheel)]
    print("\n".join(told or [f"{wheel.name}: in order" for wheel in wheels]))
    return 1 if told else 0


if __name__ == "__main__":
    sys.exit(main())
