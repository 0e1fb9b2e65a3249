"""The report as one self-contained page, for a browser of any width."""

from __future__ import annotations

from html import escape

from .compare import DIFFERENT
from .report import HEADINGS, Report, cells
from .rows import Row

_STYLE = """
:root { --good: #1a7f4b; --bad: #b3261e; --unsure: #8a6100; --line: #e2e5ea; --soft: #5b6472; }
* { box-sizing: border-box; }
body { margin: 0; background: #f6f7f9; color: #1c2129;
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Liberation Sans", sans-serif; }
main { max-width: 80rem; margin: 0 auto; padding: 1.5rem 1rem 3rem; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: 0 0 .4rem; overflow-wrap: anywhere; }
h2 { font-size: 1.05rem; margin: 2rem 0 .6rem; }
p { margin: .3rem 0; }
.about, footer { color: var(--soft); font-size: .9rem; overflow-wrap: anywhere; }
.tag { display: inline-block; border-radius: 1rem; padding: .1rem .7rem; margin-bottom: .7rem;
  font-size: .85rem; font-weight: 600; color: #fff; background: var(--bad); }
.tag.equal { background: var(--good); } .tag.rounding { background: var(--unsure); }
.card { background: #fff; border: 1px solid var(--line); border-radius: .6rem;
  padding: .9rem 1.1rem; margin: .6rem 0; overflow-wrap: anywhere; }
.cause { border-left: .3rem solid var(--bad); }
.cause.rounding { border-left-color: var(--unsure); }
.name { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "Liberation Mono", monospace; }
.scroll { overflow-x: auto; background: #fff; border: 1px solid var(--line); border-radius: .6rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; white-space: nowrap; }
td.name { white-space: normal; overflow-wrap: anywhere; min-width: 13rem; }
th, td { padding: .4rem .8rem; border-bottom: 1px solid var(--line); text-align: left; }
tr:last-child td { border-bottom: 0; }
th { color: var(--soft); font-weight: 600; }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; }
tr.first td { background: #fdecea; font-weight: 600; } tr.first.rounding td { background: #fff4dc; }
td.equal { color: var(--good); } td.different, td.calls, td.raises { color: var(--bad); }
td.rounding { color: var(--unsure); } td.not { color: var(--soft); }
"""
_PLACES = (0, len(HEADINGS) - 1, *range(1, len(HEADINGS) - 1))  # the verdict beside the layer
_NUMBERS = range(3, len(HEADINGS) - 1)  # columns that are aligned to the right


def page(report: Report) -> str:
    """The whole page, without anything from elsewhere."""
    state = escape(report.verdict)
    causes = "".join(
        f'<div class="card cause {state}"><p><strong class="name">{escape(each.layer)}</strong>: '
        f"{escape(each.kind)}</p><p>{escape(each.text)}</p></div>"
        for each in report.causes
    )
    notes = "".join(f"<p>{escape(note)}</p>" for note in report.notes)
    heads = "".join(_cell("th", place, HEADINGS[place]) for place in _PLACES)
    title = report.headline.partition(": ")[2]
    title = (
        title if report.verdict == DIFFERENT else title[0].upper() + title[1:]
    )  # else it begins with a name
    body = "".join(_row(report, row) for row in report.rows)
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(report.headline)}</title>
<style>{_STYLE}</style>
</head>
<body>
<main>
<span class="tag {state}">{state}</span>
<h1>{escape(title)}</h1>
<p class="about">{escape(report.configuration)}</p>
{f"<h2>Why</h2>{causes}" if causes else ""}
{f'<h2>Notes</h2><div class="card">{notes}</div>' if notes else ""}
<h2>Layers in forward order</h2>
<div class="scroll">
<table>
<thead><tr>{heads}</tr></thead>
<tbody>
{body}</tbody>
</table>
</div>
<p class="about">Numbers are the largest relative differences between the ranks and one process,
over all steps, calls and ranks.</p>
<footer><p>{escape(versions)}</p></footer>
</main>
</body>
</html>
"""


def _row(report: Report, row: Row) -> str:
    first = f' class="first {escape(report.verdict)}"' if row.first else ""
    texts = cells(row)
    inner = "".join(_cell("td", place, texts[place]) for place in _PLACES)
    return f"<tr{first}>{inner}</tr>\n"


def _cell(tag: str, place: int, text: str) -> str:
    kind = ""
    if place in _NUMBERS:
        kind = "number"
    elif tag == "td" and place == 0:
        kind = "name"
    elif tag == "td" and place == len(HEADINGS) - 1:
        kind = text.partition(" ")[0]  # "calls differ" is calls
    about = f' class="{kind}"' if kind else ""
    return f"<{tag}{about}>{escape(text)}</{tag}>"
