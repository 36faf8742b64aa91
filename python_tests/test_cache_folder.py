"""TeacherCache: a folder that holds a changed manifest, files of others, or things that are no files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from cache_kit import RowWise, data, shards

import tgt_fast as tgt
from tgt_fast.cache.manifest import Manifest
from tgt_fast.errors import CacheError


def filled(folder: Path) -> Path:
    with tgt.TeacherCache(folder, RowWise(), k=3) as cache:
        cache.label(data(4), range(4))
    return folder / "manifest.json"


def test_every_bit_of_a_manifest_counts(tmp_path: Path) -> None:
    path = filled(tmp_path)
    whole, before = path.read_bytes(), shards(tmp_path)
    for bit in range(8 * len(whole)):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(CacheError):
            Manifest.read(tmp_path)
    with pytest.raises(CacheError):
        tgt.TeacherCache(tmp_path, RowWise(), k=3)
    assert shards(tmp_path) == before
    path.write_bytes(whole)
    with tgt.TeacherCache(tmp_path, RowWise(), k=3) as cache:
        assert not cache.missing(range(4)).any()


@pytest.mark.parametrize("text", ["[" * 100_000, '{"format": "3", "fingerprint": ' + "[" * 100_000, "1e999", "[]"])
def test_a_manifest_that_is_something_else(tmp_path: Path, text: str) -> None:
    filled(tmp_path).write_text(text)
    with pytest.raises(CacheError, match="cannot read"):
        tgt.TeacherCache.open(tmp_path)


def test_an_older_format_names_the_command(tmp_path: Path) -> None:
    path = filled(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format": "2"}))
    with pytest.raises(CacheError, match=r"format 2.*tgt-fast cache build"):
        tgt.TeacherCache(tmp_path, RowWise(), k=3)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no FIFOs")
@pytest.mark.parametrize("which", ["manifest", "shard"])
def test_a_fifo_in_place_of_a_file(tmp_path: Path, which: str) -> None:
    manifest = filled(tmp_path)
    path = manifest if which == "manifest" else shards(tmp_path)[0]
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(CacheError, match="no regular file"):
        tgt.TeacherCache.open(tmp_path)


def test_files_of_others_stay(tmp_path: Path) -> None:
    names = ["model.safetensors", ".theirs.tmp", "00000-of-1.safetensors"]
    filled(tmp_path)
    for name in names:
        (tmp_path / name).write_bytes(b"theirs")
        os.utime(tmp_path / name, (0, 0))
    with tgt.TeacherCache(tmp_path, RowWise(), k=3) as cache:
        assert not cache.missing(range(4)).any()
        assert cache.verify() == {}
    assert [(tmp_path / name).read_bytes() for name in names] == [b"theirs"] * 3
