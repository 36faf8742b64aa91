"""``tgt-fast synthesize``: the same rows by any number of workers, and what becomes of those that fail."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cache_kit import forked
from test_cli import status

import tgt_fast as tgt
from tgt_fast import cli
from tgt_fast.errors import ProcessError
from tgt_fast.synthesis import command
from tgt_fast.synthesis.engines import local, torchrun

MODULE = """
import os, time, torch, toys
from torch.utils.data import DataLoader
import tgt_fast as tgt

def teacher():
    return toys.vector_teacher(prior="normal")

def pictures():
    return toys.image_teacher()

def sampler():
    return tgt.LatentSampler(toys.vector_teacher(), sigma=0.25, units="absolute", seed=4)

def student():
    return toys.student()

X = toys.normal(33, toys.FEATURES)

def batches():
    return DataLoader([(i, X[i]) for i in range(33)], batch_size=5, shuffle=True)

def images():
    return [(torch.arange(6), toys.normal(6, 1, 8, 8))]

def waiting():
    for number, batch in enumerate(batches()):
        if number == 3 and not os.path.exists("waits"):
            open("waits", "w").close()
            time.sleep(60)
        yield batch

class Deaf:
    # What a handler of signals raises while an object goes is lost.

    def __init__(self, number):
        self.number = number

    def __del__(self):
        os.kill(os.getpid(), self.number)
        for _ in range(10):
            time.sleep(0.001)

def deaf():
    for number, batch in enumerate(batches()):
        if number == 3 and not os.path.exists("deaf"):
            open("deaf", "w").close()
            Deaf(int(os.environ["SIGNAL"]))
        yield batch

def failing():
    for number, batch in enumerate(batches()):
        if number == 3:
            raise ValueError("the disk is gone")
        yield batch

class Mortal(torch.nn.Module):
    # Kills its process, once a folder, after some batches.

    def __init__(self):
        super().__init__()
        self.inner, self.left = toys.labeler(), 3

    def forward(self, x):
        self.left -= 1
        if self.left == 0 and not os.path.exists("died"):
            open("died", "w").close()
            os.kill(os.getpid(), 9)
        return self.inner(x)

def mortal():
    whole = toys.vector_teacher()
    return tgt.Teacher(whole.encoder, whole.decoder, Mortal(), prior="normal")

def killed():
    for number, batch in enumerate(batches()):
        if number == 4:
            os.kill(os.getpid(), 9)
        yield batch
"""
COMMON = ["--teacher", "mine:teacher", "--units", "absolute", "--sigma", "0.5", "--replicas", "2"]


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A working folder with a user's module in it."""
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    yield tmp_path
    assert torch.get_num_threads() == threads


