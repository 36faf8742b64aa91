"""An HTML page in one file: text, tables, and images embedded beside their copies as PNG files."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from tgt_fast.errors import ArgumentError
from tgt_fast.report.output import write_bytes

_STYLE = """
:root { --ink: #1c2733; --soft: #5b6b7b; --line: #dde3ea; --tint: #f4f7fa; --accent: #1d4e89; --paper: #fff;
  --mark: #b5390a; color-scheme: light dark; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e3eaf1; --soft: #9dafc0; --line: #2c3946; --tint: #1a242e; --accent: #8ab8e8; --paper: #11181f;
    --mark: #ff9d72; }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); overflow-wrap: break-word;
  font: 16px/1.6 system-ui, -apple-system, "Segoe UI", "Helvetica Neue", Arial, sans-serif; }
main { max-width: 68rem; margin: 0 auto; padding: 2.5rem 1.5rem 4rem; }
h1 { font-size: 2rem; line-height: 1.2; margin: 0 0 .4rem; letter-spacing: -.01em; }
h2 { font-size: 1.3rem; margin: 3rem 0 .8rem; padding-top: 1.2rem; border-top: 1px solid var(--line); }
p { max-width: 48rem; margin: .6rem 0; }
p.lead { color: var(--soft); font-size: 1.08rem; }
.facts { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.6rem 0; padding: 0; list-style: none; }
.facts li { flex: 1 1 9rem; background: var(--tint); border-radius: 10px; padding: .8rem 1rem; }
.facts b { display: block; font-size: 1.45rem; line-height: 1.3; color: var(--accent);
  font-variant-numeric: tabular-nums; }
