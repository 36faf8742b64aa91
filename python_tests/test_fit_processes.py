"""fit() with checkpoints in two processes: resumed equals unbroken, and what fails in one fails in both."""

from __future__ import annotations

import importlib
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_kit import forked
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler
from training_kit import Augmented, make_run, score

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, CheckpointError, TgtError
from tgt_fast.train import load_checkpoint

pytestmark = pytest.mark.skipif(
    not (hasattr(os, "fork") and torch.distributed.is_available()), reason="no fork, or no torch.distributed"
)

WORLD, STEPS = 2, 9


def two_processes(folder: Path, work: Callable[[int], Any]) -> list[Any]:
    """The results of ``work(rank)`` in each; None of a killed one."""
    importlib.import_module("torch._dynamo")  # once, and not in each process that needs it
    folder.mkdir(exist_ok=True)
    store = folder / f"store {len(list(folder.iterdir()))}"

    def run(rank: int) -> None:
        torch.distributed.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=WORLD)
        try:
            made = work(rank)
        except TgtError as error:
            made = error
        torch.save(made, folder / f"{rank}.pt")
        torch.distributed.destroy_process_group()

    results = [folder / f"{rank}.pt" for rank in range(WORLD)]
    for path in results:
        path.unlink(missing_ok=True)
    processes = [forked(run, rank) for rank in range(WORLD)]
    for process in processes:
        process.join(120)
        process.kill()
    return [torch.load(path, weights_only=False) if path.exists() else None for path in results]


def fit_in(checkpoint_dir: Path, rank: int, *, parallel: bool, mode: str | None = "persistent", **options: Any) -> Any:
    run = make_run(mode)
    student = run["student"]
    if parallel:
        run["student"] = DistributedDataParallel(student, broadcast_buffers=False)
        data = Augmented()
        sampler: Any = DistributedSampler(data, WORLD, rank, seed=3)
        run["loader"] = DataLoader(data, batch_size=4, sampler=sampler)
    run["seed"] += rank
    given = {"steps": STEPS, "checkpoint_every": 2, "evaluate": score, "eval_every": 4, "resume": True, **options}
    result = tgt.fit(**run, **given, checkpoint_dir=checkpoint_dir)
    return {"weights": student.state_dict(), "history": result.history, "best": result.best, "of": result.best_step}


def assert_same(one: Any, other: Any) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        if isinstance(value, dict):
            assert_same(value, other[name])
        else:
            assert torch.equal(value, other[name]) if isinstance(value, torch.Tensor) else value == other[name], name


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("parallel", [True, False], ids=["one student", "two students"])
def test_resumed_equals_unbroken(tmp_path: Path, parallel: bool) -> None:
    def unbroken(rank: int) -> Any:
        return fit_in(tmp_path / "unbroken", rank, parallel=parallel, resume=False)

    def broken(rank: int) -> Any:
        fit_in(tmp_path / "broken", rank, parallel=parallel, steps=4)
        fit_in(tmp_path / "broken", rank, parallel=parallel, steps=8)
        return fit_in(tmp_path / "broken", rank, parallel=parallel)

    expected, found = (two_processes(tmp_path / "results", work) for work in (unbroken, broken))
    for rank in range(WORLD):
        assert_same(found[rank], expected[rank])
    assert contents(tmp_path / "broken") == contents(tmp_path / "unbroken")
    assert len(contents(tmp_path / "broken")) == 4  # tensors of each process, the document, the best weights
    assert (expected[0]["history"] == expected[1]["history"]) == parallel  # means over those that train one student
    means = [expected[rank]["weights"]["1.running_mean"] for rank in range(WORLD)]
    assert not torch.equal(*means)
    weights = [expected[rank]["weights"]["0.weight"] for rank in range(WORLD)]
    assert torch.equal(*weights) == parallel


