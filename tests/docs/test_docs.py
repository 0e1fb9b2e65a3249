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

import pytest
import torch

import syncbn
from support.mpijob import missing
from support.paths import ROOT
from support.processes import forked_launches
from support.scripts import execute, run_script
from syncbn.diagnose.check.command import add_options

PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list:
    return [
        pytest.param(text, id=f"{page.stem}-{number}")
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
    if "ptflops" in text:
        pytest.importorskip("ptflops", reason="needs the extra [frameworks]")
    script = tmp_path / "block.py"
    script.write_text(text)
    run_script(script, ranks=2 if "init_process_group(" in text else 1)


MAKEFILE = (ROOT / "Makefile").read_text()
EXTRAS = re.findall(r"^(\S+) = \[", (ROOT / "pyproject.toml").read_text(), re.MULTILINE)


def fits_check(words: list[str]) -> bool:
    """Whether syncbn check takes these arguments."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    add_options(parser, lambda least: int)
    parser.add_argument("--json", action="store_true")
    try:
        parser.parse_args(words)
    except (argparse.ArgumentError, SystemExit):
        return False
    return True


def unknown_in(line: str) -> str | None:
    """What this line of a shell block names that isn't here; the line itself if it runs nothing."""
    command, *words = shlex.split(line.replace("python -m syncbn", "syncbn"), comments=True) or [""]
    scripts = [word for word in words if word.endswith(".py")]
    if command == "make":
        missing = [word for word in words if not re.search(rf"^{word}:", MAKEFILE, re.MULTILINE)]
    elif command == "pip":
        packages = [word for word in words[1:] if not word.startswith("-")]
        extras = [extra for word in packages for extra in re.findall(r"\[(\w+)\]", word)]
        missing = [extra for extra in extras if extra not in EXTRAS]
        missing += [line] if words[:1] != ["install"] or not packages else []
    elif command == "syncbn":
        arguments = {"demo": 0, "check": 1, "info": 0, "trace": 1}
        missing = [word for word in words[:1] if word not in arguments]
        if words[:1] == ["check"] and fits_check(words[1:]):
            words = words[:2]
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
        *("syncbn info nonsense", "syncbn trace folder nonsense"),
        *("syncbn check a:b --nonsense", "syncbn check a:b --ranks two", "syncbn check a:b c:d"),
        *("torchrun --standalone examples/nonsense.py", "python", "a sentence about syncbn"),
    ],
)
def test_a_command_that_does_not_exist_is_noticed(line):
    assert unknown_in(line) is not None


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)", page.read_text()):
            if not target.startswith("http"):
                assert (page.parent / target).exists(), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_within_a_page_lead_to_a_heading(page):
    text = page.read_text()
    titles = re.findall(r"^#+ (.+)$", BLOCK.sub("", text), re.MULTILINE)
    anchors = {re.sub(r"[^\w\- ]", "", title).lower().replace(" ", "-") for title in titles}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors


MODULES = [
    "syncbn",  # of which all public objects say that they are
    *(
        module.name
        for module in pkgutil.walk_packages(syncbn.__path__, "syncbn.")
        if not module.name.startswith(
            (
                *("syncbn.cli", "syncbn.demo", "syncbn.lib", "syncbn.kernels.triton."),
                "syncbn.diagnose.check.progress",
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
