"""TeacherCache: latents and their masks, beside labels and by the same ids."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from cache_kit import RowWise, data
from toys import sequence_teacher, sequences, vector_teacher

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, DTypeError, ShapeError


@pytest.mark.parametrize("k", [2, None])
def test_latents_with_their_masks(tmp_path: Path, k: int | None) -> None:
    teacher, x = sequence_teacher(), sequences([3, 1, 4])
    n = 3
    expected = teacher.encode(x)
    assert expected.mask is not None
    with tgt.TeacherCache(tmp_path, teacher, k=k, latents=True) as cache:
        cache.label(x, range(n))
    with tgt.TeacherCache.open(tmp_path) as cache:
        rows = torch.arange(n).flip(0)
        got = cache.latents(rows)
        assert got.mask is not None
        assert torch.equal(got.z, expected.z[rows])
        assert torch.equal(got.mask, expected.mask[rows])
        assert got.mask.dtype == expected.mask.dtype


def test_latents_without_a_mask_and_from_elsewhere(tmp_path: Path) -> None:
    teacher, x = vector_teacher(), torch.randn(5, 8, generator=torch.Generator().manual_seed(0))
    with tgt.TeacherCache(tmp_path / "a", teacher, k=2, latents=True) as cache:
        cache.label(x, range(5))
        assert torch.equal(cache.latents([3]).z, teacher.encode(x).z[[3]])
        assert cache.latents([3]).mask is None
        with pytest.raises(DTypeError, match="stores latents"):
            cache.add([9], teacher.label(x[:1]))
        with pytest.raises(ShapeError, match="batch=1"):
            cache.add([9], teacher.label(x[:1]), torch.zeros(2, 4))
    with tgt.TeacherCache(tmp_path / "b", teacher, k=2) as cache:
        with pytest.raises(ArgumentError, match="latents=True"):
            cache.latents([0])
        with pytest.raises(ArgumentError, match="stores no latents"):
            cache.add([0], teacher.label(x[:1]), torch.zeros(1, 4))
    with (
        tgt.TeacherCache(tmp_path / "c", RowWise(), k=2, latents=True) as cache,
        pytest.raises(ArgumentError, match="needs a Teacher"),
    ):
        cache.label(data(1), [0])
