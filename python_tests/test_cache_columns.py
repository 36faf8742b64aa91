"""TeacherCache.fill: where ids and x are in a batch, and batches that could be read in more than one way."""

from __future__ import annotations

from collections import UserDict, namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_kit import RowWise, data, same
from torch import Tensor

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError

IDS, X, Y = torch.tensor([5, 3, 8, 1]), data(4), torch.tensor([0, 2, 1, 1])
Named = namedtuple("Named", ["y", "x", "ids"])


def labeled(x: Any) -> Tensor:
    return RowWise()(x["a"] + x["b"] if isinstance(x, dict) else x)  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("batch", "columns"),
    [
        ((IDS, X), None),
        ([IDS, X], None),
        ((IDS, X, Y), None),
        ((IDS.tolist(), X, "of no interest"), None),
        ((IDS.to(torch.int32), X), None),
        ((X, Y, IDS), (2, 0, 1)),
        ((X, IDS), (-1, 0, None)),
        ({"ids": IDS, "x": X, "labels": Y}, ("ids", "x", "labels")),
        ({"ids": IDS, "x": X, "labels": Y}, ["ids", "x", None]),
        ({"a": X - 1, "b": torch.ones_like(X), "ids": IDS, "labels": Y}, ("ids", ("a", "b"), None)),
        (UserDict({"a": X - 1, "b": torch.ones_like(X), "ids": IDS}), ("ids", ("a", "b"), None)),
        (Named(Y, X, IDS), ("ids", "x", "y")),
        ((IDS, {"a": X - 1, "b": torch.ones_like(X)}), None),
        ((IDS, X, Y, Y, Y), (0, 1, None)),
    ],
)
def test_ids_and_x_are_found(tmp_path: Path, batch: Any, columns: Any) -> None:
    with tgt.TeacherCache(tmp_path, labeled, k=3, version="1") as cache:
        assert cache.fill([batch], columns=columns, progress=False) == 4
        expected = tgt.topk_teacher(labeled(X), 3, 2.0)
        stored = cache.read(IDS)
        assert isinstance(stored, tgt.TeacherTopK)
        assert torch.equal(stored.ids, expected.ids)
        assert torch.allclose(stored.log_probs, expected.log_probs, atol=1e-5)


def test_x_is_the_same_wherever_it_stands(tmp_path: Path) -> None:
    with (
        tgt.TeacherCache(tmp_path / "one", RowWise(), k=3) as one,
        tgt.TeacherCache(tmp_path / "two", RowWise(), k=3) as two,
    ):
        one.fill([(IDS, X)], progress=False)
        two.fill([{"x": X, "y": Y, "n": IDS}], columns=("n", "x", "y"), progress=False)
        assert same(one.read(IDS), two.read(IDS))


REFUSED: dict[str, tuple[Any, Any, str]] = {
    "x alone": (X, None, r"needs ids beside x.*columns="),
    "(x, y)": ((X, Y), None, r"ids are a vector of integers as long as the batch.*columns=\(1, 0, None\)"),
    "(x, y, ids)": ((X, Y, IDS), None, r"ids are a vector of integers.*columns=\(2, 0, None\)"),
    "(ids, y)": ((IDS, Y), None, r"x is read from where there is a vector of integers"),
    "ids that are shorter": ((IDS[:2], X), None, r"ids are a vector of integers as long as the batch"),
    "a dict": ({"ids": IDS, "x": X}, None, r"needs ids beside x.*columns=\('ids', 'x', None\)"),
    "four": ((IDS, X, Y, Y), None, r"a batch is \(ids, x\) or \(ids, x, y\); .* tuple of 4"),
    "no such key": ({"ids": IDS, "x": X}, ("id", "x", None), r"names 'id', but .* \['ids', 'x'\]"),
    "no column of ids": ((IDS, X), (None, 1, None), "names no ids"),
    "two columns": ((IDS, X), (0, 1), "three of them"),
}


@pytest.mark.parametrize(("batch", "columns", "words"), REFUSED.values(), ids=REFUSED.keys())
def test_what_is_ambiguous_is_refused(tmp_path: Path, batch: Any, columns: Any, words: str) -> None:
    with tgt.TeacherCache(tmp_path, labeled, k=3, version="1") as cache:
        with pytest.raises(ArgumentError, match=words):
            cache.fill([batch], columns=columns, progress=False)
        assert len(cache) == 0


def test_a_loader_of_dicts(tmp_path: Path) -> None:
    samples = [{"x": X[i], "labels": Y[i], "sample_id": IDS[i]} for i in range(4)]
    loader = torch.utils.data.DataLoader(samples, batch_size=3)
    with tgt.TeacherCache(tmp_path, RowWise(), k=None) as cache:
        assert cache.fill(loader, columns=("sample_id", "x", None), progress=False) == 4
        assert torch.equal(torch.as_tensor(cache.read(IDS)), RowWise()(X))
