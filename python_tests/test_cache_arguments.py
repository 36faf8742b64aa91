"""TeacherCache and teacher_fingerprint: arguments of another kind are refused by a typed error that names them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cache_kit import RowWise, data

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, DeviceError, DTypeError

SEVERAL, NONE = torch.tensor([1, 2]), torch.empty(0, 5)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"transforms": None}, "transforms must be a sequence of callables, got None"),
        ({"transforms": 1}, "transforms must be a sequence"),
        ({"transforms": torch.tensor(1)}, "transforms must be a sequence"),
        ({"transforms": torch.tanh}, "transforms must be .* put the one in a list"),
        ({"transforms": torch.nn.Sequential()}, "transforms must be .* put the one in a list"),
        ({"transforms": "tanh"}, "transforms must be a sequence"),
        ({"transforms": [torch.tanh, "a"]}, "transforms .* got 'a' in it"),
        ({"latents": SEVERAL}, "latents must be True or False"),
        ({"latents": None}, "latents must be True or False, got None"),
        ({"latents": np.array([1, 2])}, "latents must be True or False"),
        ({"readonly": NONE}, "readonly must be True or False"),
        ({"checksums": "no"}, "checksums must be True or False, got 'no'"),
    ],
)
def test_settings_of_another_kind(tmp_path: Path, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ArgumentError, match=words):
        tgt.TeacherCache(tmp_path, RowWise(), **options)
    if not options.keys() & {"readonly", "checksums"}:
        with pytest.raises(ArgumentError, match=words):
            tgt.teacher_fingerprint(RowWise(), **options)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("folder", [None, 1, b"x", [], SEVERAL, "a\0b", object()])
def test_a_folder_that_is_no_path(folder: Any) -> None:
    with pytest.raises(ArgumentError, match="folder must be a path"):
        tgt.TeacherCache.open(folder)
    with pytest.raises(ArgumentError, match="folder must be a path"):
        tgt.TeacherCache(folder, RowWise())


@pytest.mark.parametrize("loader", [None, 1, 1.5, torch.tensor(1), SEVERAL, object(), float, np.float32(1), "ab"])
def test_a_loader_that_gives_no_batches(tmp_path: Path, loader: Any) -> None:
    with tgt.TeacherCache(tmp_path, RowWise(), k=3) as cache, pytest.raises(ArgumentError, match="a loader must give"):
        cache.fill(loader, progress=False)


def test_tensors_without_numbers(tmp_path: Path) -> None:
    ids, logits = torch.arange(2, device="meta"), data(2)
    freed = torch.arange(2)
    freed.untyped_storage().resize_(0)
    with tgt.TeacherCache(tmp_path, RowWise(), k=None) as cache:
        cache.label(logits, range(2))
        for use in (
            cache.read,
            cache.missing,
            lambda ids: cache.label(logits, ids),
            lambda ids: cache.add(ids, logits),
        ):
            with pytest.raises(DeviceError, match="sample_ids is on the meta device"):
                use(ids)
            with pytest.raises(ArgumentError, match="sample_ids"):
                use(freed)
            with pytest.raises(DTypeError, match="sample_ids"):
                use(torch.arange(2).to_sparse())
        with pytest.raises(DeviceError, match="logits is on the meta device"):
            cache.add([5, 6], torch.zeros(2, 37, device="meta"))
    teacher = tgt.Teacher(torch.nn.Identity(), torch.nn.Identity(), RowWise())
    with tgt.TeacherCache(tmp_path / "latents", teacher, k=None, latents=True) as cache:
        for latents, error in ((data(2).to_sparse(), DTypeError), (data(2).to("meta"), DeviceError)):
            with pytest.raises(error, match="latents"):
                cache.add([5, 6], torch.zeros(2, 37), latents)
        assert len(cache) == 0
