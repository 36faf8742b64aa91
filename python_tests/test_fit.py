"""fit(): it learns, it can be killed and resumed to the same bits, and it disturbs nothing around it."""

from __future__ import annotations

import errno
import math
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from training_kit import (
    Augmented,
    Numbered,
    assert_same_weights,
    make_data,
    make_run,
    make_student,
    make_teacher,
)

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, CheckpointError
from tgt_fast.train import FitResult, evaluate, load_checkpoint
from tgt_fast.train.data import BatchStream
from tgt_fast.train.rng import get_rng_state, isolated_rng


def score(student: nn.Module) -> dict[str, float]:
    """A metric that also draws random numbers, as a careless one does."""
    noise = torch.rand(1).item() * 0 + random.random() * 0 + np.random.rand() * 0
    x, y = make_data()
    return {**evaluate(student, None, [(x, y)]), "noise": noise}


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


# ---- killed and resumed ----


def own_generator() -> DataLoader:
    return DataLoader(Augmented(), batch_size=5, shuffle=True, generator=torch.Generator().manual_seed(3))


def sampler_generator() -> DataLoader:
    data = Augmented()
    sampler = RandomSampler(data, replacement=True, generator=torch.Generator().manual_seed(4))
    return DataLoader(data, batch_sampler=BatchSampler(sampler, 5, drop_last=True))


class EpochSampler(RandomSampler):
    """Shuffles by its epoch, as a DistributedSampler does."""

    epochs: tuple[int, ...] = ()

    def set_epoch(self, epoch: int) -> None:
        self.epochs += (epoch,)

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.RandomState(self.epochs[-1]).permutation(len(self)).tolist())


LOADERS: dict[str, Callable[[], Any]] = {
    "global generator": lambda: DataLoader(Augmented(), batch_size=5, shuffle=True),
    "own generator": own_generator,
    "sampler's generator": sampler_generator,
    "set_epoch": lambda: DataLoader(Augmented(), batch_size=5, sampler=EpochSampler(range(22))),
    "workers": lambda: DataLoader(Augmented(), batch_size=11, shuffle=True, num_workers=1),
    "list": lambda: list(DataLoader(Numbered(), batch_size=5)),
}


class Killed(BaseException):
    """What no handler in the library catches."""


def assert_resumes(tmp_path: Path, start: Callable[[], dict[str, Any]], stops: list[int], **options: Any) -> None:
    """A run that dies in the step after each stop, resumed each time in objects of its own, against one unbroken."""
    steps = stops[-1] + 2
    unbroken = start()
    expected = tgt.fit(**unbroken, steps=steps, **options)
    options.update(steps=steps, checkpoint_dir=tmp_path, checkpoint_every=1, resume=True)
    for taken, stop in zip([0, *stops], stops, strict=False):
        run = start()
        left = iter(range(stop - taken))

        def die(*_: Any, left: Iterator[int] = left) -> None:
            if next(left, None) is None:
                raise Killed

        run["optimizer"].register_step_pre_hook(die)
        with pytest.raises(Killed):
            tgt.fit(**run, **options)
    run = start()
    result = tgt.fit(**run, **options)
    assert_same_weights(run["student"], unbroken["student"])
    assert (result.steps, result.history) == (steps, expected.history)
    assert (result.best_step, result.best_score) == (expected.best_step, expected.best_score)


@pytest.mark.parametrize("loader", LOADERS)
def test_resumed_equals_unbroken_for_every_way_of_shuffling(tmp_path: Path, loader: str) -> None:
    """Stops inside an epoch, at its end (5 batches; 4 with drop_last), and after an evaluation."""
    stops = [2, 3] if loader == "workers" else [3, 4, 5, 13]
    assert_resumes(tmp_path, lambda: make_run(loader=LOADERS[loader]()), stops)


def test_a_sampler_is_told_each_epoch() -> None:
    run = make_run(loader=LOADERS["set_epoch"]())
    tgt.fit(**run, steps=11)  # of 5 batches
    assert run["loader"].sampler.epochs == (0, 1, 2)


@pytest.mark.parametrize("mode", [None, "prior", "gradient", "persistent"])
def test_resumed_equals_unbroken_for_every_sampler(tmp_path: Path, mode: str | None) -> None:
    assert_resumes(tmp_path, lambda: make_run(mode), [7, 13])


def test_resumed_equals_unbroken_with_accumulation_and_evaluation(tmp_path: Path) -> None:
    """Three batches a step do not divide the five of an epoch; the evaluation draws from the loader's own generator."""

    def start() -> dict[str, Any]:
        run = make_run(loader=own_generator())
        loader = run["loader"]

        def judge(student: nn.Module) -> dict[str, float]:
            return {"accuracy": evaluate(student, None, loader)["accuracy"]}

        return {**run, "evaluate": judge}

    assert_resumes(tmp_path, start, [4, 8, 14], accumulate=3, eval_every=2, clip_grad_norm=0.5)


