"""Checkpoints that are whole or not there at all, and that are refused when they are not what they should be."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import lr_scheduler
from training_kit import FEATURES, adam, assert_same_weights, make_data, make_student, make_teacher, train

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, CheckpointError
from tgt_fast.train import Checkpoint, load_checkpoint, save_checkpoint, save_weights
from tgt_fast.train.codec import encode
from tgt_fast.train.rng import get_rng_state

needs_linux = pytest.mark.skipif(sys.platform != "linux", reason="uses fork and resource limits")

pytestmark = pytest.mark.usefixtures("one_thread")


# ---- whole or not at all ----


def save_version(folder: Path, number: int) -> nn.Module:
    student = make_student(seed=number)
    save_checkpoint(folder, student=student, step=number, extra={"history": ["x" * 500] * number})
    return student


def loaded_version(folder: Path) -> int:
    """The number of the checkpoint in there, after checking that it is whole."""
    student = make_student(seed=77)
    loaded = load_checkpoint(folder, student=student)
    assert len(loaded.extra["history"]) == loaded.step
    assert_same_weights(student, make_student(seed=loaded.step))
    return loaded.step


def in_child(work: Callable[[], None]) -> int:
    """Run in a forked child; its exit code, negative for a signal."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
        finally:
            os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@needs_linux
def test_killed_while_saving(tmp_path: Path) -> None:
    """SIGKILL before each system call that a save makes through os, in turn: the old checkpoint or the new, whole."""
    outcomes = []
    for call in range(40):
        folder = tmp_path / str(call)
        save_version(folder, 1)

        def work(folder: Path = folder, left: int = call) -> None:
            countdown = [left]
            for name in ("replace", "fsync", "open", "close", "unlink"):
                original = getattr(os, name)

                def counted(*args: Any, original: Callable[..., Any] = original, **options: Any) -> Any:
                    if countdown[0] == 0:
                        os.kill(os.getpid(), signal.SIGKILL)
                    countdown[0] -= 1
                    return original(*args, **options)

                setattr(os, name, counted)
            save_version(folder, 2)

        code = in_child(work)
        outcomes.append((code, loaded_version(folder)))
        save_version(folder, 3)  # what the dead one left is in nobody's way, and is cleaned up
        assert loaded_version(folder) == 3
        assert len(list(folder.iterdir())) == 2
        if code == 0:
            break
    assert outcomes[-1] == (0, 2)
    assert set(outcomes[:-1]) == {(-signal.SIGKILL, 1), (-signal.SIGKILL, 2)}


@needs_linux
@pytest.mark.parametrize("limit", [100, 7_000, 20_000])  # in the tensors, twice; in the JSON
def test_disk_that_takes_no_more(tmp_path: Path, limit: int) -> None:
    save_version(tmp_path, 1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def work() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        try:
            save_version(tmp_path, 40)
        except CheckpointError as error:
            os._exit(3 if str(tmp_path) in str(error) else 4)

    assert in_child(work) == 3
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
    assert loaded_version(tmp_path) == 1


@pytest.mark.parametrize("failing", range(4))
def test_full_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing: int) -> None:
    """ENOSPC at each flush to the disk in turn."""
    save_version(tmp_path, 1)
    flushes = iter(range(100))
    original = os.fsync

    def full(descriptor: int) -> None:
        if next(flushes) == failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            save_version(tmp_path, 2)
    assert loaded_version(tmp_path) == (2 if failing == 3 else 1)  # the last flush follows the rename
    assert len(list(tmp_path.iterdir())) == 2
    save_version(tmp_path, 3)
    assert loaded_version(tmp_path) == 3


@pytest.mark.parametrize("read_only", [False, True])
def test_folder_that_cannot_be_written(tmp_path: Path, read_only: bool) -> None:
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    folder = Path("/proc/tgt") if read_only else blocker / "run"
    with pytest.raises(CheckpointError, match=str(folder)):
        save_checkpoint(folder, student=make_student())
    with pytest.raises(CheckpointError, match=str(folder)):
        save_weights(folder / "best.safetensors", make_student().state_dict())
    assert blocker.read_text() == "not a folder"


def test_weights_file_is_replaced_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "best.safetensors"
    save_weights(path, make_student(seed=1).state_dict())
    before = path.read_bytes()

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CheckpointError, match="No space left"):
        save_weights(path, make_student(seed=2).state_dict())
    assert path.read_bytes() == before
    assert len(list(tmp_path.iterdir())) == 1
    with pytest.raises(CheckpointError, match="_extra_state is a dict"):
        save_weights(path, {"_extra_state": {}})  # type: ignore[dict-item]


