"""tgt-fast profile, and the named ranges that any profile of this package's users shows."""

from __future__ import annotations

import gzip
import io
import json
import re
import sys
import timeit
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console

from tgt_fast import cli
from tgt_fast._ranges import PREFIX, named_range
from tgt_fast.bench.ranges import print_ranges, shares, tree

COMMON = {
    "step",
    "data",
    "objective",
    "decode",
    "label",
    "student",
    "loss",
    "student (synthetic)",
    "loss (synthetic)",
    "backward",
    "optimizer",
}
OF_A_MODE = {
    "random": {"encode", "perturb", "explore (random)"},
    "gradient": {"encode", "perturb", "slope", "ascend", "explore (gradient)"},
    "persistent": {"ascend", "explore (persistent)"},
    "prior": {"perturb", "explore (prior)"},
}


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("mode", list(OF_A_MODE))
def test_the_trace_and_the_table_show_the_ranges(mode: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "made" / "here"
    assert cli.main(["profile", "--device", "cpu", "--steps", "1", "--mode", mode, "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    with gzip.open(out / "trace.json.gz", "rt") as file:
        events = json.load(file)["traceEvents"]
    found = {event["name"].removeprefix(PREFIX) for event in events if event.get("name", "").startswith(PREFIX)}
    expected = COMMON | OF_A_MODE[mode]
    assert expected <= found
    shown = shown_shares(printed)
    assert expected <= set(shown)
    assert sum(map(float, re.findall(r"([0-9.]+) % ", printed))) == pytest.approx(100)
    assert "wrote" in printed


OWN = """
import torch
from torch import nn


def objective():
    student = nn.Linear(4, 3)

    def squares(student, x, y, *, sample_ids, step):
        calls.append(step)
        return {"loss": student(x).square().mean()}

    return student, squares


def whole():
    return (*objective(), torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1))


def data():
    return [(torch.zeros(2, 4), torch.tensor([0, 1]))]


def wrong():
    return data()


calls = []
"""


def shown_shares(printed: str) -> dict[str, tuple[int, float]]:
    """Of each range its indentation and its own share."""
    found = {}
    for line in printed.splitlines():
        cells = line.strip().strip("│").split("│")
        if len(cells) > 1 and cells[-1].strip().endswith("%"):
            found[cells[0].strip()] = len(cells[0]) - len(cells[0].lstrip()), float(cells[-1].strip().rstrip(" %"))
    return found


@pytest.mark.parametrize("factory", ["objective", "whole"])
def test_a_step_of_the_users_own(
    factory: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_step", raising=False)
    (tmp_path / "own_step.py").write_text(OWN)
    given = ["--objective", f"own_step:{factory}", "--data", "own_step:data"]
    assert cli.main(["profile", "--steps", "2", "--out", "out", *given]) == 0
    assert len(sys.modules["own_step"].calls) == 5  # three to warm up
    found = shown_shares(capsys.readouterr().out)
    depths = {name: depth for name, (depth, _) in found.items()}
    assert set(found) == {"step", "data", "objective", "backward", "optimizer"}
    assert depths.pop("step") == 1
    assert set(depths.values()) == {3}
    assert sum(share for _, share in found.values()) == pytest.approx(100)
    assert (tmp_path / "out" / "trace.json.gz").stat().st_size


@pytest.mark.parametrize(
    ("given", "match"),
    [
        (["--objective", "own_step:objective"], "--objective and --data belong together"),
        (["--objective", "own_step:wrong", "--data", "own_step:data"], "must return .student, objective"),
        (["--objective", "own_step:nothing", "--data", "own_step:data"], "--objective: cannot load"),
        (["--objective", "own_step:objective", "--data", "own_step:calls"], "--data: own_step:calls is a list"),
    ],
)
def test_factories_that_give_something_else(
    given: list[str], match: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "own_step", raising=False)
    (tmp_path / "own_step.py").write_text(OWN)
    assert cli.main(["profile", "--out", "out", *given]) == 1
    assert re.search(match, capsys.readouterr().err)


def event(name: str, start: float, end: float, *, gpu: float = 0.0, thread: int = 1, kind: str = "CPU") -> Any:
    kernels = [SimpleNamespace(duration=gpu)] if gpu else []
    return SimpleNamespace(
        name=name, time_range=SimpleNamespace(start=start, end=end), kernels=kernels, thread=thread, is_async=False,
        device_type=SimpleNamespace(name=kind),
    )  # fmt: skip


def test_ranges_nest_in_time_and_kernels_belong_to_the_innermost() -> None:
    of = PREFIX
    root = tree(
        [
            event("op", 0, 1, gpu=500),
            event(of + "step", 1000, 5000),
            event(of + "a", 1000, 2000),
            event("op", 1000, 1500, gpu=1000),
            event(of + "b", 1500, 1800),
            event("op", 1600, 1700, gpu=3000),
            event(of + "backward", 2000, 4000),
            event("op", 2500, 2600, gpu=2000, thread=2),  # of autograd's own thread
            event(of + "a", 1000, 9000, kind="CUDA"),  # what the device says of the same
            event(of + "step", 6000, 7000),
        ]
    )
    found = [(depth, n.name, n.calls, n.spent, n.own, n.own_device, n.device) for depth, n in root.walk()]
    assert found == [
        (0, "step", 2, 5.0, 2.0, 0.0, 6.0),
        (1, "a", 1, 1.0, 0.7, 1.0, 4.0),
        (2, "b", 1, 0.3, 0.3, 3.0, 3.0),
        (1, "backward", 1, 2.0, 2.0, 2.0, 2.0),
    ]
    assert root.own_device == 0.5
    out = io.StringIO()
    print_ranges(Console(file=out, width=100), root, 1, on_gpu=True)
    assert {name: share for name, (_, share) in shown_shares(out.getvalue()).items()} == pytest.approx(
        {"step": 0.0, "a": 15.4, "b": 46.1, "backward": 30.8, "elsewhere": 7.7}
    )


@pytest.mark.parametrize("values", [[1.0, 1.0, 1.0], [0.0, 2.0], [1e-9, 5.0, 3.3, 1.7], [7.0], [0.0, 0.0]])
def test_shares_add_up(values: list[float]) -> None:
    found = shares(values)
    assert sum(found) == pytest.approx(100 if sum(values) else 0)
    assert all(abs(share - 100 * value / (sum(values) or 1)) < 0.1 for share, value in zip(found, values, strict=True))


@pytest.mark.parametrize("steps", ["0", "1001"])
def test_steps_out_of_range(steps: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["profile", "--steps", steps, "--device", "cpu", "--out", str(tmp_path / "x")]) == 1
    assert capsys.readouterr().err.startswith("tgt-fast: error: --steps")
    assert not (tmp_path / "x").exists()


def test_a_folder_that_cannot_be_written_is_found_before_the_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").write_text("mine")
    assert cli.main(["profile", "--device", "cpu", "--out", str(tmp_path / "taken")]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_a_range_costs_next_to_nothing_without_a_profiler() -> None:
    def block() -> None:
        with named_range("test"):
            pass

    seconds = min(timeit.repeat(block, number=5000, repeat=10)) / 5000
    assert seconds < 1e-6  # measured: about 0.2 microseconds; record_function itself takes several


def test_a_range_is_recorded_only_while_a_profiler_runs() -> None:
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profiler, named_range("seen"):
        torch.ones(2).sum()
    assert PREFIX + "seen" in {event.key for event in profiler.key_averages()}
    assert named_range("a") is named_range("b")


def test_ranges_do_not_break_a_graph() -> None:
    @torch.compile(fullgraph=True, backend="eager")
    def doubled(x: torch.Tensor) -> torch.Tensor:
        with named_range("inside"):
            y = x + x
        return y

    x = torch.arange(3.0)
    assert torch.equal(doubled(x), 2 * x)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]):
        assert torch.equal(doubled(x), 2 * x)
