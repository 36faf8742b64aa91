"""``tgt-fast cache``: build, go on, look, verify."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from cache_kit import RowWise, data, flip, same, shards
from test_cli import status

import tgt_fast as tgt

MODULE = """
import torch
from cache_kit import RowWise, data
from toys import vector_teacher, normal

ROWS = 12
SEEN = []


def teacher():
    made = RowWise()
    made.register_forward_pre_hook(lambda module, given: SEEN.append(len(given[0])))
    return made


def batches():
    for ids in torch.arange(ROWS).split(5):
        yield ids, data(40)[ids], None


def generator():
    return vector_teacher()


def vectors():
    return [(torch.arange(6), normal(6, 8))]


not_a_function = 3
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a user's module in it."""
    (tmp_path / "mine.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.delitem(sys.modules, "mine", raising=False)
    return tmp_path


def build(*more: str, teacher: str = "mine:teacher", rows: str = "mine:batches") -> int:
    return status("cache", "build", "labels", "--teacher", teacher, "--data", rows, *more)


def test_build_goes_on_where_it_was(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build("--topk", "4", "--temperature", "3", "--batch-size", "2") == 0
    assert "12 samples computed, 12 in labels" in capsys.readouterr().out
    mine = sys.modules["mine"]
    assert mine.SEEN == [2, 2, 1, 2, 2, 1, 2]
    mine.ROWS = 14
    assert build("--topk", "4", "--temperature", "3") == 0
    assert "2 samples computed, 14 in labels" in capsys.readouterr().out
    assert mine.SEEN[7:] == [2]
    with tgt.TeacherCache.open("labels") as cache:
        expected = tgt.topk_teacher(RowWise()(data(40)[5:7]), 4, 3.0)
        assert same(cache.read([5, 6]), expected)


def test_build_of_logits_and_latents(here: Path) -> None:
    options = ["--dense", "--latents", "--dtype", "bfloat16", "--teacher-version", "one"]
    assert build(*options, teacher="mine:generator", rows="mine:vectors") == 0
    with tgt.TeacherCache.open("labels") as cache:
        logits = cache.read(range(6))
        assert isinstance(logits, torch.Tensor)
        assert (logits.dtype, cache.latents([0]).z.shape) == (torch.bfloat16, (1, 4))
        assert (cache.fingerprint.parts["version"], cache.fingerprint.parts["k"]) == ("one", None)


def test_info_and_verify(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build("--topk", "4") == 0
    capsys.readouterr()
    assert status("cache", "info", "labels") == 0
    told = capsys.readouterr().out
    with tgt.TeacherCache.open("labels") as cache:
        assert cache.fingerprint in re.sub(r"[\s│]", "", told)
    for words in (
        r"samples\s*│ 12",
        r"shards\s*│ 1,",
        r"class_ids\s*│ int32 \(4,\) a sample, 16 bytes",
        r"torn\s*│ none",
    ):
        assert re.search(words, told), words
    assert status("cache", "verify", "labels") == 0
    assert "1 shards are whole, with 12 samples; 0 are torn" in capsys.readouterr().out
    torn = shards(Path("labels"))[0]
    flip(torn, -3)
    assert status("cache", "verify", "labels") == 1
    told = capsys.readouterr().out
    assert f"labels/{torn.name}: its checksum is wrong" in told
    assert "0 shards are whole, with 0 samples; 1 are torn" in told
    assert torn.exists()
    with pytest.warns(UserWarning, match="is torn"):
        assert build("--topk", "4") == 0
    assert "12 samples computed, 12 in labels" in capsys.readouterr().out
    assert status("cache", "verify", "labels") == 0
    assert status("cache", "info", "labels") == 0
    assert re.search(r"killed writers\s*│ 1", capsys.readouterr().out)


def test_what_cannot_be_done_is_one_line(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build() == 1  # 64 of 37 classes
    assert build("--topk", "4") == 0
    capsys.readouterr()
    cases = [
        (lambda: build("--topk", "5"), "they differ in k (stored 4, given 5)"),
        (lambda: build("--topk", "4", teacher="mine"), "expected package.module:factory, got 'mine'"),
        (lambda: build("--topk", "4", teacher="mine:nobody"), "--teacher: cannot load mine:nobody"),
        (lambda: build("--topk", "4", rows="nowhere:data"), "--data: cannot load nowhere:data: No module named"),
        (lambda: build("--topk", "4", rows="mine:not_a_function"), "must be a function without arguments"),
        (lambda: status("cache", "info", "none"), "there is no teacher cache in none"),
        (lambda: status("cache", "verify", "none"), "there is no teacher cache in none"),
    ]
    for run, words in cases:
        assert run() == 1
        told = capsys.readouterr().err
        assert told.startswith("tgt-fast: error: ")
        assert words in told
        assert told.count("\n") == 1
    for arguments in (["cache"], ["cache", "build", "labels"], ["cache", "burn", "labels"]):
        assert status(*arguments) == 2
    assert build("--topk", "4", "--dense") == 2


def test_as_a_module(here: Path) -> None:
    command = [sys.executable, "-m", "tgt_fast.cli", "cache", "build", "labels", "--topk", "4"]
    command += ["--teacher", "mine:teacher", "--data", "mine:batches"]
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": path})
    assert done.returncode == 0, done.stderr
    assert "12 samples computed, 12 in labels" in done.stdout
