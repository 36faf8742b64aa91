"""Files under names that nobody can guess, that no link leads elsewhere, and that no dead writer leaves behind."""

from __future__ import annotations

import os
import secrets
import signal
import stat
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from interruptions import interrupted_at_each_instruction
from torch import nn
from training_kit import FEATURES, make_run, make_student

import tgt_fast as tgt
from tgt_fast import _files
from tgt_fast._files import new_file, remove_dead
from tgt_fast.bench.profile import run_profile
from tgt_fast.demos.artifacts import Artifacts
from tgt_fast.errors import CheckpointError
from tgt_fast.report.output import prepare_folder, write_bytes, write_json
from tgt_fast.train import load_checkpoint, save_checkpoint, save_weights
from tgt_fast.train.files import make_writable

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.skipif(sys.platform == "win32", reason="links, fork and signals"),
]


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def umask() -> Iterator[None]:
    before = os.umask(0o027)
    yield
    os.umask(before)


# ---- writers ----


def write_cache(folder: Path) -> None:
    with tgt.TeacherCache(folder, nn.Linear(FEATURES, 4), k=None, version="v") as cache:
        cache.label(torch.ones(3, FEATURES), range(3))


def write_artifacts(folder: Path) -> None:
    artifacts = Artifacts(folder)
    artifacts.json("numbers", 1, lambda: [1, 2])
    artifacts.tensors("tensors", 1, lambda: torch.ones(2))


def write_weights(folder: Path) -> None:
    folder.mkdir(exist_ok=True)
    save_weights(folder / "best.safetensors", make_student().state_dict())


def write_trace(folder: Path) -> None:
    from rich.console import Console

    run_profile(folder, torch.device("cpu"), 1, "random", Console(quiet=True))


WRITERS: dict[str, Callable[[Path], Any]] = {
    "checkpoint": lambda folder: save_checkpoint(folder, student=make_student()),
    "weights": write_weights,
    "fit": lambda folder: tgt.fit(**make_run(), steps=1, checkpoint_dir=folder, evaluate=lambda _: {"accuracy": 1.0}),
    "cache": write_cache,
    "report": lambda folder: (prepare_folder(folder), write_bytes(folder / "a", b"a"), write_json(folder / "b", [1])),
    "artifacts": write_artifacts,
    "trace": write_trace,
}


@pytest.mark.parametrize("writer", WRITERS)
def test_permissions_are_those_of_the_umask(tmp_path: Path, writer: str, umask: None) -> None:
    WRITERS[writer](tmp_path / "new")
    found = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "new").iterdir()}
    assert found
    assert set(found.values()) == {0o640}


