"""Runs that are killed and resumed, to the same bits as runs that are not."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from programs import ran
from torch import Tensor, nn
from torch.utils.data import BatchSampler, DataLoader, RandomSampler
from training_kit import (
    Augmented,
    Numbered,
    assert_same_weights,
    make_run,
    own_generator,
    score,
)

import tgt_fast as tgt
from tgt_fast.errors import CheckpointError
from tgt_fast.train import evaluate, load_checkpoint, save_checkpoint
from tgt_fast.train.codec import encode
from tgt_fast.train.data import BatchStream
from tgt_fast.train.rng import get_rng_state, isolated_rng

pytestmark = pytest.mark.usefixtures("one_thread")


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


def persistent(**options: Any) -> DataLoader:
    return DataLoader(
        Numbered(), batch_size=5, shuffle=True, num_workers=2, persistent_workers=True, prefetch_factor=1, **options
    )


LOADERS: dict[str, Callable[[], Any]] = {
    "global generator": lambda: DataLoader(Augmented(), batch_size=5, shuffle=True),
    "own generator": own_generator,
    "sampler's generator": sampler_generator,
    "set_epoch": lambda: DataLoader(Augmented(), batch_size=5, sampler=EpochSampler(range(22))),
    "workers": lambda: DataLoader(Augmented(), batch_size=11, shuffle=True, num_workers=1),
    "persistent workers": lambda: persistent(),
    "persistent workers, own generator": lambda: persistent(generator=torch.Generator().manual_seed(3)),
    "list": lambda: list(DataLoader(Numbered(), batch_size=5)),
}


class Killed(BaseException):
    """An error that no handler in the library catches."""


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
    stops = {"workers": [2, 3]}.get(loader, [8, 13] if "persistent" in loader else [3, 4, 5, 13])
    assert_resumes(tmp_path, lambda: make_run(loader=LOADERS[loader]()), stops)


def seen_by(stream: BatchStream, batches: int) -> list[list[int]]:
    return [stream.take()[0].tolist() for _ in range(batches)]


@pytest.mark.parametrize("used_before", [False, True])
def test_an_interrupted_epoch_of_persistent_workers_meets_every_sample_once(used_before: bool) -> None:
    """In a new process their first epoch, and in an old one that has read the loader before."""
    with isolated_rng(1):
        stream = BatchStream(persistent())
        whole = seen_by(stream, 15)  # three epochs of five
    with isolated_rng(1):
        stream = BatchStream(persistent())
        assert seen_by(stream, 8) == whole[:8]
        state = stream.state_dict()
    other = persistent()
    if used_before:
        list(other)
    with isolated_rng(2):
        stream = BatchStream(other)
        stream.load_state_dict(state)
        rest = seen_by(stream, 2)
    assert rest == whole[8:10]
    assert sorted(number for batch in whole[5:8] + rest for number in batch) == list(range(22))


def test_the_order_does_not_depend_on_whether_persistent_workers_run_already() -> None:
    loader, orders = persistent(), []
    for _ in range(2):
        with isolated_rng(1):
            orders.append(seen_by(BatchStream(loader), 7))
    assert orders[0] == orders[1]


@pytest.mark.parametrize("read", [2, 5])
def test_another_reader_of_persistent_workers_does_not_end_the_epoch(read: int) -> None:
    """They serve one reader at a time: an evaluation on the loader of the training takes them over."""
    with isolated_rng(1):
        whole = seen_by(BatchStream(persistent()), 15)
        after = torch.rand(1)
    with isolated_rng(1):
        loader = persistent()
        stream = BatchStream(loader)
        found = []
        for count in (3, 2, 4, 6):
            found += seen_by(stream, count)
            with isolated_rng():
                for _, _ in zip(range(read), loader, strict=False):
                    pass
        assert found == whole
        assert torch.equal(torch.rand(1), after)


def test_a_sampler_is_told_each_epoch() -> None:
    run = make_run(loader=LOADERS["set_epoch"]())
    tgt.fit(**run, steps=11)  # of 5 batches
    assert run["loader"].sampler.epochs == (0, 1, 2)


@pytest.mark.parametrize("mode", [None, "prior", "gradient", "persistent", "replay-random"])
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


def test_tensors_that_a_killed_run_did_not_come_to_remove(tmp_path: Path) -> None:
    """They go even if nothing is left to do, and so nothing is saved."""
    tgt.fit(**make_run(), steps=3, checkpoint_dir=tmp_path)
    whole = sorted(tmp_path.iterdir())
    (tmp_path / "checkpoint-0123456789abcdef.safetensors").write_bytes(b"older tensors")
    tgt.fit(**make_run(), steps=3, checkpoint_dir=tmp_path, resume=True)
    assert sorted(tmp_path.iterdir()) == whole


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

sys.path.insert(0, sys.argv[4])
from training_kit import make_run

torch.set_num_threads(int(sys.argv[3]))
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
    run["optimizer"].register_step_pre_hook(lambda *_: time.sleep(0.02))
tgt.fit(**run, steps=40, checkpoint_dir=folder, checkpoint_every=2, resume=True, evaluate=lambda s: {"accuracy": 1.0},
        eval_every=3)
"""


