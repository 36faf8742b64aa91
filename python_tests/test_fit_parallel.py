"""fit() with a student of several processes: the run is that of one process on all of their data."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from process_kit import Collectives, all_made, in_processes, needs_processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from training_kit import Numbered, make_student, make_teacher

import tgt_fast as tgt
from tgt_fast.train import log

pytestmark = needs_processes
STEPS, BATCH, ROWS = 4, 8, 22  # whose last batch is smaller


class Rows(Numbered):
    """Of which the first have no label, so that processes have unequal numbers of valid rows."""

    def __init__(self) -> None:
        super().__init__(ROWS)
        self.y[: ROWS // 3] = -100


def loaders(world: int, rank: int, accumulate: int) -> Any:
    """The same batches for any number of processes: a process's part of each, in order."""
    size = BATCH * accumulate
    batches = [list(range(start, min(start + size, ROWS))) for start in range(0, ROWS, size)]
    parts = [rows[place::accumulate][rank::world] for rows in batches for place in range(accumulate)]
    return DataLoader(Rows(), batch_sampler=parts)


def wrapped(kind: str) -> Any:
    student = make_student(batch_norm=False, dropout=0.0)
    if kind == "sharded":
        from torch.distributed.fsdp import fully_shard

        for layer in (student[0], student):
            fully_shard(layer)
        return student
    return DistributedDataParallel(student) if kind == "replicated" else student


def trained(kind: str, world: int, rank: int, accumulate: int, **options: Any) -> tuple[Any, Any, Any]:
    teacher = make_teacher()
    student = wrapped(kind)
    optimizer = torch.optim.Adam(student.parameters(), lr=0.02)
    sampler = tgt.LatentSampler(teacher, "gradient", sigma=0.5, units="absolute", seed=7)
    objective = tgt.TGTObjective(teacher, sampler, loss=tgt.DistillationLoss(temperature=2.0, hard_weight=1.0))
    data = Rows()
    own = DataLoader(data, batch_size=3, sampler=DistributedSampler(data, world, rank, shuffle=False))  # type: ignore[arg-type]

    def evaluate(model: nn.Module) -> dict[str, float]:
        return tgt.train.evaluate(model, teacher, own)

    given = {
        "steps": STEPS, "optimizer": optimizer, "accumulate": accumulate, "clip_grad_norm": 0.5, "evaluate": evaluate,
        "eval_every": 2, "ema": 0.9, "progress": False, **options,
    }  # fmt: skip
    result = tgt.fit(student, objective, loaders(world, rank, accumulate), **given)
    assert objective.count_group is None  # as it was
    return student, result, objective


def whole(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return {
        name: (value.full_tensor() if hasattr(value, "full_tensor") else value).clone() for name, value in state.items()
    }


@pytest.mark.parametrize(
    ("kind", "world"), [("replicated", 1), ("replicated", 2), ("sharded", 2), ("sharded", 4)], ids=str
)
def test_a_run_is_that_of_one_process(kind: str, world: int, tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        made = []
        for accumulate in (1, 4):
            student, result, _ = trained(kind, world, rank, accumulate)
            inner = student.module if kind == "replicated" else student
            assert list(result.best) == list(inner.state_dict())
            state = whole(inner.state_dict())
            made.append((state, result.history, whole(result.ema), whole(result.best)))
            student.load_state_dict(result.best)  # under the names of the model itself
            assert all(torch.equal(value, made[-1][3][name]) for name, value in whole(inner.state_dict()).items())
        return made

    found = all_made(in_processes(world, tmp_path, work))
    for place, accumulate in enumerate((1, 4)):
        student, result, _ = trained("alone", 1, 0, accumulate)
        expected = student.state_dict(), result.history, result.ema, result.best
        for made in found:
            for mine, theirs in zip(made[place], expected, strict=True):
                if isinstance(mine, list):
                    assert mine == found[0][place][1]  # the same in each process
                    for record, other in zip(mine, theirs, strict=True):
                        assert record == pytest.approx(other, rel=2e-5, abs=2e-6)
                else:
                    torch.testing.assert_close(mine, dict(theirs), rtol=1e-4, atol=1e-5)  # Adam enlarges what rounds


def test_what_a_step_communicates(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        counts = []
        for accumulate in (1, 4):
            buckets = []

            def hook(state: Any, bucket: Any, buckets: Any = buckets) -> Any:
                from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

                buckets.append(bucket.buffer().numel())
                return allreduce_hook(state, bucket)

            hook.__annotations__.clear()  # texts, which PyTorch takes for other types
            teacher = make_teacher()
            student = DistributedDataParallel(make_student(batch_norm=False, dropout=0.0))
            student.register_comm_hook(None, hook)
            objective = tgt.TGTObjective(teacher)
            optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
            seen = Collectives()
            by_step: list[int] = []

            def heard(event: str, run: Any, seen: Any = seen, by_step: Any = by_step) -> None:
                if event == "step":
                    by_step.append(len(seen.called))

            with seen:
                tgt.fit(
                    student, objective, loaders(2, rank, accumulate), steps=3, optimizer=optimizer,
                    accumulate=accumulate, progress=False, callbacks=[heard],
                )  # fmt: skip
            numbers = sum(parameter.numel() for parameter in student.parameters())
            assert buckets == [numbers] * 3  # the gradients, once a step
            assert by_step == [2, 4, 6]
            counts.append([size for _, size in seen.called[: by_step[-1]]])
            assert {name for name, _ in seen.called[: by_step[-1]]} == {"all_reduce"}
            counts[-1] = [size for size in counts[-1] if size != numbers]
        return counts

    for counts in all_made(in_processes(2, tmp_path, work)):
        assert counts == [[1] * 3, [2] * 3]  # of rows


def test_one_bar_and_one_log(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        shown = io.StringIO()
        with contextlib.redirect_stderr(shown):
            _, result, _ = trained("replicated", 2, rank, 1, progress=True, evaluate=None, log=tmp_path / "log")
        return shown.getvalue(), result.history

    (first, history), (second, _) = all_made(in_processes(2, tmp_path, work))
    assert f"{STEPS}/{STEPS}" in first
    assert second == ""
    lines = log.read(tmp_path / "log")
    assert [one["event"] for one in lines].count("start") == 1
    assert lines[0]["settings"]["processes"] == "2"
    assert [one["values"] for one in lines if one["event"] == "record"] == history


def test_evaluations_are_of_all_data(tmp_path: Path) -> None:
    def measured(world: int, rank: int, **options: Any) -> dict[str, float]:
        data = Rows()
        rows = DistributedSampler(data, world, rank, shuffle=False)  # type: ignore[arg-type]
        loader = DataLoader(data, batch_size=3, sampler=rows)
        return tgt.train.evaluate(make_student().eval(), make_teacher(), loader, class_counts=[9, 5, 2, 1], **options)

    def work(rank: int) -> Any:
        return measured(4, rank, group="world"), measured(4, rank)  # 22 rows: two are repeated

    found = all_made(in_processes(4, tmp_path, work))
    expected = measured(1, 0)
    for together, _ in found:
        assert together == found[0][0]
        assert together == pytest.approx(expected, rel=1e-6, nan_ok=True)
    assert found[0][1] != found[1][1]
