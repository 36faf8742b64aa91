"""Ctrl-C: what was changed is put back wherever it comes, and the command line ends with a line."""

from __future__ import annotations

import contextlib
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from interruptions import interrupted_at_each_instruction
from torch import nn
from training_kit import assert_same_weights, make_run

import tgt_fast as tgt
from tgt_fast import _rng, cli
from tgt_fast._rng import isolated_rng
from tgt_fast.errors import ArgumentError
from tgt_fast.explore import guard
from tgt_fast.report import output
from tgt_fast.teacher import modes

OURS = {module.__file__ for module in (_rng, guard, modes)}


def mixed() -> nn.Module:
    """In train mode, with a part in eval mode."""
    student = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Sequential(nn.Dropout(), nn.Linear(3, 2)))
    student[1].eval()
    return student


@pytest.mark.parametrize("files", [OURS, OURS | {contextlib.__file__}], ids=["ours", "contextlib"])
@pytest.mark.parametrize("enter", [modes.eval_mode, guard.preserve_student])
def test_a_student_has_its_modes_back(enter: Any, files: set[str | None]) -> None:
    student = mixed()
    flags = [module.training for module in student.modules()]

    def work() -> None:
        with enter(student):
            pass

    def check() -> None:
        assert [module.training for module in student.modules()] == flags

    assert interrupted_at_each_instruction(files, work, check) > 50


def test_the_generators_have_their_states_back() -> None:
    def draws() -> tuple[float, float, float]:
        return torch.rand(1).item(), float(np.random.rand()), random.random()

    before = _rng.get_rng_state()
    first = draws()

    def work() -> None:
        with isolated_rng(3):
            draws()

    def check() -> None:
        assert draws() == first
        _rng.set_rng_state(before)

    _rng.set_rng_state(before)
    assert interrupted_at_each_instruction({_rng.__file__}, work, check) > 50
    _rng.set_rng_state(before)


def test_an_interrupted_evaluation(tmp_path: Path) -> None:
    run = make_run()
    del run["scheduler"]

    def evaluate(student: nn.Module) -> dict[str, float]:
        assert not student.training
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tgt.fit(**run, steps=3, evaluate=evaluate, checkpoint_dir=tmp_path)
    assert all(module.training for module in run["student"].modules())
    assert list(tmp_path.iterdir()) == []
    tgt.fit(**make_run(), steps=1)  # it is nobody's turn any more


# ---- the command line ----


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT of one process")
@pytest.mark.parametrize("how", ["-m", "script"])
def test_while_packages_are_imported(how: str, tmp_path: Path, child_environment: dict[str, str]) -> None:
    script = tmp_path / "tgt-fast"
    script.write_text("import sys\nfrom tgt_fast.cli import main\nsys.exit(main())\n")
    words = ["-m", "tgt_fast"] if how == "-m" else [str(script)]
    early, late = ("tgt_fast._interrupted", "torch.nn.functional"), ("torch._C", "tgt_fast.errors")
    for last in early if how == "-m" else late:
        process = subprocess.Popen(
            [sys.executable, "-X", "importtime", *words, "doctor"],
            env=child_environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stderr is not None
        assert process.stdout is not None
        while line := process.stderr.readline():
            if line.split()[-1:] == [last]:
                break
        assert line, f"{last} is not imported"
        process.send_signal(signal.SIGINT)
        # Not by communicate(), which leaves out what was read ahead of the last line.
        errors, said = process.stderr.read(), process.stdout.read()
        process.wait(60)
        told = [line for line in errors.splitlines() if not line.startswith("import time:")]
        assert (process.returncode, told) == (130, ["tgt-fast: interrupted; no result was written"]), last
        assert said == ""


def test_the_package_alone_leaves_signals_as_they_are() -> None:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_what_was_written_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page, numbers = tmp_path / "index.html", tmp_path / "numbers.json"

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    def work(*_: Any) -> None:
        output.write_bytes(page, b"<html>")
        with monkeypatch.context() as patch:
            patch.setattr(output.os, "replace", interrupt)
            output.write_json(numbers, {})

    monkeypatch.setattr(cli, "_demo", work)
    assert cli.main(["demo", "digits"]) == 130
    assert capsys.readouterr().err == f"tgt-fast: interrupted; after it wrote {page}\n"
    monkeypatch.setattr(cli, "_demo", interrupt)
    assert cli.main(["demo", "digits"]) == 130
    assert capsys.readouterr().err == "tgt-fast: interrupted; no result was written\n"
    assert [path.name for path in tmp_path.iterdir()] == [page.name]


# ---- threads ----


def fit_in_a_thread(run: dict[str, Any], evaluate: Callable[[nn.Module], dict[str, float]] | None = None) -> Any:
    raised: list[BaseException] = []

    def work() -> None:
        try:
            tgt.fit(**run, steps=4, evaluate=evaluate)
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    return thread, raised


@pytest.mark.parametrize(("first", "second"), [(5, 6), (5, None), (None, 6), (None, None)])
def test_a_seeded_run_is_alone_in_its_process(first: int | None, second: int | None, one_thread: None) -> None:
    unbroken = make_run()
    tgt.fit(**unbroken, steps=4)
    arrived, go_on = threading.Event(), threading.Event()

    def wait(student: nn.Module) -> dict[str, float]:
        arrived.set()
        assert go_on.wait(60)
        return {"accuracy": 1.0}

    run = {**make_run(), "seed": first}
    thread, raised = fit_in_a_thread(run, wait)
    assert arrived.wait(60)
    try:
        if first is None and second is None:
            tgt.fit(**{**make_run(), "seed": second}, steps=2)
        else:
            with pytest.raises(ArgumentError, match="another thread is under way"):
                tgt.fit(**{**make_run(), "seed": second}, steps=2)
    finally:
        go_on.set()
        thread.join()
    assert raised == []
    if first is not None:
        assert_same_weights(run["student"], unbroken["student"])
    tgt.fit(**make_run(), steps=1)


def test_a_run_inside_a_run() -> None:
    def nested(student: nn.Module) -> dict[str, float]:
        tgt.fit(**make_run(), steps=1)
        return {"accuracy": 1.0}

    tgt.fit(**make_run(), steps=2, evaluate=nested)
