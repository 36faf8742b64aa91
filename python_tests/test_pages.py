"""The documentation's pages: every block of Python runs, every command is one, every page is in the navigation."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest
import torch

from tgt_fast import cli

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md")) if DOCS.is_dir() else []
BLOCK = re.compile(r"(?:<!-- (needs|theirs): ([^\n]*?) -->\n)?```(python|bash)\n(.*?)```", re.DOTALL)

pytestmark = pytest.mark.skipif(not PAGES, reason="the tests run outside a checkout")


def blocks(page: str, language: str) -> list[tuple[str, str, str]]:
    """Of a page, in order: (mark, what it names, code)."""
    found = BLOCK.findall((DOCS / page).read_text())
    return [(mark, names, code) for mark, names, said, code in found if said == language]


def needs(page: str) -> list[str]:
    return list(dict.fromkeys(names for mark, names, _ in blocks(page, "python") if mark == "needs"))


WITH_PYTHON = [page for page in PAGES if blocks(page, "python")]
WITH_NEEDS = [(page, names) for page in WITH_PYTHON for names in needs(page)]
THEIRS = [page for page in WITH_PYTHON if any(mark == "theirs" for mark, _, _ in blocks(page, "python"))]


def run(page: str, among: tuple[str, ...]) -> None:
    """The page's blocks in order and in one namespace, those that need something only where it is among these."""
    torch.manual_seed(0)
    namespace: dict[str, object] = {"__name__": "page"}
    for mark, names, code in blocks(page, "python"):
        if mark == "" or (mark == "needs" and names in among):
            exec(compile(code, str(DOCS / page), "exec"), namespace)


@pytest.mark.parametrize("page", WITH_PYTHON)
def test_the_python_of_a_page_runs_in_order(page: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    run(page, ())


@pytest.mark.parametrize(("page", "names"), WITH_NEEDS)
def test_the_python_that_needs_other_packages(
    page: str, names: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in names.split(", "):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{page}: a block needs {name}")
    monkeypatch.chdir(tmp_path)
    run(page, (names,))


@pytest.mark.parametrize("page", THEIRS)
def test_other_libraries_calls_are_python(page: str) -> None:
    """They are not run: what they compute is written out in test_migration.py."""
    for mark, _, code in blocks(page, "python"):
        if mark == "theirs":
            compile(code, page, "exec")


def test_the_marks_are_understood() -> None:
    for page in PAGES:
        text = (DOCS / page).read_text()
        marked = re.findall(r"<!-- (?:needs|theirs): [^\n]* -->\n", text)
        assert len(marked) == sum(mark != "" for mark, _, _ in blocks(page, "python")), page
        assert text.count("```python") == len(blocks(page, "python")), page


@pytest.mark.parametrize("page", [*(page for page in PAGES if blocks(page, "bash")), "../README.md"])
def test_the_commands_of_a_page_are_commands(page: str) -> None:
    for _, _, code in blocks(page, "bash"):
        for line in code.splitlines():
            words = line.split("#")[0].split("&&")[-1].split()
            if words and words[0].endswith("tgt-fast"):
                cli._parser().parse_args(words[1:])


def test_the_navigation_names_pages() -> None:
    named = re.findall(r": ([\w/-]+\.md)$", (ROOT / "mkdocs.yml").read_text(), re.MULTILINE)
    assert len(named) == len(set(named)) >= 15
    assert set(named) <= set(PAGES)


def test_the_search_works_in_a_folder_and_without_a_net() -> None:
    config = (ROOT / "mkdocs.yml").read_text()
    assert re.search(r"^  - offline\b", config, re.MULTILINE)  # which would take a script from the net but for ours
    assert re.search(r"^  polyfills: \[iframe-worker\.js\]", config, re.MULTILINE)
    assert "window.Worker" in (DOCS / "iframe-worker.js").read_text()


def test_pictures_are_small_and_used() -> None:
    texts = "".join((DOCS / page).read_text() for page in PAGES)
    for picture in (*DOCS.glob("img/*"), *DOCS.glob("*.png")):
        assert picture.stat().st_size < 150_000, picture
        assert picture.name in texts, picture
