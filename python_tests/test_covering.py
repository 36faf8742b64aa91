"""The tests that run of a grid are what covering.py says: few, a part of it, the same everywhere, all that meets."""

from __future__ import annotations

import itertools
import random
from typing import Any

import covering
import pytest

SIZES = [(3, 2, 2, 4, 4), (7, 4, 2, 8), (5, 5), (2, 2, 2, 2, 2, 2), (4, 3, 6, 1, 3), (9,)]


def product(sizes: tuple[int, ...]) -> tuple[list[tuple[int, ...]], list[str]]:
    rows = list(itertools.product(*map(range, sizes)))
    return rows, ["-".join(map(str, row)) for row in rows]


def met(rows: list[tuple[int, ...]], strength: int) -> set[Any]:
    return {
        (at, tuple(row[column] for column in at))
        for row in rows
        for at in itertools.combinations(range(len(row)), min(strength, len(row)))
    }


@pytest.mark.parametrize("strength", [1, 2, 3])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_all_that_meets_in_the_product_meets_in_the_part(sizes: tuple[int, ...], strength: int) -> None:
    rows, names = product(sizes)
    chosen = covering.covering(rows, names, strength)
    assert chosen == sorted(set(chosen))
    assert met([rows[place] for place in chosen], strength) == met(rows, strength)


def test_also_where_not_everything_can_meet() -> None:
    rows, names = product((5, 4, 3, 3))
    some = [place for place in range(len(rows)) if random.Random(place).random() < 0.6]
    rows, names = [rows[place] for place in some], [names[place] for place in some]
    chosen = covering.covering(rows, names)
    assert met([rows[place] for place in chosen], 2) == met(rows, 2)
    assert len(chosen) < len(rows) / 3


def test_it_is_small() -> None:
    """No array is smaller than the product of the two, or three, largest factors."""
    for sizes, strength, most in (((7, 4, 2, 8), 2, 64), ((5, 3, 2, 2, 4, 4), 3, 140), ((4, 5, 7, 10), 2, 84)):
        assert len(covering.covering(*product(sizes), strength)) <= most


def test_the_choice_does_not_depend_on_the_order() -> None:
    rows, names = product((4, 3, 5, 2))
    order = random.Random(0).sample(range(len(rows)), len(rows))
    shuffled = covering.covering([rows[place] for place in order], [names[place] for place in order])
    assert sorted(order[place] for place in shuffled) == covering.covering(rows, names)


GRID = """
import pytest

TABLE = [([0], 1), ([0], 2), ([], 3)]

@pytest.mark.parametrize("a", range(4))
@pytest.mark.parametrize("b", range(3))
@pytest.mark.parametrize(("c", "d"), TABLE)
@pytest.mark.parametrize("where", ["here", pytest.param("there", marks=pytest.mark.gpu)])
def test_pairs(a, b, c, d, where): ...

@pytest.mark.meet(3)
@pytest.mark.parametrize("a", range(4))
@pytest.mark.parametrize("b", range(3))
@pytest.mark.parametrize("c", range(2))
@pytest.mark.parametrize("d", [{}, {}])
def test_triples(a, b, c, d): ...

@pytest.mark.meet(0)
@pytest.mark.parametrize("a", range(4))
@pytest.mark.parametrize("b", range(3))
@pytest.mark.parametrize("c", range(2))
def test_all(a, b, c): ...

@pytest.mark.parametrize("a", range(5))
@pytest.mark.parametrize("b", range(3))
def test_two(a, b): ...

def test_none(): ...
"""


@pytest.fixture
def grids(tmp_path: Any) -> dict[str, list[pytest.Item]]:
    """The whole products that pytest makes of the file above."""
    (tmp_path / "test_grid.py").write_text(GRID)
    found: list[pytest.Item] = []

    class Found:
        def pytest_collection_finish(self, session: pytest.Session) -> None:
            found.extend(session.items)

    pytest.main(["--collect-only", "-qq", "--rootdir", str(tmp_path), str(tmp_path)], plugins=[Found()])
    by_name: dict[str, list[pytest.Item]] = {}
    for item in found:
        by_name.setdefault(item.name.partition("[")[0], []).append(item)
    return by_name


def test_grids_as_pytest_makes_them(grids: dict[str, list[pytest.Item]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(covering.FULL, raising=False)
    left_out = set(covering.thin([item for items in grids.values() for item in items]))
    kept = {name: [item.callspec.params for item in items if item not in left_out] for name, items in grids.items()  # type: ignore[attr-defined]
            if name != "test_none"}  # fmt: skip
    assert not left_out & set(grids["test_none"])
    assert (len(kept["test_all"]), len(kept["test_two"])) == (24, 15)  # asked for; a product of two is its pairs
    for where in ("here", "there"):  # what needs a GPU covers nothing for the others
        some = [given for given in kept["test_pairs"] if given["where"] == where]
        assert len(some) < 20
        for one, two in itertools.combinations("abd", 2):
            assert len({(given[one], given[two]) for given in some}) == len(met_all(grids, "test_pairs", one, two))
    assert len(kept["test_triples"]) < 48
    for three in itertools.combinations("abcd", 3):
        wanted = met_all(grids, "test_triples", *three)
        assert {tuple(repr(id(given[name])) for name in three) for given in kept["test_triples"]} == wanted


def met_all(grids: dict[str, list[pytest.Item]], test: str, *names: str) -> set[tuple[str, ...]]:
    every = [item.callspec.params for item in grids[test]]  # type: ignore[attr-defined]
    return {tuple(repr(id(given[name])) for name in names) for given in every}


def test_the_whole_product_when_asked_for(grids: dict[str, list[pytest.Item]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(covering.FULL, "1")
    assert covering.thin([item for items in grids.values() for item in items]) == []
