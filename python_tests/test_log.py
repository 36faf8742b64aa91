"""fit(log=): what is written, when, and what a kill leaves; bars beside long work."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from training_kit import assert_same_weights, make_data, make_run, make_student, make_teacher, score

import tgt_fast as tgt
from tgt_fast.errors import ArgumentError, CheckpointError
from tgt_fast.train import evaluate, log


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / log.NAME).read_text().splitlines()]


def test_a_log_tells_the_run_and_changes_nothing(tmp_path: Path) -> None:
    logged, silent = make_run(), make_run()
    options = {"steps": 6, "evaluate": score, "eval_every": 4}
    seen: list[dict[str, float]] = []
    result = tgt.fit(
        **logged, **options, log=tmp_path / "runs" / "1",
        callbacks=[lambda event, run: seen.append(dict(run.losses)) if event == "step" else None],
    )  # fmt: skip
    assert tgt.fit(**silent, **options).history == result.history
    assert_same_weights(silent["student"], logged["student"])
    start, *middle, end = lines(tmp_path / "runs" / "1")
    assert (start["event"], start["step"], start["total_steps"]) == ("start", 0, 6)
    assert start["settings"] == result.settings
    assert "random" in start["settings"]["sampler"]
    assert start["settings"]["seed"] == "5"
    assert start["versions"]["torch"] == torch.__version__
    assert [(one["event"], one["step"]) for one in middle] == [
        *(("steps", step) for step in (1, 2, 3, 4)), ("record", 4), ("steps", 5), ("steps", 6), ("record", 6),
    ]  # fmt: skip
    steps = [one["values"] for one in middle if one["event"] == "steps"]
    for told, found in zip(seen, steps, strict=True):
        assert told == pytest.approx({name: found[name] for name in ("loss", "hard", "soft", "synthetic")})
    assert [one["values"] for one in middle if one["event"] == "record"] == result.history
    assert (end["event"], end["best_step"], end["best_score"]) == ("end", result.best_step, result.best_score)
    assert time.time() - 60 < start["time"] <= end["time"] <= time.time() + 1


def test_a_long_run_has_about_a_thousand_lines_and_slow_steps_one_each(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log, "_LINES", 5)
    tgt.fit(**make_run(), steps=20, log=tmp_path / "fast")
    steps = [one for one in lines(tmp_path / "fast") if one["event"] == "steps"]
    assert [one["step"] for one in steps] == [1, 4, 8, 12, 16, 20]
    monkeypatch.setattr(log, "_SECONDS", 0.0)
    result = tgt.fit(**make_run(), steps=20, log=tmp_path / "slow")
    slow = [one["values"]["loss"] for one in lines(tmp_path / "slow") if one["event"] == "steps"]
    assert len(slow) == 20
    assert steps[2]["values"]["loss"] == pytest.approx(sum(slow[4:8]) / 4)
    assert result.history[0]["loss"] == pytest.approx(sum(slow) / 20)


def test_a_log_goes_on_after_a_kill_and_shows_the_last_run(tmp_path: Path) -> None:
    def stop(event: str, run: Any) -> None:
        if run.steps == 3:
            raise KeyboardInterrupt

    def trained(**options: Any) -> None:
        tgt.fit(**make_run(), steps=4, log=tmp_path, checkpoint_dir=tmp_path, checkpoint_every=2, **options)

    with pytest.raises(KeyboardInterrupt):
        trained(callbacks=[stop])
    assert lines(tmp_path)[-1]["error"] == "KeyboardInterrupt"
    with open(tmp_path / log.NAME, "ab") as file:
        file.write(b'{"event":"steps","ti')  # of a killed writer
    trained(resume=True)
    found = log.read(tmp_path)
    assert [(one["event"], one["step"]) for one in found] == [
        ("start", 0), ("steps", 1), ("steps", 2), ("start", 2), ("steps", 3), ("steps", 4), ("record", 4), ("end", 4)
    ]  # fmt: skip
    assert b'"ti\n{"event":"start"' in (tmp_path / log.NAME).read_bytes()
    tgt.fit(**make_run(), steps=1, log=tmp_path)
    assert [one["event"] for one in log.read(tmp_path)] == ["start", "steps", "record", "end"]


def test_losses_that_are_no_numbers_are_standard_json(tmp_path: Path) -> None:
    run = make_run(None)
    with torch.no_grad():
        next(run["student"].parameters()).fill_(float("nan"))
    tgt.fit(**run, steps=1, log=tmp_path)
    text = (tmp_path / log.NAME).read_text()
    assert '"loss":null' in text
    for line in text.splitlines():
        json.loads(line, parse_constant=lambda name: pytest.fail(name))


def test_a_folder_that_cannot_be_written_is_found_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    for folder, error in (
        (tmp_path / "taken", ArgumentError),
        (tmp_path / "taken" / "x", CheckpointError),
        (3, ArgumentError),
    ):
        run = make_run()
        before = copy.deepcopy(run["student"])
        with pytest.raises(error):
            tgt.fit(**run, steps=1, log=folder)
        assert_same_weights(before, run["student"])
    with pytest.raises(ArgumentError, match=r"no log\.jsonl"):
        log.read(tmp_path)
    (tmp_path / log.NAME).write_text("[]\nnothing\n")
    with pytest.raises(ArgumentError, match="is not a log"):
        log.read(tmp_path)


def test_a_full_disk_ends_the_log_and_not_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, left = os.write, [2]

    def full(descriptor: int, data: Any) -> int:
        if data[:9] == b'{"event":':
            left[0] -= 1
            if left[0] < 0:
                raise OSError(28, "No space left on device")
        return write(descriptor, data)

    monkeypatch.setattr(os, "write", full)
    with pytest.warns(UserWarning, match="the log is not written any more: No space left"):
        result = tgt.fit(**make_run(), steps=3, log=tmp_path)
    assert result.steps == 3
    assert len(lines(tmp_path)) == 2


def test_a_result_knows_its_student_and_keeps_it_from_nothing(tmp_path: Path) -> None:
    run = make_run()
    result = tgt.fit(**run, steps=1)
    assert result.student is run["student"]
    again = pickle.loads(pickle.dumps(copy.deepcopy(result)))
    assert again == result
    assert again.student is None
    run.clear()
    assert result.student is None


def test_the_bar_shows_the_loss_from_the_first_step(capfd: pytest.CaptureFixture[str]) -> None:
    def stop(event: str, run: Any) -> None:
        if event == "step":
            raise KeyError

    with pytest.raises(KeyError):
        tgt.fit(**{**make_run(), "progress": True}, steps=10, callbacks=[stop])
    assert "loss=" in capfd.readouterr().err


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize("what", ["evaluate", "calibrate"])
def test_long_work_has_a_bar_on_a_terminal(what: str, monkeypatch: pytest.MonkeyPatch) -> None:
    teacher, student = make_teacher(), make_student()
    slow = [make_data()] * 3

    def shown(terminal: bool, progress: bool | None = None) -> str:
        stream = Terminal() if terminal else io.StringIO()
        monkeypatch.setattr("sys.stderr", stream)
        if what == "evaluate":
            evaluate(student, teacher, slow, progress=progress)
        else:
            tgt.LatentSampler(teacher).calibrate(slow, progress=progress)
        return stream.getvalue()

    assert shown(terminal=True) == ""  # over at once
    assert what in shown(terminal=False, progress=True)
    monkeypatch.setattr("tgt_fast._bars._PATIENCE", 0.0)
    assert f"{what}: " in shown(terminal=True)
    assert "0/3" in shown(terminal=True)
    assert shown(terminal=False) == ""
    assert shown(terminal=True, progress=False) == ""
    if what == "evaluate":  # a run without a bar has none beside it either
        stream = Terminal()
        monkeypatch.setattr("sys.stderr", stream)
        tgt.fit(**make_run(), steps=1, evaluate=lambda s: evaluate(s, None, slow))
        assert stream.getvalue() == ""
