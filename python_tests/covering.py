"""Which tests of a grid run: few of them, and yet every two values meet.

A test whose parameters multiply is a grid: backends times dtypes times divergences. A fault shows for one value, or for
two of them together, hardly ever for three that are right in pairs. So of each grid a covering array runs: every value
of one parameter with every value of each other one, in some test. ``@pytest.mark.meet(3)`` asks for every three, and
``@pytest.mark.meet(0)`` for the whole product. TGT_FAST_FULL_GRID=1 runs all products whole.

The parametrisations are written as ever: pytest multiplies them, and ``thin`` chooses. What is chosen is a part of the
product, the same in every process.
"""

from __future__ import annotations

import heapq
import itertools
import os
import zlib
from collections import defaultdict
from collections.abc import Hashable, Iterator, Sequence

import pytest

FULL = "TGT_FAST_FULL_GRID"
PAIRS = 2


def covering(rows: Sequence[Sequence[Hashable]], names: Sequence[str], strength: int = PAIRS) -> list[int]:
    """Places of few rows in which every ``strength`` values meet that meet in any row; in order.

    Each row has a value for each factor. Greedy: next comes the row that lets the most meet for the first time. Of
    equals the checksums of their names decide, so that no value that stands first is preferred.
    """
    columns = list(itertools.combinations(range(len(rows[0])), min(strength, len(rows[0])))) if rows else []
    open_sets = [{(at, *(row[column] for column in at)) for at in columns} for row in rows]
    met: set[tuple[Hashable, ...]] = set()
    # What a row adds only shrinks: a row that, counted anew, still stands first is the best one.
    heap = [(-len(sets), zlib.crc32(names[place].encode()), place) for place, sets in enumerate(open_sets)]
    heapq.heapify(heap)
    chosen = []
    while heap:
        claimed, tie, place = heapq.heappop(heap)
        gain = len(open_sets[place] - met)
        if gain == 0:
            continue
        if gain < -claimed:
            heapq.heappush(heap, (-gain, tie, place))
            continue
        chosen.append(place)
        met |= open_sets[place]
    return sorted(chosen)


def thin(items: Sequence[pytest.Item]) -> list[pytest.Item]:
    """The items that do not run, of the grids among ``items``."""
    if os.environ.get(FULL) == "1":
        return []
    grids: dict[tuple[str, bool], list[pytest.Item]] = defaultdict(list)
    for item in items:
        if getattr(item, "callspec", None) is not None:
            # What needs a GPU runs alone, if at all: nothing may count on it.
            on_a_gpu = item.get_closest_marker("gpu") is not None
            grids[item.nodeid.partition("[")[0], on_a_gpu].append(item)
    left_out: list[pytest.Item] = []
    for grid in grids.values():
        strength = _strength(grid[0])
        rows = _rows(grid)
        if strength and len(rows[0]) > strength:
            kept = set(covering(rows, [item.name for item in grid], strength))
            left_out += [item for place, item in enumerate(grid) if place not in kept]
    return left_out


def _strength(item: pytest.Item) -> int:
    marker = item.get_closest_marker("meet")
    return PAIRS if marker is None else int(marker.args[0])


def _rows(grid: Sequence[pytest.Item]) -> list[tuple[int, ...]]:
    """Each item's level of each factor. Parameters that always change together, as of a table, are one factor."""
    every = [item.callspec.params for item in grid]  # type: ignore[attr-defined]
    columns = {tuple(_levels([params[name] for params in every])) for name in every[0]}
    return list(zip(*sorted(column for column in columns if any(column)), strict=True)) or [()] * len(grid)


def _levels(values: Sequence[object]) -> Iterator[int]:
    """Values numbered by their first appearance; what is no name or number is itself, wherever a product repeats it."""
    seen: dict[Hashable, int] = {}
    for value in values:
        key = (type(value), value if isinstance(value, (str, int, float)) else id(value))
        yield seen.setdefault(key, len(seen))
