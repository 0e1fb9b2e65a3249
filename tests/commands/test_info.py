"""What `syncbn info` says of systems that are not this one."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from syncbn import info
from syncbn.kernels import describe

COMPILED = describe()["cpu"].startswith("native")
ASKED = "of 32 MiB and more ask for them" if COMPILED else "do not ask for them"


@pytest.mark.parametrize(
    ("setting", "words", "ours"),
    [
        ("[always] madvise never", "for all large memory (always)", "get them, as all large"),
        ("always [madvise] never", "for memory that asks for them (madvise)", ASKED),
        ("always madvise [never]", "none: {} says never", "get none"),
        (None, "none: this kernel has no {}", "get none"),
    ],
)
def test_who_gets_huge_pages(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    setting: str | None,
    words: str,
    ours: str,
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(info, "SETTING", tmp_path / "enabled")
    monkeypatch.setattr(info, "STATUS", tmp_path / "status")
    monkeypatch.delenv(info.VARIABLE, raising=False)
    if setting:
        info.SETTING.write_text(setting + "\n")
    said = info.huge_pages()
    assert said["huge pages"] == words.format(info.SETTING)
    assert said["results of syncbn"].startswith(ours)
    asks = "asks for all its CPU tensors" in said[info.VARIABLE]
    assert said[info.VARIABLE].startswith("not set; ")
    assert asks == ("[madvise]" in (setting or ""))
    assert asks or "those of some MiB may take longer" in said[info.VARIABLE]
    monkeypatch.setenv(info.VARIABLE, "1")
    assert info.huge_pages()[info.VARIABLE].startswith("set to '1'; ")
    info.STATUS.write_text("Name:\tpython\nTHP_enabled:\t0\n")
    if setting:
        off = "none: they are switched off for this process"
        assert info.huge_pages()["huge pages"] == off
    monkeypatch.setattr(sys, "platform", "darwin")
    said = info.huge_pages()
    assert said["huge pages"].startswith("none: the system is darwin")
    assert said[info.VARIABLE] == "set to '1'; which changes nothing here"


def test_a_setting_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Results ask all the same."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(info, "SETTING", tmp_path)  # a folder
    monkeypatch.setattr(info, "STATUS", tmp_path / "status")
    said = info.huge_pages()
    assert said["huge pages"] == f"unknown: cannot read {tmp_path} (Is a directory)"
    assert said["results of syncbn"] == ASKED
    info.STATUS.write_bytes(b"Name:\t\xe2\x82\nTHP_enabled:\t0\n")  # cut within a character
    monkeypatch.setattr(info, "SETTING", tmp_path / "enabled")
    info.SETTING.write_text("always [madvise] never\n")
    assert info.huge_pages()["huge pages"] == "none: they are switched off for this process"


@pytest.mark.parametrize("own", ["[inherit]", "[never]"])
def test_pages_of_this_size_may_have_a_setting_of_their_own(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, own: str
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(info, "SETTING", tmp_path / "enabled")
    info.SETTING.write_text("always [madvise] never\n")
    place = tmp_path / "hugepages-2048kB" / "enabled"
    place.parent.mkdir()
    place.write_text(f"always {own} madvise\n")
    words = "for memory that asks for them (madvise)" if own == "[inherit]" else f"none: {place}"
    assert info.huge_pages()["huge pages"].startswith(words)
