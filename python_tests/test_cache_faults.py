"""TeacherCache: writers that are killed, several writers at once, and shards that were cut or changed."""

from __future__ import annotations

import json
import os
import signal
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_kit import RowWise, data, flip, forked, record_by_record, same, shards

import tgt_fast as tgt
from tgt_fast.cache import shard as shard_file
from tgt_fast.errors import CacheError, ShapeError

K = 3
X = data(64)


def cache_in(folder: Path, **options: Any) -> tgt.TeacherCache:
    return tgt.TeacherCache(folder, lambda x: record_by_record(RowWise(), x, K), k=K, version="rows", **options)


def expected(ids: Any) -> tgt.TeacherTopK:
    return record_by_record(RowWise(), X[torch.as_tensor(ids)], K)


def filled(folder: Path, *batches: range) -> list[Path]:
    """A shard a batch."""
    with cache_in(folder, shard_bytes=1) as cache:
        for ids in batches:
            cache.label(X[ids], ids)
    assert len(shards(folder)) == len(batches)
    return shards(folder)


@contextmanager
def told(words: str) -> Iterator[None]:
    """There is a warning with these words inside."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        yield
    assert any(words in str(warning.message) for warning in found)


DAMAGES: dict[str, Callable[[Path], None]] = {
    "cut in the data": lambda path: os.truncate(path, path.stat().st_size - 1),
    "cut in the header": lambda path: os.truncate(path, 100),
    "cut in the length": lambda path: os.truncate(path, 5),
    "emptied": lambda path: os.truncate(path, 0),
    "grown": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "a bit of the last tensor": lambda path: flip(path, -1),
    "a bit of the ids": lambda path: flip(path, 8 + int.from_bytes(path.read_bytes()[:8], "little")),
    "a bit of the length": lambda path: flip(path, 0),
    "a dtype": lambda path: path.write_bytes(path.read_bytes().replace(b'"U8"', b'"I8"')),
    "the fingerprint": lambda path: path.write_bytes(path.read_bytes().replace(b'print":"', b'print":"0')),
    "zeros at the end": lambda path: path.write_bytes(path.read_bytes()[:-200] + bytes(200)),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_torn_shard_is_found_left_out_and_made_again(tmp_path: Path, damage: Callable[[Path], None]) -> None:
    first, second = filled(tmp_path, range(20), range(20, 40))
    damage(first)
    with told("is torn"), tgt.TeacherCache.open(tmp_path) as cache:
        missing = cache.missing(range(40))
        assert missing.tolist() == [True] * 20 + [False] * 20
        with pytest.raises(KeyError):
            cache.read([19, 20])
        assert set(cache.verify()) == {first.name}
        assert first.exists()  # a reader changes nothing
    with told("is torn"), cache_in(tmp_path) as cache:
        order = torch.randperm(40, generator=torch.Generator().manual_seed(0))
        assert same(cache.label(X[order], order), expected(order))
        assert same(cache.label(X[order], order), expected(order))
    assert not first.exists()
    assert first.with_name(first.name + ".torn").exists()
    assert second.exists()
    with tgt.TeacherCache.open(tmp_path) as cache:
        assert same(cache.read(range(40)), expected(range(40)))
        assert cache.verify() == {}


def test_a_shard_that_goes_bad_gives_way_to_another_with_the_same_row(tmp_path: Path) -> None:
    filled(tmp_path / "a", range(5))
    filled(tmp_path / "b", range(3, 9))
    for path in shards(tmp_path / "b"):
        os.rename(path, tmp_path / "a" / path.name)
    flip(shards(tmp_path / "a")[0], -1)
    with told("checksum"), tgt.TeacherCache.open(tmp_path / "a") as cache:
        assert cache.missing(range(9)).tolist() == [True] * 3 + [False] * 6
        assert same(cache.read(range(3, 9)), expected(range(3, 9)))


def test_without_checksums_size_and_header_are_still_compared(tmp_path: Path) -> None:
    first, second, third = filled(tmp_path, range(5), range(5, 10), range(10, 15))
    flip(first, -1)
    os.truncate(second, second.stat().st_size - 1)
    with told("bytes of data"), tgt.TeacherCache.open(tmp_path, checksums=False) as cache:
        assert cache.missing(range(15)).tolist() == [False] * 5 + [True] * 5 + [False] * 5
        assert same(cache.read(range(10, 15)), expected(range(10, 15)))
        assert set(cache.verify()) == {first.name, second.name}
    assert third.exists()


def stop_at(event: str, folder: Path) -> None:
    """In a child: write a shard, and never come past a point of it."""

    def here(*_: Any) -> None:
        (folder / "reached").touch()
        time.sleep(60)

    if event == "before it is on the disk":
        os.fsync = here
    elif event == "before it has its name":
        os.replace = here
    else:
        shard_file.sync = here
    with cache_in(folder) as cache:
        cache.label(X[20:40], range(20, 40))
        cache.flush()


@pytest.mark.parametrize("event", ["before it is on the disk", "before it has its name", "after it has its name"])
def test_a_writer_killed_in_the_middle_of_a_shard(tmp_path: Path, event: str) -> None:
    filled(tmp_path, range(20))
    writer = forked(stop_at, event, tmp_path)
    end = time.monotonic() + 30
    while not (tmp_path / "reached").exists() and time.monotonic() < end:
        time.sleep(0.01)
    assert writer.pid is not None
    at_work = list(tmp_path.glob(".*.tmp"))
    cache_in(tmp_path).close()
    assert list(tmp_path.glob(".*.tmp")) == at_work  # it is still being written
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    named = event == "after it has its name"
    left = list(tmp_path.glob(".*.tmp"))
    assert (len(shards(tmp_path)), len(left)) == ((2, 0) if named else (1, 1))
    cache_in(tmp_path).close()
    assert not list(tmp_path.glob(".*.tmp"))
    with cache_in(tmp_path) as cache:
        assert cache.missing(range(20, 40)).all().item() != named
        assert not cache.missing(range(20)).any()
        assert same(cache.label(X[:40], range(40)), expected(range(40)))


def write_for_ever(folder: Path) -> None:
    with cache_in(folder, shard_bytes=1) as cache:
        for start in range(0, 1 << 30, 4):
            cache.add(range(start, start + 4), RowWise()(X[torch.arange(start, start + 4) % 64]))


def test_writers_killed_at_any_moment_leave_only_whole_rows(tmp_path: Path) -> None:
    for wait in (0.15, 0.2, 0.25):
        before = len(shards(tmp_path))
        writer = forked(write_for_ever, tmp_path)
        end = time.monotonic() + 30
        while len(shards(tmp_path)) < before + 3 and time.monotonic() < end:
            time.sleep(0.01)
        time.sleep(wait)
        assert writer.pid is not None
        os.kill(writer.pid, signal.SIGKILL)
        writer.join()
    with tgt.TeacherCache.open(tmp_path) as cache:
        assert cache.verify() == {}
        ids = cache.ids()
        got = cache.read(ids)
        assert isinstance(got, tgt.TeacherTopK)
        wanted = tgt.topk_teacher(RowWise()(X[ids % 64]), K, 2.0)
        assert torch.equal(got.ids, wanted.ids)
        assert torch.allclose(got.log_probs, wanted.log_probs, atol=1e-5)


def share(folder: Path, number: int, start: Any) -> None:
    start.wait()
    generator = torch.Generator().manual_seed(number)
    with cache_in(folder, shard_bytes=200) as cache:
        for _ in range(2):
            for ids in torch.randperm(64, generator=generator).split(7):
                assert same(cache.label(X[ids], ids), expected(ids))


def test_several_writers_at_once(tmp_path: Path) -> None:
    import multiprocessing

    start = multiprocessing.get_context("fork").Barrier(3)
    writers = [forked(share, tmp_path, number, start) for number in range(3)]
    for writer in writers:
        writer.join(60)
        assert writer.exitcode == 0
    names = [path.name for path in shards(tmp_path)]
    assert len({name.split("-")[2] for name in names}) == 3  # each has its own
    assert not list(tmp_path.glob(".*"))
    with tgt.TeacherCache.open(tmp_path) as cache:
        assert (len(cache), cache.verify()) == (64, {})
        assert same(cache.read(range(64)), expected(range(64)))


def test_a_reader_sees_what_another_writer_finishes(tmp_path: Path) -> None:
    filled(tmp_path, range(5))
    with tgt.TeacherCache.open(tmp_path) as reader, cache_in(tmp_path) as writer:
        writer.label(X[:10], range(10))
        assert reader.missing(range(10)).sum() == 5
        writer.flush()
        assert same(reader.read(range(10)), expected(range(10)))


def test_of_two_writers_the_older_shard_counts_and_each_keeps_what_it_served(tmp_path: Path) -> None:
    old, new = torch.zeros(1, 4), torch.ones(1, 4)
    one = tgt.TeacherCache(tmp_path, k=None, version="v")
    two = tgt.TeacherCache(tmp_path, k=None, version="v")
    two.add([1], new)
    one.add([1], old)
    one.flush()
    two.missing([2])  # takes in the shard of the other
    assert torch.equal(two.read([1]), new)
    two.flush()
    assert torch.equal(two.read([1]), new)
    assert torch.equal(one.read([1]), old)
    for cache in (one, two):
        cache.close()
    with tgt.TeacherCache.open(tmp_path) as cache:
        assert torch.equal(cache.read([1]), old)
        assert (len(cache), len(shards(tmp_path))) == (1, 2)


def test_two_writers_that_disagree_about_a_row(tmp_path: Path) -> None:
    one = tgt.TeacherCache(tmp_path, k=None, version="v")
    two = tgt.TeacherCache(tmp_path, k=None, version="v")
    one.add([1], torch.zeros(1, 4))
    with pytest.raises(ShapeError, match="classes: 4 and 5"):
        two.add([2], torch.zeros(1, 5))


def test_a_full_disk_keeps_the_rows_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    with cache_in(tmp_path) as cache:
        cache.label(X[:5], range(5))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", full)
            with pytest.raises(CacheError, match="No space left"):
                cache.flush()
        assert not list(tmp_path.glob(".*.tmp"))
        assert same(cache.read(range(5)), expected(range(5)))
    with tgt.TeacherCache.open(tmp_path) as cache:
        assert same(cache.read(range(5)), expected(range(5)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda found: found | {"format": "9"}, "format 9"),
        (lambda found: {"format": "1"}, "cannot read"),
        (lambda found: found | {"rows": {}}, "was changed"),
        (lambda found: found | {"fingerprint": found["fingerprint"] | {"k": 7}}, "was changed"),
    ],
)
def test_a_manifest_that_was_changed(tmp_path: Path, change: Callable[[Any], Any], words: str) -> None:
    filled(tmp_path, range(5))
    path = tmp_path / "manifest.json"
    path.write_text(json.dumps(change(json.loads(path.read_text()))))
    with pytest.raises(CacheError, match=words):
        tgt.TeacherCache.open(tmp_path)
    path.write_text("{")
    with pytest.raises(CacheError, match="cannot read"):
        cache_in(tmp_path)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CacheError, match="cannot write to"):
        cache_in(tmp_path / "file")
