"""Every example a reader can paste runs, and every command the pages name exists."""

from __future__ import annotations

import argparse
import doctest
import importlib
import pkgutil
import re
import shlex
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

import syncbn
from support.mpijob import missing
from support.paths import ROOT
from support.processes import forked_launches
from support.scripts import execute, run_script
from syncbn.diagnose.bench.command import add_options as bench_options
from syncbn.diagnose.check.command import add_options as check_options

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


# Packages of the extra [frameworks]: blocks that import one are skipped where it is missing.
FRAMEWORKS = (
    "accelerate",
    "deepspeed",
    "lightning",
    "mmengine",
    "monai",
    "ptflops",
    "pytorch_lightning",
)


def folders(page: Path) -> tuple[str, ...]:
    """Below docs/: a page's blocks are chosen by them (make test-frameworks)."""
    return page.relative_to(ROOT).parts[1:-1]


def blocks(language: str) -> list:
    return [
        pytest.param(text, id="-".join([*folders(page), page.stem, str(number)]))
        for page in PAGES
        for number, (found, text) in enumerate(BLOCK.findall(page.read_text()), 1)
        if found == language
    ]


@pytest.mark.parametrize("text", blocks("python"))
def test_python_blocks_run(text, tmp_path):
    """Each alone, or on two ranks where it joins them."""
    if "comm.MPI(" in text and missing():
        pytest.skip(missing())
    if "torch.onnx." in text:
        pytest.importorskip("onnxscript", reason="needs the extra [export-test]")
    for name in FRAMEWORKS:
        if re.search(rf"^(import|from) {name}\b", text, re.MULTILINE) and not find_spec(name):
            pytest.skip(f"needs {name}, of the extra [frameworks]")
    script = tmp_path / "block.py"
    script.write_text(text)
    run_script(script, ranks=2 if "init_process_group(" in text else 1)


MAKEFILE = (ROOT / "Makefile").read_text()
EXTRAS = re.findall(r"^(\S+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


OPTIONS = {"check": check_options, "bench": bench_options}


def fits(command: str, words: list[str]) -> bool:
    """Whether that command of syncbn takes these arguments."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    OPTIONS[command](parser, lambda least: int)
    parser.add_argument("--json", action="store_true")
    try:
        parser.parse_args(words)
    except (argparse.ArgumentError, SystemExit):
        return False
    return True


def unknown_in(line: str) -> str | None:
    """What this line of a shell block names that isn't here; the line itself if it runs nothing."""
    for long, short in (("python -m syncbn", "syncbn"), ("uv pip", "pip")):
        line = line.replace(long, short)
    command, *words = shlex.split(line, comments=True) or [""]
    scripts = [word for word in words if word.endswith(".py")]
    if command == "make":
        missing = [word for word in words if not re.search(rf"^{word}:", MAKEFILE, re.MULTILINE)]
    elif command == "pip":
        packages = [word for word in words[1:] if not word.startswith("-")]
        extras = [extra for word in packages for extra in re.findall(r"\[(\w+)\]", word)]
        missing = [extra for extra in extras if extra not in EXTRAS]
        missing += [line] if words[:1] != ["install"] or not packages else []
    elif command == "git":
        missing = [line] if words != ["clone", "https://github.com/syncbn/syncbn"] else []
    elif command == "syncbn":
        arguments = {"demo": 0, "check": 1, "bench": 0, "info": 0, "trace": 1}
        missing = [word for word in words[:1] if word not in arguments]
        if words and words[0] in OPTIONS and fits(words[0], words[1:]):
            words = words[: 1 + arguments[words[0]]]
        missing = missing or words[1 + arguments.get("".join(words[:1]), 0) :]
    elif command in ("torchrun", "mpiexec", "python"):
        missing = [script for script in scripts if not (ROOT / script).exists()]
        missing += [] if scripts else [line]
    else:
        missing = [line] if command else []
    return missing[0] if missing else None


@pytest.mark.parametrize("text", blocks("sh"))
def test_commands_of_shell_blocks_exist(text):
    assert text.strip()
    for line in text.splitlines():
        assert unknown_in(line) is None, line


@pytest.mark.parametrize(
    "line",
    [
        *("make nonsense", "pip install", "pip install 'syncbn[nonsense]'", "syncbn nonsense"),
        *("uv pip install '.[nonsense]'", "git pull"),
        *("syncbn info nonsense", "syncbn trace folder nonsense"),
        *("syncbn check a:b --nonsense", "syncbn check a:b --ranks two", "syncbn check a:b c:d"),
        *("syncbn bench --nonsense", "syncbn bench --shape two", "syncbn bench surplus"),
        *("torchrun --standalone examples/nonsense.py", "python", "a sentence about syncbn"),
    ],
)
def test_a_command_that_does_not_exist_is_noticed(line):
    assert unknown_in(line) is not None


LINK = re.compile(r"\]\(([^)#\s]*)(?:#([^)\s]+))?\)")
# Addresses of the project, by which the README finds its pages and pictures from anywhere
OURS = re.compile(
    r"https://(?:github\.com/syncbn/syncbn/(?:blob|tree)/main"
    r"|raw\.githubusercontent\.com/syncbn/syncbn/main|syncbn\.github\.io/syncbn)/(.*)"
)


def linked(page: Path) -> list[tuple[Path, str]]:
    """The files of the project that a page links to, each with the anchor in it, or ""."""
    found = []
    for target, anchor in LINK.findall(BLOCK.sub("", page.read_text())):
        if ours := OURS.fullmatch(target):
            found.append((ROOT / (ours[1] or "docs/index.md"), anchor))
        elif not target.startswith("http"):
            found.append((page.parent / target if target else page, anchor))
    return found


def anchors(page: Path) -> set[str]:
    """As GitHub and the site make them of headings."""
    titles = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_files_and_headings(page):
    for target, anchor in linked(page):
        assert target.exists(), target
        assert not anchor or anchor in anchors(target), f"{target}#{anchor}"


def test_the_readme_stands_alone():
    """On a package's index there is no other file: every link and picture is absolute."""
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 150
    targets = {target for target, _ in LINK.findall(text)}
    assert all(target.startswith("https://") for target in targets)
    assert len(linked(ROOT / "README.md")) > 20
    for outside in sorted(targets):
        assert OURS.fullmatch(outside), f"{outside}: say in a page, not in the README"


MODULES = [
    "syncbn",  # of which all public objects say that they are
    *(
        module.name
        for module in pkgutil.walk_packages(syncbn.__path__, "syncbn.")
        if not module.name.startswith(
            (
                *("syncbn.cli", "syncbn.demo", "syncbn.lib", "syncbn.kernels.triton."),
                "syncbn.integrations.",  # shown in tests/frameworks, beside their packages
            )
        )
    ),
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    globs = {"torch": torch, "syncbn": syncbn}
    with forked_launches():
        result = doctest.testmod(importlib.import_module(name), extraglobs=globs)
    assert result.failed == 0


EXAMPLE = ROOT / "examples/train.py"
SAYS = "running_var equal on all 2 ranks: True"


def test_the_example_script_runs_on_two_ranks():
    first, _ = execute(EXAMPLE, ranks=2)
    assert first.code == 0, first.stderr
    assert SAYS in first.stdout


@pytest.mark.slow
def test_the_example_script_runs_under_torchrun():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    result = subprocess.run(
        [*torchrun, "--nproc-per-node=2", str(EXAMPLE)],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert SAYS in result.stdout
