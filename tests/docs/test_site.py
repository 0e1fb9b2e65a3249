"""The built site (make docs): every public name, no dead link, nothing from elsewhere.

Links to other sites are not followed: ``python tests/docs/test_site.py`` lists them.
"""

from __future__ import annotations

import pkgutil
import re
import zlib
from functools import cache
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

import syncbn
from support.paths import ROOT

SITE = ROOT / "site"
pytestmark = pytest.mark.skipif(
    not (SITE / "objects.inv").exists(), reason="the site is not built: make docs"
)
LOADS = {"script": "src", "img": "src", "iframe": "src", "source": "src", "video": "src"}
LOADED = {"stylesheet", "preload", "icon", "modulepreload", "preconnect", "dns-prefetch"}


class Page(HTMLParser):
    """What one page links to, loads, and can be linked at."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.anchors: set[str] = set()
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attributes}
        self.anchors |= {given[name] for name in ("id", "name") if name in given}
        if tag == "a" and "href" in given:
            self.links.append(given["href"])
        if tag == "link" and LOADED & set(given.get("rel", "").split()):
            self.loads.append(given["href"])
        if tag in LOADS and LOADS[tag] in given:
            self.loads.append(given[LOADS[tag]])


@cache
def read(path: Path) -> Page:
    return Page(path)


PAGES = [
    pytest.param(path, id=str(path.relative_to(SITE)))
    for path in sorted(SITE.rglob("*.html"))
    if "_static" not in path.parts
]


def local(page: Path, address: str) -> Path:
    target = (page.parent / unquote(urlsplit(address).path)).resolve()
    return target if urlsplit(address).path else page


@pytest.mark.parametrize("page", PAGES)
def test_links_within_the_site_lead_somewhere(page):
    for link in read(page).links:
        parts = urlsplit(link)
        if parts.scheme or parts.netloc:
            assert parts.scheme in ("https", "mailto"), link
            continue
        target = local(page, link)
        assert target.is_file(), link
        if parts.fragment and target.suffix == ".html":
            assert unquote(parts.fragment) in read(target).anchors, link


@pytest.mark.parametrize("page", PAGES)
def test_nothing_is_loaded_from_elsewhere(page):
    for address in read(page).loads:
        parts = urlsplit(address)
        assert not parts.netloc, address
        assert parts.scheme in ("", "data"), address
        assert parts.scheme or local(page, address).is_file(), address


def test_no_style_sheet_loads_from_elsewhere():
    for sheet in SITE.rglob("*.css"):
        found = re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//[^)\"']*", sheet.read_text())
        assert not found, sheet


def inventory() -> set[str]:
    """The names that other projects can link to by intersphinx: all that have an entry."""
    raw = (SITE / "objects.inv").read_bytes().split(b"\n", 4)[4]
    return {line.split(" ")[0] for line in zlib.decompress(raw).decode().splitlines()}


def test_every_public_name_has_an_entry():
    modules = {"comm", "kernels"}
    names = {f"syncbn.{name}" for name in set(syncbn.__all__) - modules - {"__version__"}}
    said = {
        f"syncbn.comm.{name}"
        for name in syncbn.comm.__all__
        if getattr(getattr(syncbn.comm, name), "__module__", "") == "syncbn.comm"
    }
    steps = ("measure", "normalise", "gradient_sums", "input_gradient")
    names |= said | {f"syncbn.kernels.composite.{step}" for step in steps}
    entries = inventory()
    assert sorted(names - entries) == []
    for plugin in pkgutil.iter_modules([str(ROOT / "src/syncbn/integrations")]):
        assert any(name.startswith(f"syncbn.integrations.{plugin.name}.") for name in entries)


@pytest.mark.parametrize("page", PAGES)
def test_no_markup_is_left_over(page):
    text = re.sub(r"<pre.*?</pre>", "", page.read_text(), flags=re.DOTALL)
    assert not re.findall(r".{0,40}(?:``|\]\(|:\w+:`).{0,40}", text)


def test_every_page_has_its_place_and_its_text():
    sources = [*(ROOT / "docs").rglob("*.md")]
    assert sources
    for source in sources:
        built = SITE / source.relative_to(ROOT / "docs").with_suffix(".html")
        assert built.is_file(), f"{source}: make docs"


def test_formulas_are_mathml():
    assert "<math" in (SITE / "how-it-works.html").read_text()


if __name__ == "__main__":
    outside = {link for page in SITE.rglob("*.html") for link in read(page).links}
    print(*sorted(link for link in outside if urlsplit(link).netloc), sep="\n")
