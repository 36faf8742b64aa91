"""``tgt-fast reproduce``: what a result file must state, which commands run, and which numbers are near enough."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tgt_fast import cli, reproduce
from tgt_fast.errors import ArgumentError

ROOT = Path(__file__).parents[1]

RESULT: dict[str, Any] = {
    "command": "tgt-fast bench --ops tokens --shapes quick",
    "commit": "abc",
    "hardware": "a chip",
    "versions": {"torch": "2.6"},
    "seeds": [0],
    "rows": [
        {
            "op": "sum",
            "milliseconds": {"ours": 2.0},
            "errors": {"loss": 1e-7},
            "extra_memory_bytes": 1 << 24,
            "rows": 8,
            "spread": 0.1,
        }
    ],
    "methods": {"tgt": {"accuracy": 90.0, "seconds": 3.0}},
}


@pytest.fixture
def again(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    """Reproduces RESULT where the command writes RESULT with changes; its status."""

    def run(change: Callable[[dict[str, Any]], None] = lambda _: None, *options: str, status: int = 0) -> int:
        new = copy.deepcopy(RESULT)
        change(new)

        def write(words: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
            assert words[:6] == [sys.executable, "-m", "tgt_fast", "bench", "--ops", "tokens"]
            Path(words[words.index("--json") + 1]).write_text(json.dumps(new))
            return subprocess.CompletedProcess(words, status)

        monkeypatch.setattr(reproduce.subprocess, "run", write)
        file = tmp_path / "result.json"
        file.write_text(json.dumps(RESULT))
        return cli.main(["reproduce", str(file), *options])

    return run


def set_in(*path: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    def change(result: Any) -> None:
        for part in path[:-1]:
            result = result[part]
        result[path[-1]] = to

    return change


@pytest.mark.parametrize(
    ("path", "near", "far"),
    [
        (("rows", 0, "milliseconds", "ours"), (1.01, 3.9), (0.9, 4.1)),
        (("rows", 0, "errors", "loss"), (2e-8, 9e-7), (2e-6, -1e-7)),
        (("rows", 0, "extra_memory_bytes"), (20_000_000, 14_000_000), (30_000_000, 1 << 22)),
        (("rows", 0, "rows"), (8,), (9, 8.5, "8", None)),
        (("rows", 0, "op"), ("sum",), ("mean",)),
        (("methods", "tgt", "accuracy"), (89.0, 91.0), (88.0, 92.0, float("nan"))),
        (("commit",), ("another",), ()),
        (("rows", 0, "spread"), (0.5,), ()),  # how far apart the times of one run were
        (("versions",), ({"torch": "2.13"},), ()),
        (("seeds",), ([0],), ([1], [0, 1])),
    ],
    ids=lambda value: ".".join(map(str, value)) if isinstance(value, tuple) else None,
)
def test_margins_by_kind(
    path: tuple[str | int, ...], near: tuple[Any, ...], far: tuple[Any, ...], again: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for value in near:
        assert again(set_in(*path, to=value)) == 0, value
        assert "0 differences" in capsys.readouterr().out
    for value in far:
        assert again(set_in(*path, to=value)) == 1, value
        assert str(path[-1]) in capsys.readouterr().out


def test_what_was_and_is_is_said(again: Callable[..., int], capsys: pytest.CaptureFixture[str]) -> None:
    assert again(set_in("rows", 0, "milliseconds", "ours", to=5.0)) == 1
    out = capsys.readouterr().out
    assert "recorded at commit abc on a chip" in out
    assert "rows[0].milliseconds.ours: recorded 2, now 5 (time)" in out
    assert again(set_in("rows", 0, "milliseconds", "ours", to=5.0), "--margin", "time=2") == 0
    assert again(set_in("versions", to={"torch": "2.13"})) == 0
    assert "another version of torch: 2.6 then, 2.13 now" in capsys.readouterr().out
    assert again(lambda new: new["rows"].append({"op": "more"})) == 1
    assert again(status=1) == 1  # the command found its own numbers wrong
    assert again(lambda _: None, "--margin", "luck=1") == 1
    assert "a margin is KIND=SHARE" in capsys.readouterr().err


def test_a_file_may_state_its_margins() -> None:
    assert reproduce.margins_of({"margins": {"time": 4}}, [])["time"][0] == 4
    for stated, asked in (({"margins": {"time": "fast"}}, []), ({"margins": [1]}, []), ({}, ["time=-1"])):
        with pytest.raises(ArgumentError, match="a margin is KIND=SHARE"):
            reproduce.margins_of(stated, asked)


def test_a_file_that_does_not_say_how_it_was_made(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "result.json"
    for content, message in (
        ('{"commit": "a", "versions": {}}', "lacks hardware, seeds, command"),
        ("[1]", "holds a list without commit, hardware, versions, seeds, command"),
        ("{", "cannot read"),
    ):
        file.write_text(content)
        assert cli.main(["reproduce", str(file)]) == 1
        assert message in capsys.readouterr().err
    assert cli.main(["reproduce", str(tmp_path / "none.json")]) == 1


@pytest.mark.parametrize(
    "command",
    [
        "", "rm -rf /", "tgt-fast doctor", "tgt-fast bench --json elsewhere", "tgt-fast bench --plot x",
        "tgt-fast demo lm --out x", "tgt-fast 'bench", "python benchmarks/../evil.py --save",
        "python benchmarks/bench_distill.py", "python benchmarks/x.py --save; id", "python -c pass --save",
        "python benchmarks/nothing_there.py --save",
    ],
)  # fmt: skip
def test_no_other_command_runs(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ArgumentError):
        reproduce.invocation(command, tmp_path / "new.json")


def test_scripts_write_where_they_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not (ROOT / "benchmarks").is_dir():
        pytest.skip("no benchmarks here")
    monkeypatch.chdir(ROOT)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    words, environment = reproduce.invocation("python benchmarks/bench_tokens.py --save", tmp_path / "tokens-cpu.json")
    assert words == [sys.executable, "benchmarks/bench_tokens.py", "--save"]
    monkeypatch.setenv(*next(iter(environment.items())))
    import harness

    assert harness.save("tokens-cpu", {"a": 1}) == tmp_path / "tokens-cpu.json"
    assert json.loads((tmp_path / "tokens-cpu.json").read_text()) == {"a": 1}


def test_what_measures_states_all_that_is_asked() -> None:
    from tgt_fast.bench.record import origin

    made = origin(torch.device("cpu"), 1.0, "tgt-fast bench")
    assert set(reproduce.STATED) <= made.keys()
