"""TeacherCache: what is read is what was computed, by sample id, whatever the order, the form and the reader."""

from __future__ import annotations

import copy
import functools
import gc
import json
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors
import torch
from cache_kit import CLASSES, RowWise, data, forked, parts, record_by_record, same, shards
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, CacheError, DTypeError, ShapeError, UnknownIdError

N = 200


@pytest.mark.parametrize("k", [5, None])
@pytest.mark.parametrize("shard_bytes", [1, 3000, 1 << 20], ids=["a shard a batch", "some shards", "all in memory"])
def test_three_shuffled_epochs_are_as_without_a_cache(tmp_path: Path, k: int | None, shard_bytes: int) -> None:
    module, x = RowWise(), data(N)
    teacher = module if k is None else functools.partial(record_by_record, module, k=k)
    generator = torch.Generator().manual_seed(3)
    with tgt.TeacherCache(tmp_path, teacher, k=k, shard_bytes=shard_bytes) as cache:
        for epoch in range(3):
            module.asked = 0
            for ids in torch.randperm(N, generator=generator).split(32 + epoch):
                got = cache.label(x[ids], ids)
                asked = module.asked
                assert same(got, teacher(x[ids]))
                assert not same(got, cache.read(ids.flip(0)))  # rows do tell ids apart
                module.asked = asked
            assert module.asked == (N if epoch == 0 else 0)
    with tgt.TeacherCache(tmp_path, teacher, k=k) as cache:
        module.asked = 0
        order = torch.randperm(N, generator=generator)
        got = cache.label(x[order], order)
        assert (module.asked, len(cache)) == (0, N)
        assert same(got, teacher(x[order]))


def test_the_first_value_is_the_one_that_is_served(tmp_path: Path) -> None:
    class Unsteady(RowWise):
        def forward(self, batch: Tensor) -> Tensor:
            return super().forward(batch) + 1e-6 * self.asked  # its last bits depend on what came before

    x, order = data(N), torch.arange(N).flip(0)
    with tgt.TeacherCache(tmp_path, Unsteady(), k=3) as cache:
        first = cache.label(x, range(N))
        for ids in order.split(17):
            assert same(cache.label(x[ids], ids), first[ids])


@pytest.mark.parametrize("tail", ["bucket", "renormalize", "uniform"])
def test_a_loss_with_the_cache_has_the_bits_of_one_without(tmp_path: Path, tail: str) -> None:
    teacher, x, ids = RowWise(), data(16), torch.arange(16).flip(0)
    losses = []
    with tgt.TeacherCache(tmp_path, teacher, k=4, temperature=3.0, tail=tail) as cache:
        cache.label(x[::2], ids[::2])
        for record in (cache.label(x, ids), tgt.topk_teacher(teacher(x), 4, 3.0, tail=tail)):
            student = data(16, seed=5)[:, :1].expand(16, CLASSES).contiguous().requires_grad_()
            loss = tgt.distillation_loss(student, record, temperature=3.0)
            loss.backward()
            losses.append((loss.detach(), student.grad))
    assert torch.equal(losses[0][0], losses[1][0])
    assert losses[0][1] is not None
    assert torch.equal(losses[0][1], losses[1][1])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_logits_keep_the_teachers_dtype(tmp_path: Path, dtype: torch.dtype) -> None:
    teacher, x = RowWise(dtype=dtype), data(9)
    with tgt.TeacherCache(tmp_path, teacher, k=None) as cache:
        assert same(cache.label(x, range(9)), teacher(x))
    with tgt.TeacherCache.open(tmp_path) as cache:
        assert same(cache.read([8, 0]), teacher(x)[[8, 0]])


