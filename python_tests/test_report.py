"""Reports: what is printed is escaped, files appear whole or not at all, plots come out the same each time."""

from __future__ import annotations

import base64
import itertools
import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from tgt_fast.errors import ArgumentError, CheckpointError
from tgt_fast.report import Page, prepare_file, prepare_folder, write_json
from tgt_fast.report.page import Cell

PNG = b"\x89PNG\r\n\x1a\n"


def page() -> Page:
    made = Page("A <title> & more", 'lead "quoted"')
    made.section("<script>alert(1)</script>")
    made.text("1 < 2")
    made.items(["<li>", "b"])
    made.command("a <file> && b")
    made.facts([("<1>", "a & b")])
    made.table(["<h>", "x"], [["<i>", "1"], ["j", "2"]], "<caption>", strong=[1])
    made.cells(["<s>"], [[Cell("<u>", b"", "<q>")], [Cell('<a "b">', PNG, "ok", marked=True)]], "<em>")
    made.figure("plot-1", PNG + b"x", 'an "alt" <text>', "<b>bold</b>")
    made.footer("a < b")
    return made


def test_everything_printed_is_escaped() -> None:
    html = page().html()
    for raw in (
        "<script>alert",
        "<i>",
        "<h>",
        "<li><li>",
        "<file>",
        "<b>bold",
        "1 < 2",
        "<1>",
        "<title> &",
        'alt="an "alt"',
        "<s>",
        "<u>",
        "<q>",
        "<em>",
        'alt="<a',
        "a < b",
    ):
        assert raw not in html
    assert "&lt;script&gt;" in html
    assert "1 &lt; 2" in html


def test_the_page_needs_nothing_beside_it() -> None:
    html = page().html()
    sources = re.findall(r'(?:src|href)="([^"]*)"', html)
    assert sources
    assert all(source.startswith("data:image/png;base64,") for source in sources)
    assert base64.b64decode(sources[-1].split(",")[1]) == PNG + b"x"
    assert "@import" not in html
    assert "url(" not in html


def test_write_puts_page_and_pictures_into_the_folder(tmp_path: Path) -> None:
    index = page().write(tmp_path)
    assert index == tmp_path / "index.html"
    assert index.read_text(encoding="utf-8") == page().html()
    assert (tmp_path / "plot-1.png").read_bytes() == PNG + b"x"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index.html", "plot-1.png"]


def test_a_write_that_fails_leaves_the_old_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page().write(tmp_path)
    before = (tmp_path / "index.html").read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left on device"):
        Page("another").write(tmp_path)
    assert (tmp_path / "index.html").read_bytes() == before
    assert sorted(p.name for p in tmp_path.iterdir()) == ["index.html", "plot-1.png"]


@pytest.mark.parametrize("name", ["../up", "a/b", "", "plot-1", "a b", "a.png"])
def test_figure_names_are_plain_and_new(name: str) -> None:
    with pytest.raises(ArgumentError, match="file name"):
        page().figure(name, PNG, "")


def test_a_table_with_a_short_row_is_refused() -> None:
    with pytest.raises(ArgumentError, match="2 cells"):
        Page("t").table(["a", "b"], [["1"]])


def test_prepare_folder_makes_it_and_leaves_nothing(tmp_path: Path) -> None:
    folder = prepare_folder(tmp_path / "new" / "deep")
    assert folder.is_dir()
    assert list(folder.iterdir()) == []


def test_prepare_folder_refuses_a_file_in_its_place(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(ArgumentError, match="it is a file"):
        prepare_folder(tmp_path / "taken")
    with pytest.raises(CheckpointError, match="cannot write to"):
        prepare_folder(tmp_path / "taken" / "below")
    assert (tmp_path / "taken").read_text() == "mine"


def test_prepare_folder_refuses_a_read_only_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> int:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(os, "open", refuse)  # a superuser may write to any folder
    with pytest.raises(CheckpointError, match="Permission denied"):
        prepare_folder(tmp_path)


def test_prepare_folder_refuses_a_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1 << 20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(ArgumentError, match=r"1\.0 MB are free"):
        prepare_folder(tmp_path)
    assert prepare_file(tmp_path / "small.json") == tmp_path / "small.json"


def test_prepare_file_refuses_a_folder(tmp_path: Path) -> None:
    with pytest.raises(ArgumentError, match="it is a folder"):
        prepare_file(tmp_path)


def test_json_is_standard_json(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"a": float("nan"), 2: [1.5, (float("inf"), "ü")]})
    text = (tmp_path / "x.json").read_text(encoding="utf-8")
    assert json.loads(text, parse_constant=lambda name: pytest.fail(name)) == {"a": None, "2": [1.5, [None, "ü"]]}


@pytest.mark.parametrize(
    "places", [[0.5], [0.1, 0.9], [0.5, 0.5, 0.5], [1.0, 0.99, 0.98, 0.2], [0.0, 0.0, 1.0], [-3.0, 4.0, 0.2]]
)
def test_names_are_spread_apart_in_their_order(places: list[float]) -> None:
    pytest.importorskip("matplotlib")
    from tgt_fast.report.plots import spread

    moved = spread(places, 0.1)
    ordered = sorted(range(len(places)), key=lambda i: (places[i], moved[i]))
    gaps = [moved[b] - moved[a] for a, b in itertools.pairwise(ordered)]
    assert all(gap >= 0.1 - 1e-12 for gap in gaps)
    assert all(-1e-12 <= place <= 1 + 1e-12 for place in moved)


def test_places_far_enough_apart_stay() -> None:
    from tgt_fast.report.plots import spread

    assert spread([0.3, 0.9, 0.6], 0.1) == [0.3, 0.9, 0.6]


def test_plots_are_png_files_and_the_same_each_time() -> None:
    pytest.importorskip("matplotlib")
    import matplotlib as mpl

    from tgt_fast.report import plots
    from tgt_fast.report.plots import Bar, Series, Tile

    before = dict(mpl.rcParams)

    def draw() -> list[bytes]:
        bars = [Bar("a", [1.0, 3.0], "#112233"), Bar("b", [2.0], "#445566")]
        series = [
            Series("a", [1, 2, 3], [1.0, 2.0, 2.5], "#112233", [0.5, 1.5, 2.0], [1.5, 2.5, 3.0]),
            Series("b", [1, 2, 3], [1.0, 2.0, 2.5], "#445566", dashed=True, marker="o"),
        ]
        tiles = [Tile([[0.0, 1.0], [1.0, 0.0]], "7", marked=True)]
        return [
            plots.bars(bars, "t", "x"),
            plots.lines(series, "t", "x", "y", log_x=True, x_ticks=[1, 3], y_limits=(0, 4)),
            plots.heatmap(["r"], ["c", "d"], [[0.0, 100.0]], "t", "x"),
            plots.image_grid([("r", tiles), ("s", tiles * 3)], "t"),
            plots.image_grid([("r", tiles)], "t"),
            plots.panels([("h", ".2f", bars), ("i", ".0f", [bars[0], Bar("b", [], "#000000")])], "t"),
            plots.panels([("h", ".2f", bars)], "t"),
        ]

    first, second = draw(), draw()
    assert all(png.startswith(PNG) for png in first)
    assert first == second
    assert len(set(first)) == len(first)
    assert dict(mpl.rcParams) == before


def test_plots_without_matplotlib_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    from tgt_fast.report import plots

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ArgumentError, match=r"tgt-fast\[demo\]"):
        plots.bars([plots.Bar("a", [1.0], "#112233")], "t", "x")