.facts span { color: var(--soft); font-size: .85rem; }
ul:not(.facts) { max-width: 48rem; padding-left: 1.2rem; }
ul:not(.facts) li { margin: .3rem 0; }
pre { background: var(--tint); border-radius: 8px; padding: .7rem 1rem; max-width: 48rem; overflow-x: auto; }
figure { margin: 1.4rem 0 2rem; }
figure img { max-width: 100%; height: auto; display: block; background: #fff; border-radius: 10px; }
@media (prefers-color-scheme: dark) { figure img { padding: .6rem; } }
figcaption { color: var(--soft); font-size: .92rem; max-width: 48rem; margin-top: .5rem; }
.scroll { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; width: 100%; font-size: .93rem; font-variant-numeric: tabular-nums; }
caption { caption-side: bottom; text-align: left; max-width: min(48rem, calc(100vw - 3rem));
  color: var(--soft); font-size: .92rem; padding-top: .5rem; }
th, td { padding: .42rem .7rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap; }
th { font-weight: 600; color: var(--soft); border-bottom: 2px solid var(--line); white-space: normal;
  vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
table.prose td, table.prose th { text-align: left; vertical-align: top; }
table.prose td:last-child { white-space: normal; }
th[aria-sort] { cursor: pointer; }
th[aria-sort]:hover, th[aria-sort]:focus-visible { color: var(--accent); }
th[aria-sort="ascending"]::after { content: " \\2191"; }
th[aria-sort="descending"]::after { content: " \\2193"; }
table.cells { width: auto; }
table.cells td { text-align: left; vertical-align: top; white-space: normal; border: 0; padding: .3rem .4rem; }
table.cells td:first-child { color: var(--soft); min-width: 7.5rem; }
table.cells td.words { min-width: 15rem; border-bottom: 1px solid var(--line); color: var(--ink); }
table.cells th { text-align: left; }
table.cells img { display: block; width: 5.2rem; image-rendering: pixelated; border-radius: 4px; }
table.cells small { display: block; color: var(--soft); font-size: .8rem; white-space: nowrap; }
table.cells small.marked { color: var(--mark); font-weight: 600; }
tr.strong td { background: var(--tint); font-weight: 600; }
footer { margin-top: 3rem; color: var(--soft); font-size: .85rem; }
code { font: .9rem/1.5 ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
"""

# A click on a table's heading sorts its rows by that column: by number where all that is there are numbers.
_SORTING = """
document.querySelectorAll("table.sorts").forEach(function (table) {
  var heads = Array.from(table.querySelectorAll("thead th")), body = table.tBodies[0];
  heads.forEach(function (head, column) {
    function text(row) { return row.cells[column].textContent.trim(); }
    function number(cell) { return parseFloat(cell.replace(/,/g, "")); }
    function sort() {
      var up = head.getAttribute("aria-sort") === "ascending" ? -1 : 1, rows = Array.from(body.rows);
      var said = rows.map(text).filter(function (cell) { return cell !== "-" && cell !== ""; });
      var numbers = said.every(function (cell) { return !isNaN(number(cell)); });
      rows.sort(function (one, other) {
        var a = text(one), b = text(other);
        if (!numbers) return up * a.localeCompare(b);
        a = number(a); b = number(b);
        return isNaN(a) || isNaN(b) ? isNaN(a) - isNaN(b) : up * (a - b);
      });
      rows.forEach(function (row) { body.appendChild(row); });
      heads.forEach(function (other) { other.setAttribute("aria-sort", "none"); });
      head.setAttribute("aria-sort", up > 0 ? "ascending" : "descending");
    }
    head.setAttribute("aria-sort", "none");
    head.tabIndex = 0;
    head.addEventListener("click", sort);
    head.addEventListener("keydown", function (event) { if (event.key === "Enter") sort(); });
  });
});
"""


@dataclass(frozen=True)
class Cell:
    """A table of pictures and texts."""

    text: str = ""
    png: bytes = b""
    note: str = ""  # below it
    marked: bool = False  # whether the note is to be set off


class Page:
    """A report, built from top to bottom. All text is plain text: it is escaped here.

    >>> page = Page("Results", "Of a test")
    >>> page.text("1 < 2")
    >>> "1 &lt; 2" in page.html()
    True
    """

    def __init__(self, title: str, lead: str = "") -> None:
        self.title = title
        self._images: dict[str, bytes] = {}
        self._body = [f"<h1>{escape(title)}</h1>"]
        if lead:
            self._body.append(f'<p class="lead">{escape(lead)}</p>')

    def section(self, title: str) -> None:
        self._body.append(f"<h2>{escape(title)}</h2>")

    def text(self, text: str) -> None:
        self._body.append(f"<p>{escape(text)}</p>")

    def items(self, items: Sequence[str]) -> None:
        """A list."""
        self._body.append("<ul>" + "".join(f"<li>{escape(item)}</li>" for item in items) + "</ul>")

    def command(self, command: str) -> None:
        """A line to type into a shell."""
        self._body.append(f"<pre><code>{escape(command)}</code></pre>")

    def facts(self, facts: Sequence[tuple[str, str]]) -> None:
        """A row of (number, what it is)."""
        items = "".join(f"<li><b>{escape(n)}</b><span>{escape(what)}</span></li>" for n, what in facts)
        self._body.append(f'<ul class="facts">{items}</ul>')

    def figure(self, name: str, png: bytes, alt: str, caption: str = "", width: int | None = None) -> None:
        """An image, embedded, and written beside the page as ``name``.png.

        ``width``: in CSS pixels; by default as wide as the page allows.

        Raises:
            ArgumentError: a name that is no plain, new file name.
        """
        if not name.replace("-", "").replace("_", "").isalnum() or name in self._images:
            raise ArgumentError(f"Page.figure: not a plain, new file name: {name!r}")
        self._images[name] = png
        data = base64.b64encode(png).decode("ascii")
        size = f' width="{width}"' if width else ""
        image = f'<img src="data:image/png;base64,{data}" alt="{escape(alt)}"{size}>'
        text = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
        self._body.append(f'<figure id="{name}">{image}{text}</figure>')

    def table(
        self,
        header: Sequence[str],
        rows: Sequence[Sequence[str]],
        caption: str = "",
        strong: Sequence[int] = (),
        prose: bool = False,
    ) -> None:
        """A table; ``strong``: the rows to set off; ``prose``: of text to read, in lines that break, not of numbers.

        Raises:
            ArgumentError: a row of another length than the header.
        """
        if any(len(row) != len(header) for row in rows):
            raise ArgumentError(f"Page.table: a row does not have the header's {len(header)} cells")
        head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
        lines = []
        for number, row in enumerate(rows):
            mark = ' class="strong"' if number in strong else ""
            lines.append(f"<tr{mark}>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>")
        text = f"<caption>{escape(caption)}</caption>" if caption else ""
        kind = " prose" if prose else ""
        body = f'<table class="sorts{kind}">'
        body += f"{text}<thead><tr>{head}</tr></thead><tbody>{''.join(lines)}</tbody></table>"
        self._body.append(f'<div class="scroll">{body}</div>')

    def cells(self, header: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str = "") -> None:
        """A table of pictures and texts to be looked at; without a header where that is empty."""
        head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
        head = f"<thead><tr>{head}</tr></thead>" if header else ""
        lines = ["<tr>" + "".join(_cell(cell, words=bool(header)) for cell in row) + "</tr>" for row in rows]
        text = f"<caption>{escape(caption)}</caption>" if caption else ""
        body = f'<table class="cells">{text}{head}<tbody>{"".join(lines)}</tbody></table>'
        self._body.append(f'<div class="scroll">{body}</div>')

    def footer(self, text: str) -> None:
        self._body.append(f"<footer>{escape(text)}</footer>")

    def html(self) -> str:
        """The whole page; it needs nothing beside it and nothing from the net."""
        return (
            '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{escape(self.title)}</title><style>{_STYLE}</style></head>"
            "<body><main>\n" + "\n".join(self._body) + f"\n</main><script>{_SORTING}</script></body></html>\n"
        )

    def save(self, file: Path) -> Path:
        """The page alone, in one file, whole or not at all.

        Raises:
            CheckpointError: it cannot be written.
        """
        write_bytes(file, self.html().encode("utf-8"))
        return file

    def write(self, folder: Path) -> Path:
        """The PNG files, then index.html; each whole or not at all. Returns the page's path.

        Raises:
            CheckpointError: a file cannot be written.
        """
        for name, png in self._images.items():
            write_bytes(folder / f"{name}.png", png)
        index = folder / "index.html"
        write_bytes(index, self.html().encode("utf-8"))
        return index


def _cell(cell: Cell, *, words: bool) -> str:
    image = ""
    if cell.png:
        data = base64.b64encode(cell.png).decode("ascii")
        image = f'<img src="data:image/png;base64,{data}" alt="{escape(cell.text)}">'
    shown = image or escape(cell.text)
    mark = ' class="marked"' if cell.marked else ""
    note = f"<small{mark}>{escape(cell.note)}</small>" if cell.note else ""
    kind = ' class="words"' if words else ""
    return f"<td{kind}>{shown}{note}</td>"