def test_what_is_shared_is_stored_once(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        fit_in(tmp_path / "run", rank, parallel=True, mode=None, evaluate=None)

    two_processes(tmp_path / "results", work)
    tensors = [safetensors_names(path) for path in (tmp_path / "run").glob("checkpoint-*")]
    whole, own = sorted(tensors, key=len, reverse=True)
    assert own < whole
    assert not [name for name in own if name.startswith("optimizer") or name.endswith("weight")]
    assert any(name.startswith("rng") for name in own)


def safetensors_names(path: Path) -> set[str]:
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return set(file.keys())


@pytest.mark.parametrize(("victim", "renames"), [(0, 1), (0, 6), (1, 4)])
def test_killed_while_saving(tmp_path: Path, victim: int, renames: int) -> None:
    def unbroken(rank: int) -> Any:
        return fit_in(tmp_path / "unbroken", rank, parallel=False)

    def killed(rank: int) -> None:
        left, replace = [renames], os.replace

        def dying(*names: Any) -> None:
            left[0] -= 1
            if rank == victim and left[0] < 0:
                os.kill(os.getpid(), signal.SIGKILL)
            replace(*names)

        os.replace = dying
        fit_in(tmp_path / "run", rank, parallel=False, checkpoint_every=1)

    def resumed(rank: int) -> Any:
        return fit_in(tmp_path / "run", rank, parallel=False)

    stopped = two_processes(tmp_path / "results", killed)
    assert stopped[victim] is None
    assert isinstance(stopped[1 - victim], CheckpointError)  # it does not wait for ever
    assert "do not come together" in str(stopped[1 - victim])
    expected, found = (two_processes(tmp_path / "results", work) for work in (unbroken, resumed))
    for rank in range(WORLD):
        assert_same(found[rank], expected[rank])
    assert contents(tmp_path / "run") == contents(tmp_path / "unbroken")


def test_what_fails_in_one_fails_in_both(tmp_path: Path) -> None:
    def failing(rank: int) -> None:
        if rank == 1:
            fsync, left = os.fsync, [4]

            def full(descriptor: int) -> None:
                left[0] -= 1
                if left[0] < 0:
                    raise OSError(28, "No space left on device")
                fsync(descriptor)

            os.fsync = full
        fit_in(tmp_path / "run", rank, parallel=False)

    first, second = two_processes(tmp_path / "results", failing)
    assert isinstance(first, CheckpointError)
    assert "in process 1 of 2: CheckpointError: cannot write to" in str(first)
    assert isinstance(second, CheckpointError)
    assert "No space left" in str(second)
    before = contents(tmp_path / "run")
    assert len([name for name in before if name.startswith("checkpoint-")]) == WORLD  # of the checkpoint before

    def refused(rank: int) -> list[bool]:
        run = make_run("persistent" if rank == 0 else None)
        student = {name: value.clone() for name, value in run["student"].state_dict().items()}
        with pytest.raises(CheckpointError, match="sampler"):
            tgt.fit(**run, steps=STEPS, checkpoint_dir=tmp_path / "run", resume=True)
        return [torch.equal(value, student[name]) for name, value in run["student"].state_dict().items()]

    for unchanged in two_processes(tmp_path / "results", refused):
        assert all(unchanged)
    assert contents(tmp_path / "run") == before


def test_another_number_of_processes(tmp_path: Path) -> None:
    two_processes(tmp_path / "results", lambda rank: fit_in(tmp_path / "run", rank, parallel=False, mode="random"))
    run = make_run()
    with pytest.raises(CheckpointError, match=r"saved by 2 processes.* the run has 1"):
        tgt.fit(**run, steps=STEPS, checkpoint_dir=tmp_path / "run", resume=True)
    with pytest.raises(CheckpointError, match="saved by 2 processes"):
        load_checkpoint(tmp_path / "run", student=run["student"])


def test_folders_of_their_own(tmp_path: Path) -> None:
    def work(rank: int) -> Any:
        return fit_in(tmp_path / f"run {rank}", rank, parallel=False, mode="random")

    two_processes(tmp_path / "results", work)
    for rank in range(WORLD):
        assert fit_in(tmp_path / f"run {rank}", rank, parallel=False, mode="random")["history"]  # alone


def test_no_folder_and_finished_folders(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        run = make_run()
        tgt.fit(**run, steps=1)  # nothing to agree on
        fit_in(tmp_path / "run", rank, parallel=False, steps=0)
        with pytest.raises(ArgumentError, match="holds a run's checkpoint"):
            fit_in(tmp_path / "run", rank, parallel=False, resume=False)

    assert two_processes(tmp_path / "results", work) == [None, None]
    assert len(contents(tmp_path / "run")) == WORLD + 1


def test_the_student_is_trained_on_the_data_of_both(tmp_path: Path) -> None:
    """The runs above do share gradients."""

    def alone(rank: int) -> nn.Module:
        return fit_in(tmp_path / f"run {rank}", rank, parallel=False, mode=None)["weights"]

    def both(rank: int) -> nn.Module:
        return fit_in(tmp_path / "run", rank, parallel=True, mode=None)["weights"]

    one, two = (two_processes(tmp_path / "results", work) for work in (alone, both))
    assert not torch.equal(one[0]["0.weight"], two[0]["0.weight"])
