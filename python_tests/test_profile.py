"""tgt-fast profile, and the named ranges that any profile of this package's users shows."""

from __future__ import annotations

import gzip
import json
import timeit
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tgt_fast import cli
from tgt_fast._ranges import PREFIX, named_range

COMMON = {
    "step",
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
    for name in expected:
        assert name in printed
    assert "wrote" in printed


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
