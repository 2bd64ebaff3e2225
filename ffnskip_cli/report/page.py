"""A profile's figure and figures as one HTML file that needs nothing else: no script, no font, no network."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from ffnskip_cli.report.summary import Section, figures, fit_tables, search_tables
from ffnskip_cli.report.words import explain

if TYPE_CHECKING:
    from ffnskip.profiles.profile import Profile

# The picture has only greys, so inverting it fits a dark page; 92 % turns its white into the page's #141414.
_CSS = """\
:root { color-scheme: light dark; --paper: #fff; --ink: #000; --line: #bbb; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; }
h1 { font-size: 1.4rem; overflow-wrap: anywhere; }
figure { margin: 1.5rem 0; }
figure svg { width: 100%; height: auto; }
table { border-collapse: collapse; margin-bottom: 1.5rem; }
caption { text-align: left; padding-bottom: .4rem; }
th, td { padding: .2rem 1.2rem .2rem 0; border-bottom: 1px solid var(--line); text-align: left; }
td, thead th + th { text-align: right; }
td { font-variant-numeric: tabular-nums; }
@media (prefers-color-scheme: dark) {
  :root { --paper: #141414; --ink: #ebebeb; --line: #555; }
  figure svg { filter: invert(92%); }
}"""


def page(profile: Profile, svg: str, captions: Sequence[str]) -> str:
    """The page: the profile in words, the picture with its captions, and tables of figures and of what was tried."""
    title = escape(f"Skip profile of {profile.model.id}")
    words = "\n".join(f"<li>{escape(sentence)}</li>" for sentence in explain(profile))
    tables = [figures(profile.measured)] if profile.measured else []
    if profile.search:
        tables += search_tables(profile.search, profile.skip)
    if profile.fit:
        tables += fit_tables(profile.fit, profile.compensation)
    return f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{_CSS}
</style>
</head>
<body>
<h1>{title}</h1>
<ul>
{words}
</ul>
<figure role="img" aria-label="{title}">
{svg[svg.index("<svg") :].strip()}
<figcaption>{"<br>".join(map(escape, captions))}</figcaption>
</figure>
{"".join(map(_table, tables))}</body>
</html>
"""


def _table(table: Section) -> str:
    head = "".join(f'<th scope="col">{escape(column.header)}</th>' for column in table.columns)
    return f"""\
<table>
<caption>{escape(table.title.capitalize())}</caption>
<thead><tr>{head}</tr></thead>
<tbody>
{_rows(table)}
</tbody>
</table>
"""


def _rows(table: Section) -> str:
    name, *values = table.columns
    return "\n".join(
        f'<tr><th scope="row">{escape(name.text(row))}</th>'
        + "".join(f"<td>{escape(column.text(row))}</td>" for column in values)
        + "</tr>"
        for row in table.rows
    )
