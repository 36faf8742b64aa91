"""Checksums of a cache: compared a piece at a time, before the first row of a piece is used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from cache_kit import flip, shards

import tgt_fast as tgt
from tgt_fast.cache.checksums import PIECE, Checked, TornError, crcs

WIDTH = 1000
ROWS = 4 * PIECE // WIDTH  # the last of four pieces is not whole
DATA = np.random.default_rng(0).integers(0, 256, (ROWS, WIDTH), np.uint8)


def checked(data: np.ndarray, sums: str | None = None) -> Checked:
    return Checked(data, crcs(DATA).tobytes().hex() if sums is None else sums)


def test_as_many_checksums_as_pieces() -> None:
    assert len(crcs(DATA)) == 4
    assert len(crcs(DATA[:0])) == 0
    assert len(crcs(DATA.reshape(-1)[:PIECE])) == 1
    for sums, words in (("00000000", "1 checksums for 4 pieces"), ("xy", "not readable"), ("00", "not readable")):
        with pytest.raises(TornError, match=words):
            checked(DATA, sums)


@pytest.mark.parametrize("piece", range(4))
@pytest.mark.parametrize("as_slice", [True, False])
def test_only_the_pieces_of_the_rows_are_compared(piece: int, as_slice: bool) -> None:
    data = DATA.copy()
    data.reshape(-1)[piece * PIECE + 5] ^= 1
    first, last = piece * PIECE // WIDTH, min(ROWS - 1, ((piece + 1) * PIECE - 1) // WIDTH)  # of rows in that piece
    part = checked(data)
    for row in (0, first - 1, last + 1, ROWS - 1):
        if not first <= row <= last and 0 <= row < ROWS:
            part.check(slice(row, row + 1) if as_slice else np.array([row]))
    for rows in ([first], [last], [0, ROWS - 1, first], [ROWS - 1, last, last]):
        with pytest.raises(TornError, match="checksum is wrong"):
            checked(data).check(slice(rows[0], rows[0] + 1) if as_slice and len(rows) == 1 else np.array(rows))
    with pytest.raises(TornError):
        part.check()
    assert not part.done


def test_a_row_of_many_pieces_is_compared_to_its_last_byte() -> None:
    wide = DATA.reshape(1, -1)
    sums = crcs(wide).tobytes().hex()
    for at in range(0, wide.size, PIECE // 2):
        torn = wide.copy()
        torn[0, at] ^= 255
        with pytest.raises(TornError):
            Checked(torn, sums).check(np.array([0]))
    part = Checked(wide, sums)
    part.check(np.array([0]))
    assert part.done


def test_each_piece_is_compared_once() -> None:
    data = DATA.copy()
    part = checked(data)
    part.check(slice(0, ROWS))
    assert part.done
    data[:] = 0
    part.check()
    part.check(np.arange(ROWS))


def test_rows_of_no_bytes() -> None:
    part = Checked(np.empty((5, 0), np.uint8), "")
    assert part.done
    part.check(slice(0, 5))
    part.check(np.array([4]))


def test_a_first_batch_does_not_wait_for_the_rest_of_its_shard(tmp_path: Path) -> None:
    """A bit that has flipped far away is found when its rows are asked for, and then nothing of them is served."""
    logits = torch.randn(64, PIECE // 16)  # 16 pieces
    with tgt.TeacherCache(tmp_path, k=None, version="rows") as cache:
        cache.add(range(64), logits)
    flip(shards(tmp_path)[0], -1)
    with tgt.TeacherCache.open(tmp_path) as cache:
        for ids in (range(8), [8, 3, 11], [40]):
            assert torch.equal(torch.as_tensor(cache.read(ids)), logits[list(ids)])
        with pytest.warns(UserWarning, match="is torn"), pytest.raises(KeyError):
            cache.read([5, 63])
        assert cache.missing(range(64)).all()