def words(folder: Path, mode: str) -> tuple[str, ...]:
    return str(folder), mode, str(torch.get_num_threads()), str(Path(__file__).parent)


def child(folder: Path, mode: str, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", CHILD, *words(folder, mode)], env=environment)


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
    dying = ran(CHILD, *words(tmp_path, "die at rename 5"), environment=child_environment, timeout=60)
    assert dying.returncode == -signal.SIGKILL
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


GOOD = {"sums": {}, "summed": 0, "history": [], "best": None, "best_step": None, "best_score": None}


@pytest.mark.parametrize(
    ("extra", "match"),
    [
        (None, "not saved by fit: its extra holds NoneType"),
        ({"epoch": 3}, r"not saved by fit: its extra holds \['epoch'\]"),
        ({**GOOD, "history": None}, "'history'"),
        ({**GOOD, "history": [1]}, "'history'"),
        ({**GOOD, "sums": {"loss": 1.0}}, "'sums'"),
        ({**GOOD, "summed": "7"}, "'summed'"),
        ({**GOOD, "best": [1]}, "'best'"),
    ],
)
def test_a_checkpoint_of_another_loop_is_refused_and_changes_nothing(tmp_path: Path, extra: Any, match: str) -> None:
    other = _parts(make_run())
    torch.nn.init.ones_(other["student"][0].weight)
    save_checkpoint(tmp_path, **other, step=3, extra=extra)
    run, same = make_run(), make_run()
    run["seed"] = None
    before = get_rng_state()
    with pytest.raises(CheckpointError, match=match):
        tgt.fit(**run, steps=5, checkpoint_dir=tmp_path, resume=True)
    assert_same_weights(run["student"], same["student"])
    assert run["optimizer"].state_dict() == same["optimizer"].state_dict()
    now: dict[str, Tensor] = {}
    then: dict[str, Tensor] = {}
    assert encode(get_rng_state(), "rng", now) == encode(before, "rng", then)
    assert all(torch.equal(now[name], value) for name, value in then.items())
    assert load_checkpoint(tmp_path, **other).extra == extra


def test_a_run_of_no_steps_is_saved_too(tmp_path: Path) -> None:
    run, unbroken = make_run(), make_run()
    tgt.fit(**run, steps=0, checkpoint_dir=tmp_path)
    assert load_checkpoint(tmp_path, **_parts(make_run())).step == 0
    other = make_run()
    torch.nn.init.ones_(other["student"][0].weight)
    tgt.fit(**other, steps=3, checkpoint_dir=tmp_path, resume=True)
    tgt.fit(**unbroken, steps=3)
    assert_same_weights(other["student"], unbroken["student"])


def test_resume_starts_anew_where_nothing_is_saved(tmp_path: Path) -> None:
    run, other = make_run(), make_run()
    tgt.fit(**run, steps=4, checkpoint_dir=tmp_path / "new" / "folder", resume=True)
    tgt.fit(**other, steps=4)
    assert_same_weights(run["student"], other["student"])


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
