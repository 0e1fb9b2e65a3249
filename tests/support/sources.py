"""A copy of the project's sources, to build from."""

from __future__ import annotations

import shutil
from pathlib import Path

from support.paths import ROOT

FOLDERS = (
    *("src", "csrc", "tests", "docs", "examples", "benchmarks"),
    *("changelog.d", ".github", ".ci"),
)
FILES = (
    *("setup.py", "pyproject.toml", "MANIFEST.in", "Makefile", "constraints.txt"),
    *("README.md", "CHANGELOG.md", "CONTRIBUTING.md", "LICENSE", "CITATION.cff", "SECURITY.md"),
    *(".clang-format", ".pre-commit-config.yaml", ".gitignore"),
)
BUILT = ("*.so", "*.o", "__pycache__", "*.egg-info", "libsyncbn.txt", "_build")


def copy_sources(to: Path, folders: tuple[str, ...]) -> Path:
    """The sources, without anything built."""
    for name in folders:
        shutil.copytree(ROOT / name, to / name, ignore=shutil.ignore_patterns(*BUILT))
    for name in FILES:
        shutil.copy(ROOT / name, to / name)
    return to
