"""What .github, .pre-commit-config.yaml and CITATION.cff name exists, and is as in pyproject.toml.

That workflows are good workflows say actionlint and zizmor: make lint.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from support.paths import ROOT

yaml = pytest.importorskip("yaml", reason="needs the extra [dev]")
WORKFLOWS = sorted((ROOT / ".github/workflows").glob("*.yml"))
ACTIONS = sorted((ROOT / ".github/actions").glob("*/action.yml"))
MAKEFILE = (ROOT / "Makefile").read_text()
PYPROJECT = (ROOT / "pyproject.toml").read_text()
TARGETS = set(re.findall(r"^([\w-]+):(?!=)", MAKEFILE, re.MULTILINE))


def named(path: Path) -> str:
    return path.name


def jobs(path: Path) -> dict:
    return yaml.safe_load(path.read_text())["jobs"]


def steps(path: Path) -> list[dict]:
    return [step for job in jobs(path).values() for step in job.get("steps", [])]


def targets(path: Path) -> set[str]:
    """The make targets that a workflow runs, those of a matrix included."""
    lines = [line for step in steps(path) for line in step.get("run", "").splitlines()]
    commands = [shlex.split(line) for line in lines if line.startswith("make ")]
    words = {word for command in commands for word in command[1:] if not word.startswith("-")}
    matrices = [job.get("strategy", {}).get("matrix", {}) for job in jobs(path).values()]
    return {word for word in words if word != "$TARGET"}.union(
        *(matrix.get("target", []) for matrix in matrices)
    )


def test_each_target_exists_that_a_workflow_makes():
    made = set().union(*map(targets, WORKFLOWS))
    assert {"test", "lint", "test-composite", "test-kernels", "docs", "coverage"} <= made
    assert made <= TARGETS


def test_what_ci_makes_workflows_make_too():
    """.ci/run is the project's gate: no step of it is missing from the workflows."""
    gate = (ROOT / ".ci/run").read_text()
    needed = set(re.findall(r"^make (?:-j2 )?([\w-]+)", gate, re.MULTILINE)) - {"setup"}
    assert needed <= set().union(*map(targets, WORKFLOWS))


@pytest.mark.parametrize("path", WORKFLOWS, ids=named)
def test_jobs_end_and_may_do_little(path):
    text = path.read_text()
    assert "\npermissions:\n  contents: read\n" in text
    assert "\nconcurrency:\n" in text
    for name, job in jobs(path).items():
        assert "uses" in job or "timeout-minutes" in job, f"{name} has no timeout"


@pytest.mark.parametrize(
    "path", [*WORKFLOWS, *ACTIONS], ids=lambda path: path.parent.name + path.name
)
def test_actions_of_others_are_pinned(path):
    """By commit, since a tag can be moved to another one; the comment is its release."""
    for used in re.findall(r"uses: (.*)", path.read_text()):
        if used.startswith("./"):
            assert (ROOT / used).exists()
        else:
            assert re.fullmatch(r"[\w/-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", used), used


def test_every_python_is_tested_and_named():
    """In the matrix, from requires-python on, and each in a classifier of the package."""
    entries = jobs(ROOT / ".github/workflows/tests.yml")["test"]["strategy"]["matrix"]["include"]
    pythons = {entry["python"] for entry in entries}
    classifiers = set(re.findall(r"Python :: (3\.\d+)", PYPROJECT))
    assert f'requires-python = ">={min(pythons, key=lambda v: int(v[2:]))}"' in PYPROJECT
    assert classifiers <= pythons
    oldest = re.search(r'"torch>=([\d.]+)"', PYPROJECT)[1]
    assert f"{oldest}.0" in {entry["torch"] for entry in entries}


def test_hooks_run_the_tools_of_the_environment():
    """What pyproject's extra dev pins: no hook brings a version of its own."""
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    assert {repo["repo"] for repo in config["repos"]} == {"local"}
    tools = {Path(hook["entry"].split()[0]).name for hook in hooks}
    assert {"ruff", "mypy", "clang-format", "codespell"} <= tools
    for hook in hooks:
        assert hook["entry"].startswith(".venv/bin/")
        assert hook["language"] == "system"
    for tool in tools:
        assert re.search(rf'"{tool}(\[\w+\])?==[\d.]+"', PYPROJECT), f"{tool} is not pinned"
        assert f"$(BIN)/{tool}" in MAKEFILE, f"make lint runs no {tool}"


def test_the_citation_says_what_the_package_does():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["authors"] == [{"name": "The syncbn developers"}]
    assert f'license = "{citation["license"]}"' in PYPROJECT


@pytest.mark.parametrize("name", ["bug", "feature"])
def test_an_issue_form_asks(name):
    form = yaml.safe_load((ROOT / f".github/ISSUE_TEMPLATE/{name}.yml").read_text())
    assert form["body"]
    text = str(form)
    assert name != "bug" or ("syncbn info --json" in text and "syncbn check" in text)
    for page in re.findall(r"blob/main/([\w/.]+)", text):
        assert (ROOT / page).exists()
