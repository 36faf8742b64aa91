"""Shards that are cut while their cache is open, and headers in which a bit has flipped.

Reading what is no longer in a file ends a process with SIGBUS, so what would is run in one of its own.
"""

from __future__ import annotations

import json
import os
import struct
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_kit import forked, shards
from torch import Tensor

import tgt_fast as tgt
from tgt_fast.cache.checksums import TornError
from tgt_fast.cache.manifest import Manifest
from tgt_fast.cache.shard import Shard

ROWS, CLASSES = 24, 2000  # 8000 bytes a row, so that most of a shard is on pages of its own
LOGITS = torch.randn(ROWS, CLASSES, generator=torch.Generator().manual_seed(0))
ORDER = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))


def teacher(x: Tensor) -> Tensor:
    return LOGITS[x]


def cache_in(folder: Path, **options: Any) -> tgt.TeacherCache:
    return tgt.TeacherCache(folder, teacher, k=None, version="1", **options)


def filled(folder: Path) -> list[Path]:
    """Two shards, of the first and the second half."""
    with cache_in(folder, shard_bytes=1) as cache:
        for ids in torch.arange(ROWS).chunk(2):
            cache.label(ids, ids)
    first, second = shards(folder)
    return [first, second]


def read_by_a_reader(folder: Path, cut: Callable[[], None], checksums: bool) -> None:
    with tgt.TeacherCache.open(folder, checksums=checksums) as cache:
        cut()
        with pytest.raises(KeyError, match="12 of the sample ids"):
            cache.read(ORDER)
        with pytest.raises(KeyError):
            cache.read(range(ROWS // 2))
        assert torch.equal(torch.as_tensor(cache.read(range(ROWS // 2, ROWS))), LOGITS[ROWS // 2 :])
        assert "cut short" in next(iter(cache.contents().torn.values()))


def read_in_order(folder: Path, cut: Callable[[], None], checksums: bool) -> None:
    with tgt.TeacherCache.open(folder, checksums=checksums) as cache:
        assert torch.equal(torch.as_tensor(cache.read(range(ROWS))), LOGITS)  # all checksums are compared
        cut()
        with pytest.raises(KeyError):
            cache.read(range(ROWS // 2))
        assert cache.missing(range(ROWS)).tolist() == [True] * 12 + [False] * 12


def computed_again(folder: Path, cut: Callable[[], None], checksums: bool) -> None:
    with cache_in(folder, checksums=checksums) as cache:
        assert torch.equal(torch.as_tensor(cache.label(ORDER, ORDER)), LOGITS[ORDER])
        cut()
        assert torch.equal(torch.as_tensor(cache.label(ORDER, ORDER)), LOGITS[ORDER])
    with tgt.TeacherCache.open(folder) as cache:
        assert torch.equal(torch.as_tensor(cache.read(range(ROWS))), LOGITS)


def cut_while_the_teacher_computes(folder: Path, cut: Callable[[], None], checksums: bool, readonly: bool) -> None:
    def cutting(x: Tensor) -> Tensor:
        cut()
        return LOGITS[x % ROWS]

    x = torch.cat([ORDER, torch.tensor([ROWS])])  # one that is not stored
    with tgt.TeacherCache(folder, cutting, k=None, version="1", readonly=readonly, checksums=checksums) as cache:
        assert torch.equal(torch.as_tensor(cache.label(x, x)), LOGITS[x % ROWS])


def cut_under_a_reader(folder: Path, cut: Callable[[], None], checksums: bool) -> None:
    cut_while_the_teacher_computes(folder, cut, checksums, readonly=True)


def cut_under_a_writer(folder: Path, cut: Callable[[], None], checksums: bool) -> None:
    cut_while_the_teacher_computes(folder, cut, checksums, readonly=False)


def verified(folder: Path, cut: Callable[[], None], checksums: bool) -> None:
    with tgt.TeacherCache.open(folder, checksums=checksums) as cache:
        cache.read(range(3))
        cut()
        assert list(cache.verify()) == [shards(folder)[0].name]


@pytest.mark.skipif(os.name == "nt", reason="a file that is mapped cannot be cut there")
@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("size", [0, 4096, -5000])
@pytest.mark.parametrize(
    "use", [read_by_a_reader, read_in_order, computed_again, cut_under_a_reader, cut_under_a_writer, verified]
)
def test_a_shard_that_is_cut_while_it_is_open(
    tmp_path: Path, use: Callable[..., None], size: int, checksums: bool
) -> None:
    first = filled(tmp_path)[0]
    length = size if size >= 0 else first.stat().st_size + size

    def cut() -> None:
        if first.exists():
            os.truncate(first, length)

    def run() -> None:
        warnings.simplefilter("ignore")
        use(tmp_path, cut, checksums)

    process = forked(run)
    process.join(120)
    assert process.exitcode == 0


def test_every_bit_of_a_header_counts(tmp_path: Path) -> None:
    with tgt.TeacherCache(tmp_path, k=2, version="1", tail="bucket") as cache:
        cache.add([3, 1], torch.randn(2, 5, generator=torch.Generator().manual_seed(0)))
    (path,) = shards(tmp_path)
    whole = path.read_bytes()
    manifest = Manifest.read(tmp_path)
    assert manifest is not None
    Shard(path, manifest.layout)
    for bit in range(8 * (8 + struct.unpack("<Q", whole[:8])[0])):
        damaged = bytearray(whole)
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(TornError):
            Shard(path, manifest.layout)


def replaced(old: str, new: str) -> Callable[[Any], bytes]:
    return lambda header: json.dumps(header).replace(old, new).encode()


def with_logits(**change: Any) -> Callable[[Any], bytes]:
    return lambda header: json.dumps(header | {"logits": header["logits"] | change}).encode()


HEADERS: dict[str, Callable[[Any], bytes]] = {
    "nested": lambda header: b"[" * 100_000,
    "nested inside": lambda header: b'{"__metadata__": ' + b"[" * 100_000,
    "no object": lambda header: b"[]",
    "no metadata": lambda header: json.dumps({k: v for k, v in header.items() if k != "__metadata__"}).encode(),
    "metadata that is none": lambda header: json.dumps(header | {"__metadata__": 3}).encode(),
    "numbers in metadata": lambda header: json.dumps(
        header | {"__metadata__": dict.fromkeys(header["__metadata__"], 1e999)}
    ).encode(),
    "a huge offset": replaced('"data_offsets": [0', '"data_offsets": [1e999'),
    "a negative offset": replaced('"data_offsets": [0', '"data_offsets": [-8'),
    "a huge shape": replaced('"shape": [', '"shape": [99999999999999999999, '),
    "another format": replaced("tgt_fast.cache", "tgt_fast.cash"),
    "a shape that is none": with_logits(shape=None),
    "a dtype that is none": with_logits(dtype=[]),
    "a tensor that is none": lambda header: json.dumps(header | {"logits": None}).encode(),
    "no text": lambda header: b"\xff\xfe{}",
}


@pytest.mark.parametrize("make", HEADERS.values(), ids=HEADERS.keys())
def test_a_header_that_is_something_else(tmp_path: Path, make: Callable[[Any], bytes]) -> None:
    first, second = filled(tmp_path)
    raw = first.read_bytes()
    length = struct.unpack("<Q", raw[:8])[0]
    text = make(json.loads(raw[8 : 8 + length]))
    first.write_bytes(struct.pack("<Q", len(text)) + text + raw[8 + length :])
    with pytest.warns(UserWarning, match="is torn"):
        cache = cache_in(tmp_path)
    with cache:
        assert cache.missing(range(ROWS)).tolist() == [True] * 12 + [False] * 12
        assert torch.equal(torch.as_tensor(cache.label(ORDER, ORDER)), LOGITS[ORDER])
    assert second.exists()
