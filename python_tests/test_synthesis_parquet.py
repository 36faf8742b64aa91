"""Synthetic examples as Parquet files: the same rows, for other readers, and on other file systems."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import toys
from cache_kit import flip, same
from test_synthesis import BATCH, IDS, ROWS, batches, equal, sampler_for, synthesize
from torch import Tensor
from torch.utils.data import DataLoader

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, CacheError, DependencyError, ShapeError, StaleCacheError
from tgt_fast.synthesis import Filters
from tgt_fast.synthesis.folder import open_rows
from tgt_fast.teacher import Latents


def files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.parquet"))


def parquet(folder: Any, **options: Any) -> Any:
    return synthesize(folder, format="parquet", **options)


def test_without_pyarrow_the_extra_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(DependencyError, match=r"synthesize needs pyarrow: pip install 'tgt-fast\[parquet\]'"):
        parquet(tmp_path)


class Odd(torch.nn.Module):
    """Data of several dtypes, one of which Arrow does not have."""

    def forward(self, latents: Latents) -> dict[str, Tensor]:
        z = latents.z
        return {
            "half": z.to(torch.float16), "brain": z.to(torch.bfloat16), "pairs": z.double().reshape(len(z), 2, 2),
            "tokens": (z[:, :3] * 10).long(), "bits": z > 0, "bytes": (z * 10).to(torch.uint8),
        }  # fmt: skip


@pytest.fixture(scope="module")
def arrow() -> Any:
    pytest.importorskip("pyarrow", reason="needs pyarrow: tgt-fast[parquet]")
    return pytest.importorskip("pyarrow.parquet")


@pytest.mark.usefixtures("arrow")
def test_rows_are_those_of_the_other_form(tmp_path: Path) -> None:
    odd = tgt.Teacher(
        lambda x: Latents(x[:, :4], torch.ones(len(x), 4, dtype=torch.bool)),
        Odd(),
        lambda x: x["pairs"].flatten(1).float(),
    )
    for sampler, k in ((sampler_for(), 2), (tgt.LatentSampler(odd, sigma=0.5, units="absolute"), None)):
        name = "records" if k else "logits"
        given: dict[str, Any] = {"sampler": sampler, "k": k, "latents": True, "replicas": 2}
        synthesize(tmp_path / name / "one", **given)
        told = parquet(tmp_path / name / "two", shard_bytes=1500, **given)
        assert (told.computed, told.found) == (2 * ROWS, 0)
        one, two = (tgt.SyntheticDataset(tmp_path / name / folder) for folder in ("one", "two"))
        assert len(files(tmp_path / name / "two")) > 1
        assert one.fingerprint == two.fingerprint
        a, b = one.read(), two.read()
        assert torch.equal(a.keys, b.keys)
        assert same(a.labels, b.labels)
        assert a.latents is not None
        assert b.latents is not None
        assert torch.equal(a.latents.z, b.latents.z)
        pairs = [(a.x, b.x)] if k else [(a.x[part], b.x[part]) for part in a.x]
        assert all(x.dtype == y.dtype and torch.equal(x, y) for x, y in pairs)
        for one_batch, two_batch in zip(DataLoader(one, batch_size=7), DataLoader(two, batch_size=7), strict=True):
            assert torch.equal(one_batch[0], two_batch[0])
        key = (int(IDS[3]), 1, 0)
        assert torch.equal(one[key][0], two[key][0])


@pytest.mark.usefixtures("arrow")
def test_a_second_run_goes_on_and_torn_files_are_made_again(tmp_path: Path) -> None:
    synthesize(tmp_path / "whole")
    parquet(tmp_path / "two", loader=batches()[:2], shard_bytes=1)
    told = parquet(tmp_path / "two", shard_bytes=1)
    assert (told.computed, told.found) == (ROWS - 2 * BATCH, 2 * BATCH)
    cut = files(tmp_path / "two")[1]
    cut.write_bytes(cut.read_bytes()[:-9])
    with pytest.warns(UserWarning, match=r"is torn: .*; its rows are left out"):
        assert len(tgt.SyntheticDataset(tmp_path / "two")) < ROWS
    with pytest.warns(UserWarning, match=r"is torn: .*; its rows count as missing"):
        assert parquet(tmp_path / "two").computed in (BATCH, ROWS % BATCH)
    assert cut.with_name(cut.name + ".torn").exists()
    assert equal(tgt.SyntheticDataset(tmp_path / "whole"), tgt.SyntheticDataset(tmp_path / "two"))
    flip(files(tmp_path / "two")[0], 300)
    with pytest.raises(CacheError, match="cannot read"):
        tgt.SyntheticDataset(tmp_path / "two").read()


@pytest.mark.usefixtures("arrow")
def test_the_same_rows_made_twice_at_once_are_one_file(tmp_path: Path) -> None:
    parquet(tmp_path / "one")
    data = tgt.SyntheticDataset(tmp_path / "one")
    writers = [open_rows("test", tmp_path / "two", data.fingerprint, format="parquet") for _ in range(2)]
    for writer in writers:  # none of which sees the other's
        where = data._rows.find(data._keys)
        assert writer.append(data._keys, data._rows.gather(where, list(data._layout.blocks)), data._layout) == ROWS
    for writer in writers:
        writer.close()
    assert len(files(tmp_path / "two")) == 1
    assert equal(tgt.SyntheticDataset(tmp_path / "two"), data)


@pytest.mark.usefixtures("arrow")
def test_rows_that_two_files_hold_are_written_once_at_the_end(tmp_path: Path) -> None:
    parquet(tmp_path / "one")
    data = tgt.SyntheticDataset(tmp_path / "one")
    rows = data._rows.gather(data._rows.find(data._keys), list(data._layout.blocks))
    for address in (tmp_path / "two", "memory://repeated/rows"):
        writers = [open_rows("test", address, data.fingerprint, format="parquet") for _ in range(3)]
        for writer, part in zip(writers, (slice(0, 9), slice(5, ROWS), slice(2, 7)), strict=True):
            writer.append(data._keys[part], {name: block[part] for name, block in rows.items()}, data._layout)
        for writer in writers:
            writer.close()
        assert equal(tgt.SyntheticDataset(address), data)  # which counts the first ones
        last = open_rows("test", address, None, format="parquet")
        assert last.drop_repeated() == 9 + (ROWS - 5) + 5 - ROWS
        assert equal(tgt.SyntheticDataset(address), data)
        again = open_rows("test", address, None, format="parquet")
        assert again.drop_repeated() == 0
        assert sum(len(file.ids) for file in again._segments) == ROWS


@pytest.mark.usefixtures("arrow")
def test_addresses_that_fsspec_knows(tmp_path: Path) -> None:
    synthesize(tmp_path, filters=Filters(max_entropy=1.09))
    address = "memory://synthesis/here"
    for rows in (BATCH, ROWS):
        told = parquet(address, loader=batches(rows), filters=Filters(max_entropy=1.09))
    assert told.found == BATCH
    assert 0 < len(tgt.SyntheticDataset(address)) < ROWS
    there = tgt.SyntheticDataset(address)
    assert equal(tgt.SyntheticDataset(tmp_path), there)
    assert torch.equal(tgt.SyntheticDataset(tmp_path).dropped(), there.dropped())
    assert len(there) + len(there.dropped()) == ROWS
    with pytest.raises(CacheError, match="no set of synthetic examples in memory://nothing"):
        tgt.SyntheticDataset("memory://nothing")


@pytest.mark.usefixtures("arrow")
def test_folders_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    synthesize(tmp_path / "shards")
    parquet(tmp_path / "files")
    with pytest.raises(ArgumentError, match='holds shards of safetensors; go on with format="safetensors"'):
        parquet(tmp_path / "shards")
    with pytest.raises(ArgumentError, match='holds Parquet files; go on with format="parquet"'):
        synthesize(tmp_path / "files")
    with pytest.raises(StaleCacheError, match=r"differ in k \(stored None, given 2\)"):
        parquet(tmp_path / "files", k=2)
    (tmp_path / "files" / "theirs.parquet").write_bytes(b"something else")
    with pytest.warns(UserWarning, match=r"theirs.parquet .* is torn"):
        assert len(tgt.SyntheticDataset(tmp_path / "files")) == ROWS
    wide = tgt.LatentSampler(tgt.Teacher(lambda x: x, lambda z: z, lambda x: x[:, :3]), units="absolute")
    x = toys.normal(4, 8)
    with pytest.raises(ShapeError, match=r"differ in x: float32 \(8,\) and float32 \(7,\)"):
        parquet(tmp_path / "wide", sampler=wide, loader=[(IDS[:4], x), (IDS[4:8], x[:, 1:])])


def test_hugging_face_reads_the_files(tmp_path: Path, arrow: Any) -> None:
    table = parquet(tmp_path, replicas=2) and arrow.read_table(tmp_path)
    assert table.column_names == ["sample_id", "replica", "step", "logits", "x"]
    datasets = pytest.importorskip("datasets", reason="needs datasets of Hugging Face")
    found = datasets.Dataset.from_parquet([str(path) for path in files(tmp_path)], cache_dir=str(tmp_path / "hf"))
    found = found.with_format("torch")
    data = tgt.SyntheticDataset(tmp_path)
    assert len(found) == len(data)
    for row in found:
        _, x, logits = data[int(row["sample_id"]), int(row["replica"]), int(row["step"])]
        assert torch.equal(row["x"], x)
        assert torch.equal(row["logits"], logits)