def test_resumed_without_a_seed_moves_the_global_generators_alike(tmp_path: Path) -> None:
    def start() -> dict[str, Any]:
        return {**make_run(), "seed": None}

    with isolated_rng(1):
        unbroken = start()
        tgt.fit(**unbroken, steps=12)
        after = torch.rand(2)
    with isolated_rng(1):
        tgt.fit(**start(), steps=7, checkpoint_dir=tmp_path)
    with isolated_rng(2):
        run = start()
        tgt.fit(**run, steps=12, checkpoint_dir=tmp_path, resume=True)
        assert torch.equal(torch.rand(2), after)
    assert_same_weights(run["student"], unbroken["student"])


def test_the_order_matters_to_these_tests() -> None:
    """Another order of the data, or other random numbers, do give other weights."""
    one, other = make_run(), make_run()
    other["seed"] = 6
    tgt.fit(**one, steps=7)
    tgt.fit(**other, steps=7)
    assert not torch.equal(one["student"][0].weight, other["student"][0].weight)


CHILD = """
import os, signal, sys, time
import torch
import tgt_fast as tgt
from training_kit import make_run

torch.set_num_threads(1)
folder, mode = sys.argv[1], sys.argv[2]
if mode.startswith("die at rename"):
    left, replace = [int(mode.split()[-1])], os.replace

    def dying(*names):
        left[0] -= 1
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(*names)

    os.replace = dying
run = make_run("gradient")
if mode == "slow":
    step = run["optimizer"].step
    run["optimizer"].step = lambda: (time.sleep(0.02), step())[1]
tgt.fit(**run, steps=40, checkpoint_dir=folder, checkpoint_every=2, resume=True, evaluate=lambda s: {"accuracy": 1.0},
        eval_every=3)
"""


def child(folder: Path, mode: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    here = str(Path(__file__).parent)
    paths = os.pathsep.join([here, environment["PYTHONPATH"]])
    return subprocess.Popen([sys.executable, "-c", CHILD, str(folder), mode], env={**environment, "PYTHONPATH": paths})


@pytest.mark.skipif(sys.platform == "win32", reason="SIGKILL")
def test_killed_and_resumed(tmp_path: Path, child_environment: dict[str, str]) -> None:
    """SIGKILL at any moment, then SIGKILL while saving, then to the end: the same bits."""
    process = child(tmp_path, "slow", child_environment)
    deadline = time.monotonic() + 60
    while not (tmp_path / "checkpoint.json").exists():
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.005)
    time.sleep(0.1)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert child(tmp_path, "die at rename 5", child_environment).wait(60) == -signal.SIGKILL
    step = load_checkpoint(tmp_path, **_parts(make_run("gradient"))).step
    assert 0 < step < 40

    resumed, unbroken = make_run("gradient"), make_run("gradient")
    options: dict[str, Any] = {"steps": 40, "evaluate": lambda student: {"accuracy": 1.0}, "eval_every": 3}
    result = tgt.fit(**resumed, **options, checkpoint_dir=tmp_path, resume=True)
    expected = tgt.fit(**unbroken, **options)
    assert_same_weights(resumed["student"], unbroken["student"])
    assert result.history == expected.history
    assert result.best_step == expected.best_step == 3


def _parts(run: dict[str, Any]) -> dict[str, Any]:
    return {
        "student": run["student"],
        "optimizer": run["optimizer"],
        "scheduler": run["scheduler"],
        "sampler": run["objective"].sampler,
        "data": BatchStream(run["loader"]),
    }


def test_a_finished_run_resumes_to_its_result(tmp_path: Path) -> None:
    run = make_run()
    result = tgt.fit(**run, steps=6, evaluate=score, eval_every=3, checkpoint_dir=tmp_path)
    again = make_run()
    found = tgt.fit(**again, steps=6, evaluate=score, eval_every=3, checkpoint_dir=tmp_path, resume=True)
    assert_same_weights(again["student"], run["student"])
    assert found.history == result.history
    assert found.steps == 6
    assert found.best_step == result.best_step
    assert found.best is not None
    assert result.best is not None
    assert all(torch.equal(found.best[name], value) for name, value in result.best.items())


def test_resume_starts_anew_where_nothing_is_saved(tmp_path: Path) -> None:
    run, other = make_run(), make_run()
    tgt.fit(**run, steps=4, checkpoint_dir=tmp_path / "new" / "folder", resume=True)
    tgt.fit(**other, steps=4)
    assert_same_weights(run["student"], other["student"])


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
    before = get_rng_state()
    run = make_run()
    run["loader"] = None
    with pytest.raises(TypeError):
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


def test_a_disk_that_fills_up_during_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error is clear, the last checkpoint is whole, and the run can be resumed when there is room."""
    original, flushes = os.fsync, iter(range(1000))

    def full(descriptor: int) -> None:
        if next(flushes) >= 9:  # two checkpoints of four flushes each are saved
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            tgt.fit(**make_run(), steps=10, checkpoint_dir=tmp_path, checkpoint_every=2)
    resumed, unbroken = make_run(), make_run()
    assert load_checkpoint(tmp_path, **_parts(make_run())).step == 4
    tgt.fit(**resumed, steps=10, checkpoint_dir=tmp_path, resume=True)
    tgt.fit(**unbroken, steps=10)
    assert_same_weights(resumed["student"], unbroken["student"])
