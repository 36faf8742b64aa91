"""fit(): it learns, it can be killed and resumed to the same bits, and it disturbs nothing around it."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import DataLoader
from training_kit import (
    Augmented,
    assert_same_weights,
    make_data,
    make_run,
    make_student,
    make_teacher,
    own_generator,
    score,
)

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, CheckpointError
from tgt_fast.train import FitResult
from tgt_fast.train.rng import get_rng_state, isolated_rng

pytestmark = pytest.mark.usefixtures("one_thread")


def test_it_learns() -> None:
    run = make_run()
    before = score(run["student"])["accuracy"]
    result = tgt.fit(**run, steps=120, evaluate=score, eval_every=40)
    assert [record["step"] for record in result.history] == [40, 80, 120]
    assert result.steps == 120
    first, *_, last = result.history
    assert last["loss"] < first["loss"]
    assert last["accuracy"] > before
    assert set(last) == {"step", "loss", "hard", "soft", "synthetic", "lr", "accuracy", "noise"}
    assert last["loss"] == pytest.approx(last["hard"] + last["soft"] + last["synthetic"])
    assert all(type(value) in (int, float) for value in last.values())


def test_a_record_is_the_mean_since_the_one_before() -> None:
    each = [record["loss"] for record in tgt.fit(**make_run(), steps=6, eval_every=1).history]
    first, second = tgt.fit(**make_run(), steps=6, eval_every=3).history
    assert first["loss"] == pytest.approx(sum(each[:3]) / 3)
    assert second["loss"] == pytest.approx(sum(each[3:]) / 3)


def test_a_step_is_what_it_says() -> None:
    """fit() against the loop written out."""
    run, by_hand = make_run(None), make_run(None)
    x, y = make_data()
    run["loader"] = [(x, y)]
    tgt.fit(**run, steps=5, clip_grad_norm=0.1)
    student, optimizer = by_hand["student"], by_hand["optimizer"]
    with isolated_rng(run["seed"]):
        for step in range(5):
            by_hand["objective"](student, x, y, step=step)["loss"].backward()
            nn.utils.clip_grad_norm_(student.parameters(), 0.1)
            optimizer.step()
            optimizer.zero_grad()
            by_hand["scheduler"].step()
    assert_same_weights(run["student"], student)


# ---- the best weights ----


def scripted(*scores: float) -> Callable[[nn.Module], dict[str, float]]:
    values = iter(scores)
    return lambda student: {"accuracy": next(values)}


@pytest.mark.parametrize(
    ("scores", "mode", "best"),
    [
        ((0.2, 0.9, 0.9, 0.1), "max", 2),  # of equals the first
        ((0.2, 0.9, 0.9, 0.1), "min", 4),
        ((math.nan, 0.3, math.nan, 0.2), "max", 2),
        ((math.nan,) * 4, "max", None),
    ],
)
def test_best_weights(tmp_path: Path, scores: tuple[float, ...], mode: Any, best: int | None) -> None:
    run, until = make_run(), make_run()
    result = tgt.fit(**run, steps=4, evaluate=scripted(*scores), eval_every=1, mode=mode, checkpoint_dir=tmp_path)
    assert result.best_step == best
    if best is None:
        assert result.best is None
        assert not (tmp_path / "best.safetensors").exists()
        return
    assert result.best_score == scores[best - 1]
    tgt.fit(**until, steps=best)
    for weights in (result.best, safetensors.torch.load_file(tmp_path / "best.safetensors")):
        fresh = make_student(seed=9)
        fresh.load_state_dict(weights or {}, strict=True)
        assert_same_weights(fresh, until["student"])


def test_the_best_survives_a_resume(tmp_path: Path) -> None:
    tgt.fit(**make_run(), steps=3, evaluate=scripted(0.5, 0.9, 0.1), eval_every=1, checkpoint_dir=tmp_path)
    until = make_run()
    tgt.fit(**until, steps=2)
    result = tgt.fit(
        **make_run(), steps=5, evaluate=scripted(0.2, 0.8), eval_every=1, checkpoint_dir=tmp_path, resume=True
    )
    assert (result.best_step, result.best_score) == (2, 0.9)
    assert result.best is not None
    assert torch.equal(result.best["0.weight"], until["student"][0].weight)


# ---- gradient accumulation ----


def test_one_batch_of_32_equals_four_of_8() -> None:
    """With unequal numbers of valid rows, through the whole loop."""
    x, y = make_data(32)
    y[:7], y[20:23] = -100, -1
    ids = torch.arange(32)
    teacher = make_teacher()
    students = []
    for size, accumulate in ((32, 1), (8, 4)):
        student = make_student(batch_norm=False, dropout=0.0).double()
        objective = tgt.TGTObjective(teacher.double(), tgt.LatentSampler(teacher, sigma=0.5, units="absolute"))
        tgt.fit(
            student,
            objective,
            list(zip(ids.split(size), x.double().split(size), y.split(size), strict=True)),
            steps=10,
            optimizer=torch.optim.SGD(student.parameters(), lr=0.5, momentum=0.9),
            accumulate=accumulate,
            progress=False,
        )
        students.append(student)
    for one, other in zip(students[0].parameters(), students[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-8)
    assert not torch.equal(students[0][0].weight, make_student(batch_norm=False)[0].weight)


# ---- what it leaves alone ----


def test_two_runs_in_one_process_do_not_clash() -> None:
    """Alone, one after the other, and one inside the evaluation of the other."""
    alone = [make_run("random"), make_run("gradient", lr=0.05)]
    for run in alone:
        tgt.fit(**run, steps=9)
    state = torch.get_rng_state()
    outer, inner = make_run("random"), make_run("gradient", lr=0.05)

    def judge(student: nn.Module) -> dict[str, float]:
        if not inner_done:
            inner_done.append(tgt.fit(**inner, steps=9))
        return {"accuracy": 0.0}

    inner_done: list[FitResult] = []
    tgt.fit(**outer, steps=9, evaluate=judge, eval_every=4)
    assert_same_weights(outer["student"], alone[0]["student"])
    assert_same_weights(inner["student"], alone[1]["student"])
    assert torch.equal(torch.get_rng_state(), state)


def test_evaluating_does_not_change_the_training() -> None:
    often, never = make_run(), make_run()
    tgt.fit(**often, steps=9, evaluate=score, eval_every=1)
    tgt.fit(**never, steps=9)
    assert_same_weights(often["student"], never["student"])


def test_with_a_seed_the_global_generators_stay() -> None:
    run = make_run()
    run["loader"] = iter(list(run["loader"])[:1])  # to be read once
    before = get_rng_state()
    with pytest.raises(ArgumentError, match="gave no batch"):
        tgt.fit(**run, steps=3)  # also when it fails
    tgt.fit(**make_run(), steps=3)
    after = get_rng_state()
    assert torch.equal(before["torch"], after["torch"])
    assert before["python"] == after["python"]
    assert torch.equal(before["numpy"]["key"], after["numpy"]["key"])


def test_a_teacher_inside_the_student_stays_frozen_and_unsaved(tmp_path: Path) -> None:
    """One epoch with the teacher in a module in train mode: its buffers are bit-equal, and no file holds it."""
    teacher = make_teacher(batch_norm=True)

    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net, self.teacher = make_student(), teacher

        def forward(self, x: Tensor) -> Tensor:
            return self.net(x)

    run = make_run()
    student = Both()
    student.train()
    before = [tensor.clone() for tensor in teacher.frozen_tensors()]
    run.update(
        student=student,
        objective=tgt.TGTObjective(teacher, tgt.LatentSampler(teacher, sigma=0.5, units="absolute")),
        optimizer=torch.optim.Adam(student.parameters()),
        scheduler=None,
    )
    tgt.fit(**run, steps=5, evaluate=score, checkpoint_dir=tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(before, teacher.frozen_tensors(), strict=True))
    for path in tmp_path.glob("*.safetensors"):
        assert not [name for name in safetensors.torch.load_file(path) if "teacher" in name]
    Both().load_state_dict(safetensors.torch.load_file(tmp_path / "best.safetensors"), strict=True)


# ---- other pieces ----


def test_schedules() -> None:
    run = make_run()
    run["scheduler"] = lr_scheduler.ReduceLROnPlateau(run["optimizer"], mode="max", patience=0, factor=0.5)
    result = tgt.fit(**run, steps=4, evaluate=scripted(0.5, 0.4, 0.6, 0.1), eval_every=1)
    assert [record["lr"] for record in result.history] == [0.02, 0.02, 0.01, 0.01]
    assert run["optimizer"].param_groups[0]["lr"] == 0.005


def test_any_callable_objective() -> None:
    class Plain:
        def __call__(self, student: nn.Module, x: Any, y: Any, /, *, sample_ids: Any, step: int) -> dict[str, Tensor]:
            return {"loss": nn.functional.cross_entropy(student(x), y)}

    run = {**make_run(), "objective": Plain()}
    result = tgt.fit(**run, steps=4)
    assert set(result.history[0]) == {"step", "loss", "lr"}
    with pytest.raises(ArgumentError, match="normalizers"):
        tgt.fit(**run, steps=4, accumulate=2)


def test_batches_without_labels_or_ids() -> None:
    x, _ = make_data()
    for loader in ([x, x], [(x,)], [[x]]):
        run = make_run()
        result = tgt.fit(**{**run, "loader": loader}, steps=2)
        assert result.history[0]["hard"] == 0 < result.history[0]["soft"]


def test_progress_bar(capfd: pytest.CaptureFixture[str]) -> None:
    tgt.fit(**{**make_run(), "progress": True}, steps=3, evaluate=score)
    shown = capfd.readouterr().err
    assert "3/3" in shown
    assert "loss=" in shown
    assert "accuracy=" in shown
    tgt.fit(**make_run(), steps=3, evaluate=score)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"steps": -1}, "steps must be an integer >= 0, got -1"),
        ({"steps": 2.0}, "steps"),
        ({"accumulate": 0}, "accumulate must be an integer >= 1"),
        ({"accumulate": True}, "accumulate"),
        ({"eval_every": -1}, "eval_every"),
        ({"checkpoint_every": -2}, "checkpoint_every"),
        ({"clip_grad_norm": 0.0}, "clip_grad_norm"),
        ({"clip_grad_norm": math.nan}, "clip_grad_norm"),
        ({"mode": "best"}, "mode"),
        ({"resume": True}, "needs a checkpoint_dir"),
        ({"evaluate": score, "monitor": "loss"}, r"monitor is 'loss', but evaluate returned \['accuracy', 'noise'\]"),
        ({"loader": []}, "no batch"),
        ({"loader": iter([make_data()])}, "read only once"),
        ({"loader": [make_data() * 2]}, "the loader gave a tuple of 4"),
    ],
)
def test_bad_arguments(options: dict[str, Any], match: str) -> None:
    run = {**make_run(), "steps": 2, **options}
    with pytest.raises(ArgumentError, match=match):
        tgt.fit(**run)


def test_plateau_needs_an_evaluation() -> None:
    run = make_run()
    run["scheduler"] = lr_scheduler.ReduceLROnPlateau(run["optimizer"])
    with pytest.raises(ArgumentError, match="needs evaluate"):
        tgt.fit(**run, steps=2)


def test_folders_that_do_not_fit(tmp_path: Path) -> None:
    run = make_run()
    before = {name: value.clone() for name, value in run["student"].state_dict().items()}
    blocker = tmp_path / "file"
    blocker.write_text("")
    with pytest.raises(CheckpointError, match=r"cannot write to .*file"):
        tgt.fit(**run, steps=2, checkpoint_dir=blocker / "run")
    tgt.fit(**make_run(), steps=2, checkpoint_dir=tmp_path)
    with pytest.raises(ArgumentError, match="pass resume=True"):
        tgt.fit(**run, steps=2, checkpoint_dir=tmp_path)
    state = torch.get_rng_state()
    shorter = {**run, "seed": None, "loader": DataLoader(Augmented(5), batch_size=5, shuffle=True)}
    with pytest.raises(CheckpointError, match="the loader has 1 batches; the saved run had taken 2"):
        tgt.fit(**shorter, steps=4, checkpoint_dir=tmp_path, resume=True)
    assert torch.equal(torch.get_rng_state(), state)
    with pytest.raises(CheckpointError, match="generators are not those"):
        tgt.fit(**{**run, "loader": own_generator()}, steps=4, checkpoint_dir=tmp_path, resume=True)
    next(tmp_path.glob("checkpoint-*")).write_bytes(b"?")
    with pytest.raises(CheckpointError, match="damaged"):
        tgt.fit(**run, steps=4, checkpoint_dir=tmp_path, resume=True)
    assert all(torch.equal(before[name], value) for name, value in run["student"].state_dict().items())
