"""The corpus of documentation strings, on a small tree of packages."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from pathlib import Path

import pytest

from tgt_fast.demos.artifacts import Artifacts
from tgt_fast.demos.corpus import corpus, load_corpus
from tgt_fast.demos.corpus.clean import LONGEST_REST, clean, normalised
from tgt_fast.demos.corpus.corpus import gather, installed, split
from tgt_fast.demos.corpus.entry import Entry
from tgt_fast.demos.corpus.parse import Root, docstrings

FILES = {
    "__init__.py": '"""A package for the purposes of this test."""\nraise RuntimeError("this file was run")\n',
    "sort/fast.py": '''
class Sorter:
    """Sorts the elements of a sequence.

    The order of equal elements is kept.
    """

    def sort(self):
        """Sort now, without waiting for more elements."""

    async def later(self):
        "Sort later, when all the elements are there."

if True:
    def fallback():
        """Used where the fast way is not available."""
add_docstr(core.merge, r"""
merge(a, b) -> Sequence

Merges two sorted sequences into a third {one}.
""".format(one="x"))
''',
    "sort/copy.py": 'def again():\n    """SORT now: without waiting for more elements!"""\n',
    "sort/broken.py": "def (:\n",
    "sort/tests/test_fast.py": '"""A text that belongs to the tests alone."""\n',
    "sort/test_more.py": '"""A text that belongs to the tests alone, too."""\n',
    **{f"graph/g{n}.py": f'def f{n}():\n    """Finds the path number {n} in a graph."""\n' for n in range(20)},
}


@pytest.fixture
def root(tmp_path: Path) -> Root:
    for name, text in FILES.items():
        file = tmp_path / "pack" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    return Root("pack", tmp_path / "pack", "pack")


def _all(root: Root) -> list[Entry]:
    return gather((root, file) for file in root.files())


def test_entries_and_their_names(root: Root) -> None:
    found = {(e.module, e.name): e for e in _all(root)}
    assert found["pack", ""].summary == "A package for the purposes of this test."
    sorter = found["pack.sort.fast", "Sorter"]
    assert (sorter.package, sorter.label) == ("pack", "pack.sort")
    assert (sorter.summary, sorter.rest) == (
        "Sorts the elements of a sequence.",
        "The order of equal elements is kept.",
    )
    assert sorter.text == f"{sorter.summary} {sorter.rest}"
    assert ("pack.sort.fast", "Sorter.later") in found
    assert ("pack.sort.fast", "fallback") in found
    assert found["pack.sort.fast", "core.merge"].summary == "Merges two sorted sequences into a third ."


def test_what_is_left_out(root: Root) -> None:
    entries = _all(root)
    assert not [e for e in entries if "tests alone" in e.text]
    # A text with the same words stands once, where it is met first: copy.py comes before fast.py.
    assert [e.module for e in entries if normalised(e.text).startswith("sort now")] == ["pack.sort.copy"]
    assert len({normalised(e.text) for e in entries}) == len(entries)


def test_the_order_is_that_of_the_names(root: Root) -> None:
    entries = _all(root)
    assert entries == _all(root)
    modules = [e.module.split(".") for e in entries]
    assert modules == sorted(modules)


def test_no_module_is_in_two_splits(root: Root) -> None:
    entries = _all(root)
    corpus = split(entries)
    modules = [{e.module for e in part} for part in (corpus.train, corpus.validation, corpus.test)]
    assert not modules[0] & modules[1]
    assert not modules[0] & modules[2]
    assert not modules[1] & modules[2]
    assert len(corpus) == len(entries)
    of_graph = [len([e for e in part if e.label == "pack.graph"]) for part in (corpus.train, corpus.test)]
    assert 3 <= of_graph[1] <= 4  # a fifth of twenty, within what the rule allows
    assert of_graph[0] >= 13
    assert corpus == split(entries)


def test_a_cap_keeps_splits_and_order(root: Root) -> None:
    corpus = split(_all(root))
    less = corpus.capped(12)
    assert 10 <= len(less) <= 14
    assert less == corpus.capped(12)
    assert [e for e in corpus.train if e in less.train] == list(less.train)
    assert set(less.test) <= set(corpus.test)
    assert less.fingerprint != corpus.fingerprint


def test_it_is_kept_until_a_file_changes(root: Root, tmp_path: Path) -> None:
    kept = Artifacts(tmp_path / "cache")
    first = load_corpus([root], artifacts=kept)
    (file,) = (tmp_path / "cache").iterdir()
    before = file.stat().st_mtime_ns
    assert load_corpus([root], artifacts=kept) == first == load_corpus([root])
    assert file.stat().st_mtime_ns == before
    (root.folder / "new.py").write_text('"""A module that was not there before."""\n')
    assert len(load_corpus([root], artifacts=kept)) == len(first) + 1
    file.write_text("[")  # a damaged file is made again
    (root.folder / "new.py").unlink()
    assert load_corpus([root], artifacts=kept) == first


@pytest.mark.parametrize(
    ("docstring", "summary", "rest"),
    [
        ("One line.", "One line.", ""),
        ("f(x) -> y\n\nTwice :class:`~a.b.Tensor` of ``x``.", "Twice Tensor of x.", ""),
        ("Title\n=====\n\nBody with `link <http://x>`_ and **stress**.", "Title:", "Body with link and stress."),
        ("Do it.\n\nParameters\n----------\nx : int\n    How often.", "Do it.", "Parameters: x : int How often."),
        ("Do it.\n\nExamples\n--------\nplot it\n\nNotes\n-----\nSlow.", "Do it.", "Notes: Slow."),
        ("Do it.\n\nExample::\n\n    call(it)\n\nArgs:\n    x: a number.", "Do it.", "Args: x: a number."),
        ("Do it.\n\n.. math::\n    a = b\n\nWhere b is known.", "Do it.", "Where b is known."),
        ("Do it::\n\n    $ it\n\nDone.", "Do it:", "Done."),
        ("\n\n", "", ""),
        (f"{'word ' * 45}end. More of it.", f"{'word ' * 45}end.", "More of it."),
    ],
)
def test_cleaning(docstring: str, summary: str, rest: str) -> None:
    assert clean(docstring) == (summary, rest)


def test_a_long_rest_ends_at_a_word() -> None:
    rest = clean("It is long.\n\n" + "word " * 1000)[1]
    assert LONGEST_REST - 5 <= len(rest) <= LONGEST_REST
    assert rest.endswith("word")


def test_docstrings_of_what_does_not_parse() -> None:
    assert list(docstrings("{{ template }}\ndef f(:")) == []


def test_the_standard_library_is_found() -> None:
    (root,) = installed(["stdlib", "a_package_that_does_not_exist"])
    names = {file.name for file in root.files()}
    assert {"abc.py", "argparse.py"} <= names
    assert root.module(root.folder / "json" / "__init__.py") == "json"
    assert root.label("json.decoder") == "json"


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_is_left_as_it_was(root: Root, enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []

    def failing(source: str) -> Iterator[tuple[str, str]]:
        seen.append(gc.isenabled())
        raise MemoryError

    before = gc.isenabled()
    try:
        (gc.enable if enabled else gc.disable)()
        load_corpus([root])
        assert gc.isenabled() == enabled
        monkeypatch.setattr(corpus, "docstrings", failing)
        with pytest.raises(MemoryError):
            load_corpus([root])
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
    assert seen == [False]