@pytest.fixture
def forked_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Workers that are there at once, and need no second import of everything."""
    if not hasattr(os, "fork"):
        pytest.skip("no fork on this platform")
    context = local.multiprocessing.get_context("fork")
    monkeypatch.setattr(local.multiprocessing, "get_context", lambda kind: context)


def run(out: str, *more: str, data: str = "mine:batches") -> int:
    return status("synthesize", *COMMON, "--data", data, "--out", out, *more)


def content(out: str) -> list[Any]:
    rows = tgt.SyntheticDataset(out).read()
    return [rows.keys.tolist(), rows.x.tolist(), rows.labels.tolist()]


def test_all_numbers_of_workers_and_engines_give_the_same_rows(
    here: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("one") == 0
    assert "66 examples made, 0 were there, in one" in capsys.readouterr().out
    assert run("two", "--workers", "2", "--shard-bytes", "400") == 0
    assert "66 examples made, 0 were there, in two" in capsys.readouterr().out
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "3")
        assert run("three", "--engine", "torchrun") == 0
        assert f"rank {rank} of 3: " in capsys.readouterr().out
    assert content("one") == content("two") == content("three")
    assert len(content("one")[0]) == 66
    mine = sys.modules["mine"]
    sampler = tgt.LatentSampler(mine.teacher(), sigma=0.5, units="absolute")
    with command.threads(1):
        tgt.synthesize(sampler, mine.batches(), "four", replicas=2, progress=False)
    assert content("four") == content("one")


def test_torchrun_is_started_with_the_same_command(here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    class Process:
        def __init__(self, words: list[str], env: dict[str, str]) -> None:
            seen.append(words)
            self.code = len(seen) - 1

        def wait(self) -> int:
            return self.code

    monkeypatch.setattr(torchrun.subprocess, "Popen", Process)
    options = ["--engine", "torchrun", "--workers", "2", "--topk", "2", "--latents", "--max-entropy", "0.5"]
    assert run("out", *options) == 0
    words = seen[0]
    assert words[:5] == [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    assert words[5:8] == ["-m", "tgt_fast", "synthesize"]
    parsed = vars(cli._parser().parse_args(words[7:]))
    given = vars(cli._parser().parse_args(["synthesize", *COMMON, "--data", "mine:batches", "--out", "out", *options]))
    assert {**parsed, "workers": 2} == given
    assert run("out", *options) == 1  # its status is 1 the second time


def test_a_worker_that_fails_ends_all_and_what_was_made_is_kept(
    here: Path, forked_workers: None, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("folder", "--workers", "2", data="mine:failing") == 1
    told = capsys.readouterr().err
    assert re.search(r"error: synthesize: worker [01] failed: ValueError: the disk is gone", told)
    kept = len(tgt.SyntheticDataset("folder"))
    assert 0 < kept < 66
    assert run("folder") == 0
    assert f"{66 - kept} examples made, {kept} were there" in capsys.readouterr().out
    assert run("one") == 0
    assert content("folder") == content("one")


def test_a_worker_that_is_killed_is_named(here: Path, forked_workers: None) -> None:
    given = ["synthesize", *COMMON, "--data", "mine:killed", "--out", "folder", "--workers", "2", "--shard-bytes", "1"]
    with pytest.raises(ProcessError, match=r"worker [01] was killed by signal 9.*run it again to go on"):
        local.run(command.job_of(vars(cli._parser().parse_args(given))), 2, progress=False)
    assert 0 < len(tgt.SyntheticDataset("folder")) < 66
    assert run("folder") == 0
    assert run("one") == 0
    assert content("folder") == content("one")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this platform")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("data", ["waiting", "deaf"])
def test_an_interruption_keeps_what_was_made(
    here: Path, number: int, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SIGNAL", str(int(number)))

    def work() -> None:
        signal.signal(signal.SIGINT, signal.default_int_handler)
        os._exit(run("folder", data=f"mine:{data}"))

    process = forked(work)
    if data == "waiting":
        while not Path("waits").exists():
            time.sleep(0.01)
        os.kill(process.pid or 0, number)
    process.join(60)
    assert process.exitcode == 130
    assert len(tgt.SyntheticDataset("folder")) == 3 * 5 * 2
    assert run("folder", data=f"mine:{data}") == 0
    assert run("one") == 0
    assert content("folder") == content("one")


def test_the_unit_is_measured_once_a_folder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["synthesize", "--teacher", "mine:teacher", "--data", "mine:batches", "--sigma", "0.5", "--out", "folder"]
    assert status(*words, "--calibrate", "2") == 0
    assert (here / "folder" / "scale.safetensors").exists()
    assert status(*words, "--calibrate", "5") == 0
    assert "0 examples made, 33 were there" in capsys.readouterr().out
    assert status(*words[:-1], "other", "--calibrate", "5") == 0
    parts = [tgt.SyntheticDataset(name).fingerprint.parts for name in ("folder", "other")]
    assert [name for name in parts[0] if parts[0][name] != parts[1][name]] == ["scale"]


def test_options_reach_the_sampler(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--mode", "gradient", "--student", "mine:student", "--steps", "2", "--step-size", "0.5", "--radius", "3"]
    options += ["--step-noise", "0.1", "--divergence", "reverse_kl", "--temperature", "2", "--seed", "9", "--topk", "2"]
    assert run("folder", *options, "--latents", "--step", "3", "--max-distance", "2.5") == 0
    assert "dropped by distance" in capsys.readouterr().out
    data = tgt.SyntheticDataset("folder")
    wanted = {
        "mode": "gradient", "steps": 2, "step_size": 0.5, "radius": 3.0, "step_noise": 0.1, "divergence": "reverse_kl",
        "temperature": 2.0, "seed": 9, "k": 2, "latents": True, "max_distance": 2.5, "sigma": 0.5,
    }  # fmt: skip
    assert {name: data.fingerprint.parts[name] for name in wanted} == wanted
    assert data.keys[:, 2].unique().tolist() == [3]
    own = ["synthesize", "--teacher", "mine:sampler", "--data", "mine:batches", "--out", "own"]
    assert status(*own) == 0
    assert tgt.SyntheticDataset("own").fingerprint.parts["sigma"] == 0.25


def test_a_preview_stores_nothing(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--teacher", "mine:pictures", "--data", "mine:images", "--units", "absolute", "--out", "folder"]
    assert status("synthesize", *words, "--preview", "4", "--max-entropy", "1.09") == 0
    told = capsys.readouterr().out
    assert re.search(r"│ 3 +│ 3 +│ 0 +│ [012] +│ 0\.\d{3}", told)
    assert "no: entropy" in told
    assert [path.name for path in Path("folder").iterdir()] == ["preview.png"]
    assert run("folder", "--preview", "70") == 0  # no pictures
    assert re.search(r"│ 65 +│ \d+ +│ 1 ", capsys.readouterr().out)


def test_what_cannot_be_done_is_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("folder") == 0
    capsys.readouterr()
    own = ["synthesize", "--teacher", "mine:sampler", "--data", "mine:batches", "--out", "own", "--step-size", "1"]
    cases = [
        (lambda: run("folder", "--seed", "1"), "they differ in seed (stored 0, given 1)"),
        (lambda: run("folder", "--mode", "gradient"), "pass student="),
        (lambda: run("folder", "--workers", "0"), "--workers must be"),
        (lambda: run("folder", "--preview", "0"), "--preview must be"),
        (lambda: run("folder", "--threads", "0"), "--threads must be"),
        (lambda: run("folder", data="mine:nothing"), "--data: cannot load mine:nothing"),
        (lambda: run("folder", data="mine:sampler"), "must give batches"),
        (lambda: status(*own), "options of its own; leave out --step-size"),
        (lambda: status(*own[:2], "mine:student", *own[3:-2]), "must give a tgt_fast.Teacher or LatentSampler"),
    ]
    for do, words in cases:
        assert do() == 1
        told = capsys.readouterr().err
        assert told.startswith("tgt-fast: error: ")
        assert words in told
        assert told.count("\n") == 1
    assert status("synthesize", "--out", "folder") == 2


def test_a_pipeline_of_ray_gives_the_same_rows_also_where_an_actor_is_killed(
    here: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    child_environment: dict[str, str],
) -> None:
    ray = pytest.importorskip("ray", reason="needs Ray: tgt-fast[ray]")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # the machine may have other work
    monkeypatch.setenv("PYTHONPATH", child_environment["PYTHONPATH"])
    ray.init(num_cpus=6, include_dashboard=False, logging_level="error", log_to_driver=False)
    try:
        words = ["synthesize", "--data", "mine:batches", "--units", "absolute", "--sigma", "0.5", "--replicas", "2"]
        words += ["--engine", "ray", "--workers", "2", "--out", "folder", "--teacher"]
        assert status(*words, "mine:mortal", "--shard-bytes", "2000") == 0
        assert (here / "died").exists()
        told = capsys.readouterr().out
        assert re.search(r"\d+ examples made, \d+ were there, in", told)
        assert status(*words, "mine:mortal") == 0
        assert "0 examples made, 66 were there" in capsys.readouterr().out
        assert status(*words[:-2], "files", "--teacher", "mine:teacher", "--format", "parquet") == 0
        assert status(*words[:2], "mine:failing", *words[3:], "mine:mortal", "--step", "1") == 1
        assert "ValueError: the disk is gone" in capsys.readouterr().err
    finally:
        ray.shutdown()
    assert run("one") == 0
    assert content("one") == content("folder") == content("files")


def test_an_address_in_the_place_of_a_folder(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("pyarrow", reason="needs pyarrow: tgt-fast[parquet]")
    words = ["synthesize", "--teacher", "mine:teacher", "--data", "mine:batches", "--format", "parquet", "--out"]
    for out in ("here", "memory://command/there", "memory://command/there"):
        assert status(*words, out, "--calibrate", "3") == 0
    assert "0 examples made, 33 were there, in memory://command/there" in capsys.readouterr().out
    assert content("here") == content("memory://command/there")
