"""Every example a reader can paste runs, and every command the pages name exists."""

from __future__ import annotations

import doctest
import importlib
import pkgutil
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mpijob import missing
from scripts import run_script

import syncbn

ROOT = Path(__file__).parent.parent
PAGES = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]
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
    script = tmp_path / "block.py"
    script.write_text(text)
    run_script(script, ranks=2 if "init_process_group(" in text else 1)


@pytest.mark.parametrize("text", blocks("sh"))
def test_make_targets_and_scripts_exist(text):
    targets = re.findall(r"^make ([\w-]+)", text, re.MULTILINE)
    makefile = (ROOT / "Makefile").read_text()
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)
    scripts = re.findall(r"\b((?:examples|benchmarks)/\w+\.py)", text)
    assert all((ROOT / script).exists() for script in scripts)
    assert targets or scripts or "pip install" in text or "syncbn" in text


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
    module.name
    for module in pkgutil.walk_packages(syncbn.__path__, "syncbn.")
    if not module.name.startswith(("syncbn.cli", "syncbn.demo", "syncbn.lib"))
]


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    globs = {"torch": torch, "syncbn": syncbn}
    result = doctest.testmod(importlib.import_module(name), extraglobs=globs)
    assert result.failed == 0


def test_the_example_script_runs_under_torchrun():
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    result = subprocess.run(
        [*torchrun, "--nproc-per-node=2", str(ROOT / "examples/train.py")],
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert "running_var equal on all 2 ranks: True" in result.stdout