@pytest.mark.parametrize("writer", WRITERS)
def test_no_link_leads_a_writer_outside(tmp_path: Path, writer: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of whatever name is opened for writing, another was faster to make a link."""
    outside = tmp_path / "outside"
    outside.mkdir()
    original, trapped = os.open, []

    def trap(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        made = Path(os.fsdecode(path))
        if flags & os.O_CREAT and made.parent == tmp_path / "folder" and len(trapped) < 3:
            target = outside / str(len(trapped))
            target.write_bytes(b"mine")
            made.symlink_to(target)
            trapped.append(made)
        return original(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", trap)
    WRITERS[writer](tmp_path / "folder")
    assert len(trapped) == 3
    assert [path.read_bytes() for path in outside.iterdir()] == [b"mine"] * 3
    assert all(path.is_symlink() for path in trapped)


@pytest.mark.parametrize("writer", WRITERS)
def test_the_files_of_two_runs_have_no_name_in_common_before_they_are_whole(
    tmp_path: Path, writer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, made = os.open, []

    def watch(path: Any, flags: int, *rest: Any, **options: Any) -> int:
        if flags & os.O_CREAT and Path(os.fsdecode(path)).parent.parent == tmp_path:
            made.append(Path(os.fsdecode(path)).name)
            assert flags & os.O_EXCL
            assert flags & os.O_NOFOLLOW
        return original(path, flags, *rest, **options)

    monkeypatch.setattr(os, "open", watch)
    for folder in ("one", "two"):
        WRITERS[writer](tmp_path / folder)
    assert len(made) == len(set(made)) >= 2


@pytest.mark.parametrize("name", [".probe.tmp", ".checkpoint.json.tmp", ".checkpoint.safetensors.tmp"])
def test_links_of_once_predictable_names_are_left_alone(tmp_path: Path, name: str) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / name).symlink_to(outside)
    save_checkpoint(folder, student=make_student())
    assert outside.read_bytes() == b"mine"
    assert (folder / name).is_symlink()


def test_a_link_in_the_place_of_a_file_is_replaced_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("best.safetensors", "trace.json.gz"):
        (folder / name).symlink_to(outside)
    save_weights(folder / "best.safetensors", make_student().state_dict())
    write_trace(folder)
    assert outside.read_bytes() == b"mine"
    assert not any(path.is_symlink() for path in folder.iterdir())


# ---- the dead and the living ----


def killed_after(work: Callable[[], None]) -> None:
    pid = os.fork()
    if pid == 0:
        work()
        os.kill(os.getpid(), signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL


def half_written(folder: Path) -> None:
    def work() -> None:
        new = _files.NewFile(folder)
        new.open()
        new.file.write(b"x" * 100_000)

    killed_after(work)
    assert any(name.endswith(".tmp") for name in names(folder))


@pytest.mark.parametrize("writer", ["checkpoint", "weights", "fit", "cache", "report", "artifacts"])
def test_what_a_killed_writer_left_goes_with_the_next(tmp_path: Path, writer: str) -> None:
    for _ in range(3):
        half_written(tmp_path)
    WRITERS[writer](tmp_path)
    assert not [name for name in names(tmp_path) if name.endswith(".tmp")]


def test_a_kill_in_the_middle_of_the_tensors_leaves_no_name_but_ours(tmp_path: Path) -> None:
    """Each write to the disk in turn is the last."""
    left = set()
    for writes in range(6):
        folder = tmp_path / str(writes)
        save_checkpoint(folder, student=make_student(seed=1))
        kept = set(names(folder))

        def work(folder: Path = folder, writes: int = writes) -> None:
            countdown, original = [writes], os.fsync

            def dying(descriptor: int) -> None:
                if not countdown[0]:
                    os.kill(os.getpid(), signal.SIGKILL)
                countdown[0] -= 1
                original(descriptor)

            os.fsync = dying
            save_checkpoint(folder, student=make_student(seed=2))

        killed_after(work)
        left |= {name for name in set(names(folder)) - kept if not name.startswith("checkpoint-")}
        make_writable(folder)
        assert not [name for name in names(folder) if not name.startswith("checkpoint")]
        load_checkpoint(folder, student=make_student())
    assert left
    assert all(name.startswith(".tgt_fast_") for name in left)


def test_what_is_being_written_stays(tmp_path: Path) -> None:
    with new_file(tmp_path) as new:
        os.utime(new.place, (0, 0))
        remove_dead(tmp_path)
        make_writable(tmp_path)
        assert new.place.exists()
        new.take_name(tmp_path / "whole")
        remove_dead(tmp_path)
    assert names(tmp_path) == ["whole"]


def test_what_looks_like_ours_and_is_not_stays(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.write_bytes(b"mine")
    folder = tmp_path / "folder"
    folder.mkdir()
    half_written(folder)
    (pattern,) = names(folder)
    other = [pattern.replace(pattern[10:26], secrets.token_hex(8)) for _ in range(3)]
    (folder / other[0]).symlink_to(outside)
    os.mkfifo(folder / other[1])
    (folder / other[2]).mkdir()
    foreign = [".tmpAbCdEf", ".theirs.tmp", ".tgt_fast_.tmp", "tgt_fast_0123456789abcdef-.tmp"]
    for name in foreign:
        (folder / name).write_bytes(b"theirs")
        os.utime(folder / name, (0, 0))
    remove_dead(folder)
    assert names(folder) == sorted(other + foreign)
    assert outside.read_bytes() == b"mine"


def test_what_another_host_left_goes_when_it_is_old(tmp_path: Path) -> None:
    path = tmp_path / f".tgt_fast_{secrets.token_hex(8)}-elsewhere.tmp"
    path.write_bytes(b"half")
    remove_dead(tmp_path)
    assert path.exists()
    os.utime(path, (time.time() - 4000,) * 2)
    remove_dead(tmp_path)
    assert not path.exists()


def test_without_locks_age_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_locks(*_: Any) -> None:
        raise OSError(37, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    save_checkpoint(tmp_path / "run", student=make_student())
    half_written(tmp_path)
    (name,) = [name for name in names(tmp_path) if name.endswith(".tmp")]
    remove_dead(tmp_path)
    assert name in names(tmp_path)
    os.utime(tmp_path / name, (0, 0))
    remove_dead(tmp_path)
    assert name not in names(tmp_path)


def test_a_file_that_is_swept_before_it_is_locked_is_made_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, sweeps = _files._locked, iter([True, True])

    def late(descriptor: int) -> bool | None:
        if next(sweeps, False):
            with monkeypatch.context() as patch:
                patch.setattr(_files, "_locked", original)
                remove_dead(tmp_path)
        return original(descriptor)

    monkeypatch.setattr(_files, "_locked", late)
    with new_file(tmp_path) as new:
        new.file.write(b"whole")
        new.sync()
        new.take_name(tmp_path / "it")
    assert names(tmp_path) == ["it"]
    assert (tmp_path / "it").read_bytes() == b"whole"


def test_an_interruption_at_any_point_leaves_nothing(tmp_path: Path) -> None:
    """KeyboardInterrupt at every instruction of the code that makes and removes a file."""

    def make() -> None:
        with new_file(tmp_path) as new:
            new.file.write(b"x")

    def check() -> None:
        assert names(tmp_path) == []

    assert interrupted_at_each_instruction({_files.__file__}, make, check) > 50


# ---- what is written ----


def test_tensors_of_every_kind_come_back(tmp_path: Path) -> None:
    kinds = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.bool, torch.uint8, torch.int8]
    kinds += [torch.int16, torch.int32, torch.int64, torch.complex64]
    given = {str(kind): torch.arange(6).reshape(2, 3).to(kind) for kind in kinds}
    given |= {"empty": torch.empty(0, 3), "scalar": torch.tensor(2.5), "strided": torch.arange(12.0).reshape(3, 4).T}
    given |= {"conjugate": torch.tensor([1 + 2j, 3 - 1j]).conj(), "ünïcode": torch.ones(1)}
    save_weights(tmp_path / "w.safetensors", given)
    found = safetensors.torch.load_file(tmp_path / "w.safetensors")
    assert found.keys() == given.keys()
    for name, value in given.items():
        assert torch.equal(found[name], value), name
        assert found[name].dtype == value.dtype


@pytest.mark.parametrize(
    ("weights", "match"),
    [
        ({"x": torch.zeros(2, dtype=torch.complex128)}, "x is of torch.complex128"),
        ({"__metadata__": torch.zeros(1)}, "__metadata__"),
        ({"\ud800": torch.zeros(1)}, "no Unicode"),
    ],
)
def test_tensors_that_the_format_has_no_word_for(tmp_path: Path, weights: Any, match: str) -> None:
    with pytest.raises(CheckpointError, match=match):
        save_weights(tmp_path / "w.safetensors", weights)
    assert names(tmp_path) == []
