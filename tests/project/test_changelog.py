"""What towncrier makes of the fragments in changelog.d: a section of CHANGELOG.md."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

import pytest

from support.paths import ROOT

pytest.importorskip("towncrier", reason="needs the extra [dev]")
TYPES = ("added", "changed", "fixed", "removed")
NO_FRAGMENTS = {"README.md", "template.md.jinja"}
BULLET = re.compile(r"^- ", re.MULTILINE)


def fragments() -> list:
    others = {"template.md.jinja", "README.md", ".gitkeep"}
    return sorted(path for path in (ROOT / "changelog.d").iterdir() if path.name not in others)


def towncrier(place, *arguments: str) -> str:
    command = [sys.executable, "-m", "towncrier", "build", "--date", "2030-01-02", *arguments]
    result = subprocess.run(
        command, cwd=place, capture_output=True, text=True, timeout=60, check=False
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.fixture
def copy(tmp_path):
    for name in ("CHANGELOG.md", "pyproject.toml"):
        shutil.copy(ROOT / name, tmp_path)
    shutil.copytree(ROOT / "changelog.d", tmp_path / "changelog.d")
    return tmp_path


@pytest.mark.parametrize("path", fragments(), ids=lambda path: path.name)
def test_a_fragment_is_named_as_towncrier_wants_it(path):
    assert re.fullmatch(rf"\+[\w-]+\.({'|'.join(TYPES)})\.md", path.name)
    text = path.read_text()
    assert text.strip()
    assert not text.startswith(" ")
    if not path.name.startswith("+0."):
        assert not BULLET.search(text), f"{path.name}: the template makes the bullet"


def test_a_release_puts_fragments_under_one_heading_each(copy):
    (copy / "changelog.d/+zz-one.added.md").write_text("One of\ntwo lines.\n")
    (copy / "changelog.d/+zz-two.removed.md").write_text("Two.\n")
    texts = [path.read_text() for path in (copy / "changelog.d").glob("+*.md")]
    towncrier(copy, "--version", "9.9.9", "--yes")
    head, section = (copy / "CHANGELOG.md").read_text().split("## [9.9.9] - 2030-01-02\n")
    assert head.endswith("<!-- towncrier: releases start here -->\n\n")
    assert re.findall(r"^### (.*)", section, re.MULTILINE) == [
        "Added",
        "Changed",
        "Fixed",
        "Removed",
    ]
    assert "\n- One of\n  two lines.\n" in section
    assert section.endswith("\n### Removed\n\n- Two.\n")
    assert "\n\n\n" not in section
    bullets = sum(len(BULLET.findall(text)) or 1 for text in texts)
    assert len(BULLET.findall(section)) == bullets
    assert not list((copy / "changelog.d").glob("+*.md"))


def test_the_next_release_comes_above_the_last_one(copy):
    towncrier(copy, "--version", "9.9.9", "--yes")
    (copy / "changelog.d/+more.fixed.md").write_text("More.\n")
    towncrier(copy, "--version", "9.9.10", "--yes")
    text = (copy / "CHANGELOG.md").read_text()
    assert "\n## [9.9.10] - 2030-01-02\n\n### Fixed\n\n- More.\n\n## [9.9.9] - 2030-01-02\n" in text
    assert text.index("## [Unreleased]") < text.index("## [9.9.10]")


def test_the_draft_writes_nothing(copy):
    before = (copy / "CHANGELOG.md").read_text()
    draft = towncrier(copy, "--draft", "--version", "Unreleased")
    assert "## [Unreleased]" in draft
    assert (copy / "CHANGELOG.md").read_text() == before
