"""Rows that are computed in the workers of a loader are kept, however those are started and however they end."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_kit import RowWise, data, forked, same
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import tgt_fast as tgt
from tgt_fast.errors import UnknownIdError

N = 40


class Labels(Dataset):  # type: ignore[type-arg]
    """A data set that asks the cache itself."""

    def __init__(self, cache: tgt.TeacherCache) -> None:
        self.cache, self.x = cache, data(N)

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> tuple[int, Tensor]:
        logits = self.cache.label(self.x[i : i + 1], [i])
        assert isinstance(logits, Tensor)
        return i, logits[0]


def loader_of(cache: tgt.TeacherCache, method: str, **options: Any) -> DataLoader[Any]:
    return DataLoader(Labels(cache), 4, shuffle=True, num_workers=2, multiprocessing_context=method, **options)


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_workers_of_a_loader_keep_what_they_compute(tmp_path: Path, method: str) -> None:
    expected = RowWise()(data(N)).detach()
    with tgt.TeacherCache(tmp_path, RowWise(), k=None) as cache:
        for ids, got in loader_of(cache, method):
            assert torch.equal(got, expected[ids])
        assert not cache.missing(range(N)).any()
        stored = cache.read(range(N))
        assert isinstance(stored, Tensor)
        assert torch.equal(stored, expected)
        assert cache._teacher.asked == 0  # by this process
    with tgt.TeacherCache.open(tmp_path) as cache:
        assert cache.ids().tolist() == list(range(N))


def test_persistent_workers_write_when_they_go(tmp_path: Path) -> None:
    with tgt.TeacherCache(tmp_path, RowWise(), k=None) as cache:
        loader = loader_of(cache, "fork", persistent_workers=True)
        for _ in range(2):
            assert sum(len(ids) for ids, _ in loader) == N
        del loader
        assert not cache.missing(range(N)).any()


def test_a_loader_that_is_left_early_keeps_what_its_workers_computed(tmp_path: Path) -> None:
    with tgt.TeacherCache(tmp_path, RowWise(), k=None) as cache:
        batches = iter(loader_of(cache, "fork"))
        ids, _ = next(batches)
        del batches
        assert not cache.missing(ids).any()


def test_a_cache_that_a_worker_makes_itself_keeps_its_rows(tmp_path: Path) -> None:
    kept: list[tgt.TeacherCache] = []

    def run() -> None:
        kept.append(tgt.TeacherCache(tmp_path, RowWise(), k=None))
        kept[0].label(data(N), range(N))

    process = forked(run)
    process.join(60)
    assert process.exitcode == 0
    with tgt.TeacherCache.open(tmp_path) as cache:
        assert len(cache) == N


def test_a_pickled_cache_computes_and_writes(tmp_path: Path) -> None:
    x = data(N)
    with tgt.TeacherCache(tmp_path, RowWise(), k=3, shard_bytes=123, shard_seconds=45.0, checksums=False) as cache:
        other = pickle.loads(pickle.dumps(cache))  # before there is a row
        assert other._store.options == cache._store.options  # type: ignore[union-attr]
        assert other.fingerprint == cache.fingerprint
        with other:
            made = other.label(x, range(N))
        assert same(cache.label(x, range(N)), made)
        assert cache._teacher.asked == 0


def test_a_teacher_that_cannot_be_pickled_is_missed_by_name_and_only_where_it_is_needed(tmp_path: Path) -> None:
    x = data(4)
    with tgt.TeacherCache(tmp_path, lambda x: RowWise()(x), k=3, version="1") as cache:
        known = cache.label(x[:2], [0, 1])
        with pickle.loads(pickle.dumps(cache)) as other:
            assert same(other.label(x[:2], [0, 1]), known)
            with pytest.raises(UnknownIdError, match=r"no teacher to ask: it could not be pickled .*lambda"):
                other.label(x, range(4))
