"""Parts of a page that is one file: no script, no font, no request to anywhere; it fits a phone.

All text is escaped. What is wider than the screen scrolls by itself, and the page does not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from ffnskip_cli.report.tables import Column, Row

FIELD, VALUE = Column("field", ""), Column("value", "")
# Whatever a text may have smuggled past the escaping would be refused by the browser.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:"
# Pictures have only greys, so inverting them fits a dark page; 92 % turns their white into the page's #141414.
_CSS = """\
:root { color-scheme: light dark; --paper: #fff; --ink: #000; --line: #bbb; --shade: #f4f4f4; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; }
h2 { font-size: 1.15rem; margin: 2rem 0 .5rem; }
figure { margin: 1.5rem 0; }
figure svg { width: 100%; height: auto; }
.wide { overflow-x: auto; margin-bottom: 1.5rem; }
table { border-collapse: collapse; overflow-wrap: normal; }
caption { text-align: left; padding-bottom: .4rem; }
th, td { padding: .2rem 1.2rem .2rem 0; border-bottom: 1px solid var(--line); text-align: left; }
td { white-space: nowrap; }
td, thead th + th { text-align: right; }
td { font-variant-numeric: tabular-nums; }
td.text, thead th.text { text-align: left; }
.note { margin-top: -1rem; font-size: .9rem; }
details { border: 1px solid var(--line); border-radius: .3rem; padding: .4rem .8rem; margin: .5rem 0; }
summary { cursor: pointer; }
.sides { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(18rem, 100%), 1fr)); gap: .8rem; }
.sides > div { min-width: 0; }
.sides h3 { font-size: .9rem; margin: .6rem 0 .2rem; }
pre { margin: 0; padding: .5rem; background: var(--shade); white-space: pre-wrap; overflow-wrap: anywhere;
  font: .85rem/1.4 ui-monospace, monospace; }
@media (max-width: 40rem) {
  table { font-size: .8rem; }
  th, td { padding-right: .6rem; white-space: normal; overflow-wrap: normal; }
}
@media (prefers-color-scheme: dark) {
  :root { --paper: #141414; --ink: #ebebeb; --line: #555; --shade: #222; }
  figure svg { filter: invert(92%); }
}"""


@dataclass(frozen=True)
class Section:
    """One table of a page, and what there is to say below it."""

    title: str
    rows: Sequence[Row]
    columns: tuple[Column, ...] = (FIELD, VALUE)
    note: str = ""


def compact(section: Section) -> Section:
    """The same table for narrow screens: names in one column, and each error, a column named ±, beside its figure."""
    names = [column for column in section.columns if not column.spec]
    errors: dict[str, Column] = {}
    figures: list[Column] = []
    for column in section.columns:
        if column.header == "±":
            errors[figures[-1].key] = column
        elif column.spec:
            figures.append(column)

    def cell(figure: Column, row: Row) -> str:
        error = errors.get(figure.key)
        return figure.text(row) if error is None else f"{figure.text(row)} ±\N{NO-BREAK SPACE}{error.text(row)}"

    rows = [
        {"name": ", ".join(filter(None, (name.text(row) for name in names)))}
        | {figure.key: cell(figure, row) for figure in figures}
        for row in section.rows
    ]
    columns = (Column("name", ""), *(Column(figure.key, figure.header, ">") for figure in figures))
    return Section(section.title, rows, columns, section.note)


def document(title: str, parts: Iterable[str]) -> str:
    """The page, of parts that the other functions make."""
    return f"""\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{_POLICY}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>
{_CSS}
</style>
</head>
<body>
<h1>{escape(title)}</h1>
{"".join(parts)}</body>
</html>
"""


def heading(text: str) -> str:
    """A heading below the page's own."""
    return f"<h2>{escape(text)}</h2>\n"


def items(sentences: Iterable[str]) -> str:
    """A list of sentences."""
    return "<ul>\n" + "\n".join(f"<li>{escape(sentence)}</li>" for sentence in sentences) + "\n</ul>\n"


def picture(svg: str, label: str, captions: Sequence[str], *, width: int | None = None) -> str:
    """A picture, as wide as the page or at most `width` rem, with lines below it."""
    style = "" if width is None else f' style="max-width: {width}rem"'
    return f"""\
<figure role="img" aria-label="{escape(label)}"{style}>
{svg[svg.index("<svg") :].strip()}
<figcaption>{"<br>".join(map(escape, captions))}</figcaption>
</figure>
"""


def table(section: Section) -> str:
    """A table under its title."""
    head = "".join(f'<th scope="col"{_kind(column)}>{escape(column.header)}</th>' for column in section.columns)
    note = f'<p class="note">{escape(section.note)}</p>\n' if section.note else ""
    return f"""\
<div class="wide">
<table>
<caption>{escape(section.title[:1].upper() + section.title[1:])}</caption>
<thead><tr>{head}</tr></thead>
<tbody>
{_rows(section)}
</tbody>
</table>
</div>
{note}"""


def side_by_side(summary: str, above: str, texts: Mapping[str, str], *, opened: bool = False) -> str:
    """Texts by their names, next to each other or on a narrow screen below each other; shown when asked for.

    Args:
        summary: what is always seen.
        above: a text over the whole width.
        texts: by their headings.
        opened: shown from the start.
    """
    sides = "".join(f"<div><h3>{escape(name)}</h3><pre>{escape(text)}</pre></div>" for name, text in texts.items())
    return (
        f"<details{' open' if opened else ''}><summary>{escape(summary)}</summary>\n"
        f'<pre>{escape(above)}</pre>\n<div class="sides">{sides}</div></details>\n'
    )


def _kind(column: Column) -> str:
    return "" if column.spec else ' class="text"'


def _rows(section: Section) -> str:
    name, *values = section.columns
    return "\n".join(
        f'<tr><th scope="row">{escape(name.text(row))}</th>'
        + "".join(f"<td{_kind(column)}>{escape(column.text(row))}</td>" for column in values)
        + "</tr>"
        for row in section.rows
    )