def test_one_checkpoint_a_folder_and_other_files_are_left_alone(tmp_path: Path) -> None:
    mine = [tmp_path / name for name in ("notes.txt", ".hidden.tmp", "checkpoint-mine.safetensors", "best.safetensors")]
    for path in mine:
        path.write_text("mine")
    for number in (1, 2, 2):
        save_version(tmp_path, number)
    assert all(path.read_text() == "mine" for path in mine)
    assert len(list(tmp_path.iterdir())) == len(mine) + 2


# ---- refused ----


class Live:
    """A run under way, and whether anything of it has changed."""

    def __init__(self, **options: Any) -> None:
        self.student = options.pop("student", None) or make_student(seed=50)
        self.optimizer = options.pop("optimizer", adam)(self.student)
        self.scheduler = lr_scheduler.CosineAnnealingLR(self.optimizer, 10)
        self.sampler = options.pop("sampler", None)
        train(self.student, self.optimizer, self.scheduler, 2)
        self.before = self._state()

    def _state(self) -> list[Any]:
        tensors: dict[str, Tensor] = {}
        parts = (self.student, self.optimizer, self.scheduler, self.sampler)
        states = [None if part is None else dict(part.state_dict()) for part in parts]
        structure = encode([*states, get_rng_state()], "live", tensors)
        return [structure, {name: value.numpy().tobytes() for name, value in tensors.items()}]

    def refuses(self, folder: Path, match: str, **changes: Any) -> None:
        parts = {name: getattr(self, name) for name in ("student", "optimizer", "scheduler", "sampler")}
        with pytest.raises(CheckpointError, match=match) as caught:
            load_checkpoint(folder, **{**parts, **changes})
        assert str(folder) in str(caught.value)
        assert self._state() == self.before


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    student = make_student(seed=3)
    optimizer = adam(student)
    scheduler = lr_scheduler.CosineAnnealingLR(optimizer, 10)
    train(student, optimizer, scheduler, 2)
    save_checkpoint(tmp_path, student=student, optimizer=optimizer, scheduler=scheduler, step=2)
    return tmp_path


def tensor_file(folder: Path) -> Path:
    (path,) = folder.glob("checkpoint-*.safetensors")
    return path


def flip(path: Path, place: float) -> None:
    data = bytearray(path.read_bytes())
    data[int(place * (len(data) - 1))] ^= 0x10
    path.write_bytes(bytes(data))


@pytest.mark.parametrize("place", [0.0, 0.01, 0.3, 0.6, 0.99, 1.0])
def test_flipped_bits(saved: Path, place: float) -> None:
    live = Live()
    path = tensor_file(saved)
    good = path.read_bytes()
    flip(path, place)
    live.refuses(saved, "damaged")
    path.write_bytes(good)
    flip(saved / "checkpoint.json", place)
    live.refuses(saved, r"checkpoint\.json")


@pytest.mark.parametrize("kept", [0.0, 0.5, 0.999])
def test_truncated(saved: Path, kept: float) -> None:
    live = Live()
    for path in (tensor_file(saved), saved / "checkpoint.json"):
        good = path.read_bytes()
        path.write_bytes(good[: int(kept * len(good))])
        live.refuses(saved, f"{path.name}.*damaged")
        path.write_bytes(good)