@pytest.mark.parametrize("k", [3, None])
def test_rounding_is_asked_for_and_is_there_from_the_first_time(tmp_path: Path, k: int | None) -> None:
    teacher, x = RowWise(), data(6)
    with tgt.TeacherCache(tmp_path, teacher, k=k, dtype=torch.bfloat16) as cache:
        first, again = cache.label(x, range(6)), cache.read(range(6))
    assert same(first, again)
    exact = teacher(x) if k is None else tgt.topk_teacher(teacher(x), k, 2.0).log_probs
    value = first if isinstance(first, Tensor) else first.log_probs
    assert torch.equal(value, exact.to(torch.bfloat16))


def test_only_what_is_missing_reaches_the_teacher(tmp_path: Path) -> None:
    seen: list[Tensor] = []
    inner = RowWise()

    class Watched(torch.nn.Module):
        def forward(self, batch: dict[str, Any]) -> Tensor:
            seen.append(batch["x"])
            return inner(batch["x"])

    x = data(8)
    with tgt.TeacherCache(tmp_path, Watched(), k=2) as cache:
        cache.label({"x": x[[1, 4]], "name": "whole batch"}, [11, 14])
        assert cache.missing([11, 12, 14]).tolist() == [False, True, False]
        # 13 comes twice, and is one sample
        got = cache.label({"x": x[[3, 4, 0, 3, 1]], "name": "whole batch"}, torch.tensor([13, 14, 10, 13, 11]))
    assert torch.equal(seen[1], x[[3, 0]])
    assert same(got, tgt.topk_teacher(inner(x[[3, 4, 0, 3, 1]]), 2, 2.0))


def test_of_an_id_the_first_row_stays(tmp_path: Path) -> None:
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(0))
    with tgt.TeacherCache(tmp_path, k=None, version="by hand") as cache:
        assert cache.add([5, 3, 5], logits[:3]) == 2
        assert cache.add([3, 9], logits[2:]) == 1
        cache.flush()
        assert cache.add([3, 9, 5], logits[:3]) == 0
        assert torch.equal(cache.read([5, 3, 9]), logits[[0, 1, 3]])
        assert (len(cache), cache.ids().tolist()) == (3, [3, 5, 9])


def test_samples_with_positions_and_a_teacher_that_gives_records(tmp_path: Path) -> None:
    inner, x = RowWise(), data(10, 6)
    teacher = lambda batch: tgt.topk_teacher(inner(batch), 3, 1.5, tail="uniform")  # noqa: E731
    with tgt.TeacherCache(tmp_path, teacher, k=3, temperature=1.5, tail="uniform") as cache:
        got = cache.label(x, range(10))
        assert same(got, teacher(x))
        assert isinstance(got, tgt.TeacherTopK)
        assert tuple(got.shape) == (10, 6)
        assert same(cache.read([7, 7, 2]), teacher(x[[7, 7, 2]]))
        with pytest.raises(ShapeError, match=r"class_ids: int32 \(6, 3\) and int32 \(5, 3\)"):
            cache.label(x[:, :5], range(20, 30))
        with pytest.raises(ShapeError, match="classes: 37 and 36"):
            cache.add([50], tgt.topk_teacher(inner(x[:1])[..., 1:], 3, 1.5, tail="uniform"))


def test_a_record_without_a_tail_stays_without(tmp_path: Path) -> None:
    record = tgt.TeacherTopK(torch.tensor([[1, 0]]), torch.tensor([[-0.1, -3.0]]), None, 2.0, 9)
    with tgt.TeacherCache(tmp_path, k=2, version="a server") as cache:
        cache.add([4], record)
        got = cache.read([4])
    assert isinstance(got, tgt.TeacherTopK)
    assert got.tail_log_prob is None
    assert same(got, record)


def test_the_teacher_runs_in_eval_mode_without_a_graph_and_is_left_as_it_was(tmp_path: Path) -> None:
    module = torch.nn.Sequential(torch.nn.BatchNorm1d(2), torch.nn.Dropout(0.5), torch.nn.Linear(2, 4)).train()
    before = copy.deepcopy(module.state_dict())
    with tgt.TeacherCache(tmp_path, module, k=None) as cache:
        got = cache.label(data(8).requires_grad_(), range(8))
    assert isinstance(got, Tensor)
    assert not got.requires_grad
    assert torch.equal(got, module.eval()(data(8)))
    module.train()
    assert all(torch.equal(value, before[name]) for name, value in module.state_dict().items())


