"""The command line: help, doctor, and errors of one line that come before the work."""

from __future__ import annotations

import importlib.util
import json
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest

import tgt_fast
from tgt_fast import cli
from tgt_fast.errors import TgtError


def status(*arguments: str) -> int:
    """The exit status, also where argparse exits."""
    try:
        return cli.main(list(arguments))
    except SystemExit as exit_:
        return int(exit_.code or 0)


@pytest.fixture
def no_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fails the test if the demo begins to train."""
    pytest.importorskip("sklearn")
    from tgt_fast.demos.digits import run

    monkeypatch.setattr(run, "run_demo", lambda *a, **k: pytest.fail("the demo began to run"))


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["demo", "--help"],
        ["demo", "digits", "--help"],
        ["doctor", "-h"],
        ["bench", "-h"],
        ["profile", "-h"],
    ],
)
def test_help(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert status(*arguments) == 0
    assert capsys.readouterr().out.startswith("usage: tgt-fast")


def test_the_help_of_bench_lists_every_op(capsys: pytest.CaptureFixture[str]) -> None:
    from tgt_fast.bench.ops import OPS

    assert tuple(OPS) == cli.BENCH_OPS
    status("bench", "--help")
    assert f"{', '.join(OPS)} (default: all)" in " ".join(capsys.readouterr().out.split())


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert status("--version") == 0
    assert capsys.readouterr().out == f"tgt-fast {tgt_fast.__version__}\n"


def test_the_package_runs_as_the_command(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["python -m tgt_fast", "--version"])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module("tgt_fast", run_name="__main__")
    assert not stopped.value.code
    assert capsys.readouterr().out == f"tgt-fast {tgt_fast.__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["demo"],
        ["demo", "letters"],
        ["demo", "digits", "--seeds", "0,x"],
        ["demo", "digits", "--seeds", ""],
        ["demo", "digits", "--seeds", "1,1"],
        ["demo", "digits", "--seeds", "-1"],
        ["demo", "digits", "--seeds", "99999999999"],
        ["undo"],
        ["bench", "--device", "abacus"],
        ["bench", "--shapes", "round"],
        ["bench", "--seconds", "soon"],
        ["profile", "--mode", "none"],
        ["profile", "--steps", "some"],
    ],
)
def test_misuse_exits_with_2_and_a_message(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert status(*arguments) == 2
    assert "error:" in capsys.readouterr().err


def test_doctor_shows_each_backend_and_why_not(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tgt_fast import doctor
    from tgt_fast.kernels.select import BackendStatus

    rows = [
        BackendStatus("native", True, "", ("cpu",), "built for [x86_v4]"),
        BackendStatus("triton", False, "no GPU here", (), ""),
    ]
    monkeypatch.setattr(doctor, "backends", lambda: rows)
    monkeypatch.setenv("COLUMNS", "160")
    assert status("doctor") == 0
    out = capsys.readouterr().out
    assert "built for [x86_v4]" in out  # not taken for markup
    assert "no GPU here" in out
    for name in ("torch", "python", "numpy", "threads", "processor"):
        assert name in out


def test_doctor_lists_the_real_backends(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    assert status("doctor") == 0
    out = capsys.readouterr().out
    for row in tgt_fast.backends():
        assert row.name in out


@pytest.mark.usefixtures("no_run")
def test_an_output_that_cannot_be_written_is_found_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("mine")
    for arguments in (
        ["--out", str(tmp_path / "taken")],
        ["--out", str(tmp_path / "taken" / "below")],
        ["--out", str(tmp_path / "new"), "--json", str(tmp_path)],
        ["--out", str(tmp_path / "new"), "--json", str(tmp_path / "taken" / "x.json")],
    ):
        assert status("demo", "digits", *arguments) == 1
        error = capsys.readouterr().err
        assert error.startswith("tgt-fast: error: cannot write")
        assert error.count("\n") == 1
    assert (tmp_path / "taken").read_text() == "mine"


@pytest.mark.usefixtures("no_run")
def test_missing_packages_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    real = importlib.util.find_spec

    def without(name: str, *rest: Any) -> Any:
        return None if name in ("sklearn", "matplotlib") else real(name, *rest)

    monkeypatch.setattr(importlib.util, "find_spec", without)
    assert status("demo", "digits", "--out", str(tmp_path)) == 1
    error = capsys.readouterr().err
    assert error == ("tgt-fast: error: the demo needs scikit-learn and matplotlib: pip install 'tgt-fast[demo]'\n")


def test_interruption_and_errors_have_their_status(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt() -> None:
        raise KeyboardInterrupt

    def fail() -> None:
        raise TgtError("that went wrong")

    monkeypatch.setattr(cli, "_doctor", interrupt)
    assert status("doctor") == 130
    assert "interrupted" in capsys.readouterr().err
    monkeypatch.setattr(cli, "_doctor", fail)
    assert status("doctor") == 1
    assert capsys.readouterr().err == "tgt-fast: error: that went wrong\n"


def test_demo_passes_its_options_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    from tgt_fast.demos.digits import run
    from tgt_fast.demos.digits.settings import Settings

    asked: list[tuple[Any, ...]] = []

    def stop(seeds: Any, settings: Settings, *, curve: bool, progress: Any, recipes: Any = ()) -> None:
        asked.append((list(seeds), settings.steps < Settings().steps, curve, *recipes))
        raise TgtError("stopped")

    monkeypatch.setattr(run, "run_demo", stop)
    out = ["--out", str(tmp_path)]
    with_two = ["--with", "dist", "--with", "tgt-tail"]
    for arguments in ([], ["--quick"], ["--curve", "--seeds", "4,2"], ["--quick", "--seeds", "7"], with_two):
        assert status("demo", "digits", *out, *arguments) == 1
    assert asked == [
        ([0, 1, 2], False, False), ([0], True, False), ([4, 2], False, True), ([7], True, False),
        ([0, 1, 2], False, False, "dist", "tgt-tail"),
    ]  # fmt: skip
    capsys.readouterr()
    assert status("demo", "digits", *out, "--with", "nothing") == 1
    assert "there is no recipe 'nothing'" in capsys.readouterr().err


def test_a_tiny_demo_from_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("sklearn")
    pytest.importorskip("matplotlib")
    from functools import partial

    from tgt_fast.demos.digits import run, settings

    full, quick = settings.Settings(), settings.quick(settings.Settings())
    assert all(0 < getattr(quick, name) < getattr(full, name) for name in ("vae_steps", "labeler_steps", "steps"))
    tiny = settings.Settings(vae_steps=2, labeler_steps=2, steps=3, evaluations=1)
    monkeypatch.setattr(settings, "quick", lambda _: tiny)
    monkeypatch.setattr(run, "run_demo", partial(run.run_demo, workers=0))
    file = tmp_path / "numbers" / "x.json"
    assert status("demo", "digits", "--quick", "--out", str(tmp_path / "r"), "--json", str(file)) == 0
    out = capsys.readouterr().out
    assert "TGT gradient" in out
    assert "students: 7 of 7" in out
    assert (tmp_path / "r" / "index.html").stat().st_size > 100_000
    assert set(json.loads(file.read_text())["methods"]) == set(settings.METHODS)


def test_the_command_line_alone_imports_no_demo() -> None:
    import subprocess

    code = (
        "import sys, tgt_fast.cli as c; c._parser(); "
        "print([m for m in ('sklearn', 'matplotlib', 'rich', 'tgt_fast.demos.digits.run', 'tgt_fast.bench') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