def rewritten(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Alter the document as someone would who also recomputes its hash."""
    path = folder / "checkpoint.json"
    document = json.loads(path.read_bytes())
    change(document)
    text = json.dumps(document["state"], separators=(",", ":"))
    document["state_sha256"] = hashlib.sha256(text.encode()).hexdigest()
    path.write_text(json.dumps(document))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda d: d.update(version=2), "version 2; this tgt_fast reads version 1"),
        (lambda d: d.update(format="lightning"), "not a checkpoint of tgt_fast"),
        (lambda d: d.update(tensors_sha256="../../etc/passwd"), "is no hash"),
        (lambda d: d.update(tensors_sha256="ab" * 32), "missing, though checkpoint.json names it"),
        (lambda d: d["state"].pop("student"), "not a training state"),
        (lambda d: d["state"].update(step="two"), "not a training state"),
        (lambda d: d["state"].update(step=-1), "not a training state"),
        (lambda d: d["state"].update(step=1.5), "not a training state"),
        (lambda d: d["state"].update(student=3), "not a training state"),
        (lambda d: d["state"].update(student=None), "not a training state"),
        (lambda d: d["state"].update(optimizer=3), "not a training state"),
        (lambda d: d["state"]["optimizer"].update(state={"dict": [["param_groups", None]]}), "not a training state"),
        (lambda d: d["state"].update(student={"float": "9" * 400 + "x"}), "not a training state"),
        (lambda d: d["state"].update(student={"tensor": [1]}), "not a training state"),
        (lambda d: d["state"].update(student={"dict": {"a": 1}}), "not a training state"),
        (lambda d: d["state"].update(student={"counter": [[[1], 2]]}), "not a training state"),
        (
            lambda d: d["state"].update(rng={"dict": [["torch", 1], ["python", {"tuple": [3, [10**30], None]}]]}),
            "refused",
        ),
        (lambda d: d["state"]["optimizer"].pop("kind"), "not a training state"),
        (lambda d: d["state"].update(student={"tensor": "nobody"}), "'nobody' is missing"),
        (lambda d: d["state"].update(student={"pickle": "gASVC"}), "unknown form"),
        (lambda d: d["state"].update(rng={"dict": [["torch", 1], ["python", 2]]}), "refused"),
        (lambda d: d["state"]["scheduler"].update(state=3), "refused"),
    ],
)
def test_foreign_documents(saved: Path, change: Callable[[dict[str, Any]], Any], match: str) -> None:
    live = Live()
    rewritten(saved, change)
    live.refuses(saved, match)


@pytest.mark.parametrize("text", ["", "[]", "null", '{"epoch": 3}', "[" * 100_000, "\x80abc"])
def test_files_of_other_programs(saved: Path, text: str) -> None:
    live = Live()
    (saved / "checkpoint.json").write_bytes(text.encode("latin-1"))
    live.refuses(saved, "checkpoint.json.*(damaged|not a checkpoint)")


@pytest.mark.parametrize("which", ["checkpoint.json", "tensors"])
def test_a_fifo_in_the_place_of_a_file(saved: Path, which: str) -> None:
    path = tensor_file(saved) if which == "tensors" else saved / which
    path.unlink()
    os.mkfifo(path)
    live = Live()
    live.refuses(saved, "no regular file")
    save_checkpoint(saved, student=live.student)
    load_checkpoint(saved, student=live.student)


def test_a_document_too_large_to_be_one(saved: Path) -> None:
    os.truncate(saved / "checkpoint.json", 5 << 30)
    Live().refuses(saved, "damaged.*larger than")


def test_tensors_that_are_none_of_ours(saved: Path) -> None:
    content = b"[" * 10_000
    digest = hashlib.sha256(content).hexdigest()
    rewritten(saved, lambda document: document.update(tensors_sha256=digest))
    (saved / f"checkpoint-{digest[:16]}.safetensors").write_bytes(content)
    Live().refuses(saved, "checkpoint-.*safetensors")


class Interrupted(torch.optim.Adam):
    """A user's Ctrl-C while its new state is taken."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        super().load_state_dict(state)
        if state["param_groups"][0]["initial_lr"] == 0.5:
            raise KeyboardInterrupt


def test_an_interruption_while_loading_changes_nothing(tmp_path: Path) -> None:
    def adam_of(lr: float) -> Callable[[nn.Module], torch.optim.Optimizer]:
        return lambda student: Interrupted(student.parameters(), lr=lr)

    old = Live(optimizer=adam_of(0.5))
    save_checkpoint(tmp_path, student=old.student, optimizer=old.optimizer, scheduler=None)
    live = Live(optimizer=adam_of(0.1))
    with pytest.raises(KeyboardInterrupt):
        load_checkpoint(tmp_path, student=live.student, optimizer=live.optimizer)
    assert live._state() == live.before


def itself() -> list[Any]:
    made: list[Any] = []
    made.append(made)
    return made


@pytest.mark.parametrize(
    ("wrong", "match"),
    [
        ({"extra": itself()}, "nested too deep"),
        ({"extra": 10**5000}, "cannot be stored"),
        ({"extra": {1.5: 1}}, "key of type float"),
        ({"step": -1}, "step"),
        ({"step": 1.5}, "step"),
        ({"step": "two"}, "step"),
    ],
)
def test_a_state_that_cannot_be_stored(tmp_path: Path, wrong: dict[str, Any], match: str) -> None:
    with pytest.raises((CheckpointError, ArgumentError), match=match):
        save_checkpoint(tmp_path, student=make_student(), **wrong)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_numbers_that_no_checkpoint_is_written_with(saved: Path, number: str) -> None:
    """Python's JSON reader takes them, its strict writer, which makes what is hashed, does not."""
    live = Live()
    path = saved / "checkpoint.json"
    path.write_text(path.read_text().replace('"step":2', f'"step":{number}', 1))
    live.refuses(saved, r"checkpoint\.json: damaged")


def test_a_callers_own_check_comes_before_any_change(saved: Path) -> None:
    def check(checkpoint: Checkpoint) -> None:
        assert (checkpoint.step, checkpoint.extra) == (2, None)
        raise CheckpointError("not mine")

    Live().refuses(saved, r"checkpoint\.json: not mine", check=check)


def test_no_checkpoint(tmp_path: Path) -> None:
    Live().refuses(tmp_path, "no checkpoint there")
    Live().refuses(tmp_path / "nowhere", "no checkpoint there")
    (tmp_path / "checkpoint.json").mkdir()
    Live().refuses(tmp_path, "cannot read")


def test_another_student(saved: Path) -> None:
    Live(student=make_student(batch_norm=False)).refuses(saved, "it lacks 3.weight, 3.bias and has .* too many")
    bigger = make_student()
    bigger.add_module("extra", nn.Linear(4, 4))
    wide = nn.Sequential(nn.Linear(FEATURES, 10), nn.BatchNorm1d(10), nn.Tanh(), nn.Dropout(), nn.Linear(10, 9))
    Live(student=wide).refuses(saved, r"4.weight \(checkpoint \(4, 10\) torch.float32, student \(9, 10\)")
    live = Live()
    live.refuses(saved, "lacks extra.weight, extra.bias and has nothing too many", student=bigger)
    live.refuses(saved, "torch.float64", student=make_student().double())


def test_another_optimizer_schedule_or_sampler(saved: Path) -> None:
    live = Live()
    live.refuses(
        saved, "its optimizer is a .*Adam, the run's is a .*SGD", optimizer=torch.optim.SGD(live.student.parameters())
    )
    live.refuses(saved, r"groups of \[6\] tensors, the run's of \[3, 3\]", optimizer=_adam_in_two(live.student))
    live.refuses(saved, "the checkpoint has a scheduler, the run has none", scheduler=None)
    live.refuses(saved, "CosineAnnealingLR, the run's is", scheduler=lr_scheduler.ExponentialLR(live.optimizer, 0.9))
    sampler = tgt.LatentSampler(make_teacher(), sigma=0.5)
    live.refuses(saved, "the run has a sampler, the checkpoint has none", sampler=sampler)


def _adam_in_two(student: nn.Module) -> torch.optim.Optimizer:
    parameters = list(student.parameters())
    return torch.optim.Adam([{"params": parameters[:3]}, {"params": parameters[3:]}])


def test_what_was_already_loaded_is_put_back(tmp_path: Path) -> None:
    """The last of the objects refuses; those before it had taken their new states."""

    class Refusing(torch.optim.Adam):
        def load_state_dict(self, state: dict[str, Any]) -> None:
            super().load_state_dict(state)
            if state["state"][0]["step"] == 2:
                raise ValueError("no, thank you")

    def parts(seed: int, steps: int) -> Live:
        sampler = tgt.LatentSampler(make_teacher(), sigma=0.5, seed=seed).calibrate([make_data()])
        live = Live(
            student=make_student(seed=seed),
            optimizer=lambda student: Refusing(student.parameters(), lr=0.1 * seed),
            sampler=sampler,
        )
        train(live.student, live.optimizer, live.scheduler, steps)
        live.before = live._state()
        return live

    old = parts(3, 0)
    save_checkpoint(
        tmp_path, student=old.student, optimizer=old.optimizer, scheduler=old.scheduler, sampler=old.sampler
    )
    torch.rand(1)
    parts(4, 5).refuses(tmp_path, "refused .no, thank you.; nothing was changed")


def test_a_sampler_of_another_mode_is_refused(tmp_path: Path) -> None:
    teacher = make_teacher()
    balanced = tgt.LatentSampler(teacher, anchors="balanced").calibrate([make_data()])
    save_checkpoint(tmp_path, student=make_student(), sampler=balanced)
    live = Live(sampler=tgt.LatentSampler(teacher))
    live.refuses(tmp_path, "anchors='batch'", optimizer=None, scheduler=None)


def test_a_copied_folder_loads(saved: Path, tmp_path_factory: pytest.TempPathFactory) -> None:
    copy = tmp_path_factory.mktemp("elsewhere") / "run"
    shutil.copytree(saved, copy)
    live = Live()
    load_checkpoint(copy, student=live.student, optimizer=live.optimizer, scheduler=live.scheduler)
    assert live._state() != live.before