def test_unknown_ids_are_named(tmp_path: Path) -> None:
    with tgt.TeacherCache(tmp_path, RowWise(), k=2) as cache:
        with pytest.raises(UnknownIdError, match="1 of the sample ids asked for: 3"):
            cache.read([3])
        cache.label(data(3), range(3))
        with pytest.raises(KeyError) as caught:
            cache.read([0, *range(50, 60), 1])
    assert "10 of the sample ids asked for: 50, 51, 52, 53, 54, ..." in str(caught.value)
    with tgt.TeacherCache.open(tmp_path) as cache, pytest.raises(UnknownIdError, match="no teacher"):
        cache.label(data(4), range(4))


def test_a_read_only_cache_keeps_nothing(tmp_path: Path) -> None:
    teacher, x = RowWise(), data(9)
    with pytest.raises(CacheError, match="no teacher cache"):
        tgt.TeacherCache.open(tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with tgt.TeacherCache(tmp_path, teacher, k=3) as cache:
        cache.label(x[:4], [0, 1, 2, 3])
    before = sorted(path.name for path in tmp_path.iterdir())
    with tgt.TeacherCache(tmp_path, RowWise(), k=3, readonly=True) as cache:
        order = torch.tensor([8, 0, 5, 8, 3, 4])
        assert same(cache.label(x[order], order), tgt.topk_teacher(teacher(x[order]), 3, 2.0))
        assert (len(cache), cache.missing([8]).item()) == (4, True)
        with pytest.raises(CacheError, match="opened to be read"):
            cache.add([9], teacher(x[:1]))
        with pytest.raises(CacheError, match="opened to be read"):
            cache.fill([(torch.tensor([9]), x[:1])])
        cache.flush()
    assert sorted(path.name for path in tmp_path.iterdir()) == before


class Labelled(Dataset):  # type: ignore[type-arg]
    def __init__(self, cache: tgt.TeacherCache) -> None:
        self.cache = cache

    def __len__(self) -> int:
        return N

    def __getitem__(self, i: int) -> Any:
        return i, parts(self.cache.read([i]))


@pytest.mark.parametrize("waiting", [False, True], ids=["from shards", "from the parent's memory"])
def test_workers_of_a_loader_read(tmp_path: Path, waiting: bool) -> None:
    teacher, x = RowWise(), data(N)
    with tgt.TeacherCache(tmp_path, teacher, k=3, shard_bytes=2000 if not waiting else 1 << 20) as cache:
        expected = parts(cache.label(x, range(N)))
        loader = DataLoader(Labelled(cache), 25, shuffle=True, num_workers=2, multiprocessing_context="fork")
        count = 0
        for ids, got in loader:
            count += len(ids)
            assert all(torch.equal(a[:, 0], b[ids]) for a, b in zip(got, expected, strict=True))
        assert count == N
        assert bool(shards(tmp_path)) != waiting


def test_a_fork_writes_its_own_rows_and_not_the_parents(tmp_path: Path) -> None:
    teacher, x = RowWise(), data(9)

    def child(cache: tgt.TeacherCache) -> None:
        got = cache.label(x, range(9))
        assert same(got, tgt.topk_teacher(teacher(x), 3, 2.0))
        assert same(cache.read([0, 8]), tgt.topk_teacher(teacher(x[[0, 8]]), 3, 2.0))
        cache.close()

    with tgt.TeacherCache(tmp_path, teacher, k=3) as cache:
        cache.label(x[:5], range(5))
        process = forked(child, cache)
        process.join(60)
        assert process.exitcode == 0
        with tgt.TeacherCache.open(tmp_path) as other:
            assert other.ids().tolist() == [5, 6, 7, 8]
        assert not cache.missing([5, 8]).any()
    with tgt.TeacherCache.open(tmp_path) as cache:
        assert same(cache.read(range(9)), tgt.topk_teacher(teacher(x), 3, 2.0))


def test_a_pickled_cache_that_is_read_only_reads(tmp_path: Path) -> None:
    teacher, x = RowWise(), data(5)
    with tgt.TeacherCache(tmp_path, teacher, k=3) as cache:
        cache.label(x, range(5))
    with tgt.TeacherCache.open(tmp_path) as cache, pickle.loads(pickle.dumps(cache)) as other:
        assert same(other.read(range(5)), cache.read(range(5)))
        assert other.fingerprint == cache.fingerprint
        with pytest.raises(CacheError, match="opened to be read"):
            other.add([7], teacher(x[:1]))


def test_rows_that_wait_are_written_when_nobody_closes(tmp_path: Path) -> None:
    cache = tgt.TeacherCache(tmp_path, RowWise(), k=3)
    cache.label(data(5), range(5))
    assert not shards(tmp_path)
    del cache
    gc.collect()
    assert len(shards(tmp_path)) == 1


def test_old_rows_do_not_wait(tmp_path: Path) -> None:
    with tgt.TeacherCache(tmp_path, RowWise(), k=3, shard_seconds=0.0) as cache:
        cache.label(data(5), range(5))
        assert len(shards(tmp_path)) == 1


def test_fill_computes_what_is_missing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    teacher, x = RowWise(), data(20)
    batches = [(ids, x[ids], "more") for ids in torch.arange(20).split(6)]
    with tgt.TeacherCache(tmp_path, teacher, k=3) as cache:
        cache.label(x[4:7], range(4, 7))
        teacher.asked = 0
        assert cache.fill(batches, batch_size=4) == 17
        assert teacher.asked == 17
        assert "teacher cache" in capsys.readouterr().err
        assert len(shards(tmp_path)) == 1  # filled is written
        assert cache.fill(batches, progress=False) == 0
        assert capsys.readouterr().err == ""
        assert same(cache.read(range(20)), tgt.topk_teacher(teacher(x), 3, 2.0))


def test_shards_are_safetensors_that_others_read(tmp_path: Path) -> None:
    with tgt.TeacherCache(tmp_path, RowWise(dtype=torch.bfloat16), k=None) as cache:
        logits = cache.label(data(7), [3, 1, 4, 15, 9, 2, 6])
    with safetensors.safe_open(shards(tmp_path)[0], "pt") as file:
        assert torch.equal(file.get_tensor("logits"), logits)
        assert file.get_tensor("sample_ids").tolist() == [3, 1, 4, 15, 9, 2, 6]


def test_a_record_lies_in_one_row_of_bytes_that_others_can_take_apart(tmp_path: Path) -> None:
    with tgt.TeacherCache(tmp_path, RowWise(), k=3, dtype=torch.float16) as cache:
        record = cache.label(data(7), range(7))
    assert isinstance(record, tgt.TeacherTopK)
    layout = json.loads((tmp_path / "manifest.json").read_text())["rows"]
    assert layout["offsets"] == {"labels": {"class_ids": 0, "log_probs": 12, "tail_log_prob": 18}}
    with safetensors.safe_open(shards(tmp_path)[0], "pt") as file:
        rows = file.get_tensor("labels")
    assert rows.shape == (7, 20)
    assert torch.equal(rows[:, :12].contiguous().view(torch.int32), record.ids.int())
    assert torch.equal(rows[:, 12:18].contiguous().view(torch.float16), record.log_probs)


def test_large_rows_and_ids_far_apart(tmp_path: Path) -> None:
    logits = torch.randn(6, 3, 1000, generator=torch.Generator().manual_seed(0))  # 12000 bytes: copied row by row
    ids = np.array([0, 2**48 - 1, 2**47, 17, 2**40, 2**32])
    with tgt.TeacherCache(tmp_path, k=None, version="1", shard_bytes=1) as cache:
        for i in range(0, 6, 2):
            cache.add(ids[i : i + 2], logits[i : i + 2])
        assert torch.equal(cache.read(ids[::-1].copy()), logits.flip(0))
        assert cache.missing([1, 2**48 - 2]).all()


def test_bad_arguments_name_what_is_wrong(tmp_path: Path) -> None:
    x = data(3)
    with tgt.TeacherCache(tmp_path, RowWise(), k=3) as cache:
        for ids, error, words in (
            ([0.5, 1.0, 2.0], DTypeError, "integers"),
            (torch.zeros(3), DTypeError, "torch.float32"),
            ([[0, 1, 2]], ShapeError, r"\(1, 3\)"),
            ([0, -1, 2], ArgumentError, "-1 to 2"),
            ([0, 2**48, 2], ArgumentError, "2\\^48"),
            ([0, 1], ShapeError, "2 sample ids for 3 samples"),
        ):
            with pytest.raises(error, match=words):
                cache.label(x, ids)
        with pytest.raises(ShapeError, match="2 sample ids, but"):
            cache.add([0, 1], torch.zeros(3, CLASSES))
        with pytest.raises(ArgumentError, match=r"temperature=2\.0, the record 1\.0"):
            cache.add([0, 1, 2], tgt.topk_teacher(torch.zeros(3, CLASSES), 3))
        with pytest.raises(ArgumentError, match="twice"):
            cache.add([0], tgt.TeacherTopK(torch.tensor([[1, 1, 2]]), torch.zeros(1, 3), None, 2.0, CLASSES))
        with pytest.raises(ArgumentError, match="k=3, but there are 2 classes"):
            cache.add([0], torch.zeros(1, 2))
        assert len(cache) == 0
    with pytest.raises(CacheError, match="closed"):
        cache.read([0])
    cache.close()
    for options, words in (
        ({"k": 0}, "k must be"),
        ({"temperature": 0.0}, "temperature"),
        ({"tail": "round"}, "tail"),
        ({"dtype": torch.int8}, "dtype"),
        ({"shard_bytes": 0}, "shard_bytes"),
        ({"shard_seconds": -1.0}, "shard_seconds"),
        ({"version": 3}, "version"),
    ):
        with pytest.raises(ArgumentError, match=words):
            tgt.TeacherCache(tmp_path / "other", RowWise(), **options)
    with pytest.raises(ArgumentError, match="whose outputs"):
        tgt.TeacherCache(tmp_path / "other")
    with (
        tgt.TeacherCache(tmp_path / "dense", k=None, version="1") as cache,
        pytest.raises(ArgumentError, match="stores logits"),
    ):
        cache.add([0], tgt.topk_teacher(torch.zeros(1, 9), 3))


def test_an_empty_batch_is_legal(tmp_path: Path) -> None:
    with tgt.TeacherCache(tmp_path, RowWise(), k=3) as cache, warnings.catch_warnings():
        warnings.simplefilter("error")
        cache.label(data(2), [1, 0])
        got = cache.label(data(0), [])
        assert (len(got), cache.missing([]).shape, cache.add([], torch.zeros(0, CLASSES))) == (0, (0,), 0)


def test_ids_are_widened_where_they_arrive(tmp_path: Path) -> None:
    """To another device they travel as int32; on the host they are read as int64 at once."""
    with tgt.TeacherCache(tmp_path, k=3, version="rows") as cache:
        cache.add(range(4), torch.randn(4, 9))
        layout, rows = cache._layout(), cache._read([0, 2], ("class_ids",))
        assert layout.unpack(rows)["class_ids"].dtype == torch.int32
        assert layout.unpack(rows, widen=True)["class_ids"].dtype == torch.int64
        record = cache.settings.labels(layout.unpack(rows), 9, torch.device("meta"))
        assert isinstance(record, tgt.TeacherTopK)
        assert record.ids.dtype == torch.int64
        assert record.ids.device.type == "meta"
