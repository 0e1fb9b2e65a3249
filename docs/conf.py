"""The site: make docs. Nothing is fetched, neither by the build nor by who reads the pages."""

import os
import re
import subprocess
import sys
from pathlib import Path

from docutils.nodes import SkipNode
from docutils.utils.math.latex2mathml import tex2mathml

import syncbn

REPOSITORY = "https://github.com/syncbn/syncbn"
ROOT = Path(__file__).parent.parent

project = "syncbn"
author = "The syncbn developers"
version = release = syncbn.__version__
extensions = [
    "myst_parser",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx_copybutton",
]
exclude_patterns = ["_build"]
nitpicky = True
# torch's names, and those of Python, have no pages here.
nitpick_ignore_regex = [
    ("py:.*", r"(torch|collections|os|typing|concurrent|datetime|mpi4py)(\..*)?"),
    ("py:.*", r"(Tensor|Module|Any|optional|Path|PathLike|ProcessGroup|DeviceMesh)"),
    ("py:exc", r".*"),  # errors, of which a docstring says more than a name
    ("py:class", r"(N, .*|C.*|_\w+|.*\b(dtype|device|Module|Tensor)\b.*)"),
    ("py:(mod|class|func|data|obj)", r"syncbn\.(comm|kernels|numerics|diagnose)\..*"),
]

myst_enable_extensions = ["dollarmath", "colon_fence"]
myst_heading_anchors = 4
autodoc_member_order = "bysource"
autodoc_mock_imports = ["lightning"]  # to read the plugin where the framework is not
autodoc_typehints = "none"  # docstrings have shapes and types, in fewer words
napoleon_numpy_docstring = False
napoleon_custom_sections = [
    *("Shape", "Source", ("Inputs", "Shape"), ("Outputs", "Shape")),
    ("Raises", "params_style"),
]

html_theme = "furo"
html_title = f"syncbn {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_baseurl = "https://syncbn.github.io/syncbn/"
html_math_renderer = "mathml"
html_show_copyright = False
html_theme_options = {
    "source_repository": REPOSITORY,
    "source_branch": "main",
    "source_directory": "docs/",
}
copybutton_prompt_text = r">>> |\.\.\. |\$ "
copybutton_prompt_is_regexp = True


def changelog(app, name, source):
    """CHANGELOG.md, and for what is not released yet the entries in changelog.d."""
    if name == "changelog":
        command = [sys.executable, "-m", "towncrier", "build", "--draft", "--version", "Unreleased"]
        draft = subprocess.check_output(command, cwd=ROOT, text=True)
        draft = re.sub(r"^(## \[Unreleased\]).*", r"\1", draft, flags=re.MULTILINE)
        text = (ROOT / "CHANGELOG.md").read_text()
        if "\n- " in draft:
            waiting = re.compile(
                r"^## \[Unreleased\]\n.*?(?=^<!--|^## |\Z)", re.MULTILINE | re.DOTALL
            )
            text = waiting.sub(lambda _: draft, text)
        source[0] = text


def links_to_the_repository(app, name, source):
    """What a page links outside docs/ is on GitHub; a page's links work there as they stand."""
    folder = (ROOT / "docs" / name).parent

    def absolute(link):
        target = os.path.relpath(os.path.normpath(folder / link[1]), ROOT)
        return link[0] if target.startswith("docs/") else f"]({REPOSITORY}/blob/main/{target}"

    source[0] = re.sub(r"\]\((\.\./[^)#\s]*)", absolute, source[0])


def plain_characters(app, what, name, obj, options, lines):
    """Docstrings write (N, *) and |x| as mathematics does, and pages as files: not as markup."""
    for number, line in enumerate(lines):
        parts = re.split(r"(``.*?``|:\w+:`.*?`)", line)
        parts[::2] = [re.sub(r"\*(?=\))|\|", r"\\\g<0>", part) for part in parts[::2]]
        lines[number] = re.sub(r"\bdocs/([\w/]+)\.md", r":doc:`/\1`", "".join(parts))


def inline_mathematics(self, node):
    self.body.append(str(tex2mathml(node.astext(), as_block=False)))
    raise SkipNode


def displayed_mathematics(self, node):
    self.body.append(f'<div class="math">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise SkipNode


def setup(app):
    app.add_html_math_renderer("mathml", (inline_mathematics, None), (displayed_mathematics, None))
    app.connect("source-read", changelog)
    app.connect("source-read", links_to_the_repository)
    app.connect("autodoc-process-docstring", plain_characters, priority=400)  # before napoleon
