"""benchmarks/cuda_report.py --model: what it counts in machine code, and what follows from the counts."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[1]
DATA = Path(__file__).parent / "data"  # tiny.cu, and what nvcc and nvdisasm made of it


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    names = ("sass", "cuda_model", "cuda_cases", "cuda_report")
    for name in names:
        monkeypatch.delitem(sys.modules, name, raising=False)
    return {name: importlib.import_module(name) for name in names}


@pytest.fixture
def reader(modules: dict[str, ModuleType]) -> ModuleType:
    """The reader of the tiny kernel's code; its sources are the test's."""
    sass, model = modules["sass"], modules["cuda_model"]
    (kernel,) = sass.parse((DATA / "tiny.sass").read_text())
    return model.Reader(kernel, sass.Sources(DATA))  # type: ignore[no-any-return]


def case(model: ModuleType, twice: bool = False, **changes: object) -> object:
    """Rows of 4096 floats, a block of 256 threads each."""
    another = (r"(?s)^MUFU.*another",) if twice else (r"exponentials",)
    sums = model.Pass("sums", "exponentials", 4, another)
    made = model.Case(
        "tiny",
        "tiny",
        1320,
        4096,
        1320 * 4096 * 4,
        (sums,),
        256,
        (model.Mark("(?s)^STG.*the end", 1),),
        fetched=1 << 20,
    )
    return replace(made, **changes)


@pytest.mark.parametrize(("twice", "instructions", "special"), [(False, 13, 4), (True, 16, 5)])
def test_a_round_of_a_loop(
    modules: dict[str, ModuleType], reader: ModuleType, twice: bool, instructions: int, special: int
) -> None:
    made = case(modules["cuda_model"], twice)
    found = reader.loops(made.passes[0])  # type: ignore[attr-defined]
    loop, counts, items = min(found, key=lambda each: each[1].instructions)
    assert (counts.instructions, counts.special, counts.double, counts.barriers) == (instructions, special, 0, 0)
    assert items == 4
    assert len(loop.blocks) == 1


@pytest.mark.parametrize(("twice", "lead", "other"), [(False, 38, 26), (True, 39, 27)])
def test_the_way_outside_the_loops(
    modules: dict[str, ModuleType], reader: ModuleType, twice: bool, lead: int, other: int
) -> None:
    made = case(modules["cuda_model"], twice)
    loops = [reader.loops(one) for one in made.passes]  # type: ignore[attr-defined]
    of_lead, of_other = reader.outside(made, loops, True), reader.outside(made, loops, False)
    assert (of_lead.instructions, of_other.instructions) == (lead, other)
    assert (of_lead.double, of_other.double) == (3, 0)
    assert (of_lead.barriers, of_other.barriers) == (1, 1)


def test_the_bounds_of_a_case(modules: dict[str, ModuleType], reader: ModuleType) -> None:
    model = modules["cuda_model"]
    found = model.judge(case(model), reader.kernel, 32, reader.sources)
    # Ten rows a multiprocessor, each 32 rounds of warps and eight warps, of which one leads.
    instructions = 10 * (32 * 13 + 38 + 7 * 26)
    assert found.issue_us == [round(instructions / 4 / clock * 1e6, 1) for clock in model.CHIP.clocks]
    assert found.special_us == [round(10 * 32 * 4 * 2 / clock * 1e6, 1) for clock in model.CHIP.clocks]
    assert found.floor_us == found.memory_us == round(1320 * 4096 * 4 / 4.3e12 * 1e6, 1)
    assert found.passes[0]["instructions"] == 13 / 4
    assert found.passes[0]["special"] == 1
    assert found.outside["instructions"] == (38 + 7 * 26) / 8
    assert found.resident == 8
    assert found.limit == "memory"
    assert found.percent == [100, 100]


def test_the_largest_bound_decides(modules: dict[str, ModuleType], reader: ModuleType) -> None:
    model = modules["cuda_model"]
    slow = model.judge(case(model, moved=1320 * 4096, bar=90), reader.kernel, 32, reader.sources)
    assert slow.limit == "MUFU"
    assert slow.missed
    assert not model.judge(case(model, bar=50), reader.kernel, 32, reader.sources).missed
    few = model.judge(case(model, fetched=1024), reader.kernel, 32, reader.sources)
    assert few.percent[0] == pytest.approx(100 * few.in_flight / model.CHIP.needed_in_flight, abs=0.1)


def test_blocks_of_a_multiprocessor(modules: dict[str, ModuleType]) -> None:
    chip = modules["cuda_model"].CHIP
    assert [chip.resident(384, 80, shared) for shared in (0, 115712, 115713)] == [2, 2, 1]
    assert [chip.resident(256, registers, 76800) for registers in (80, 81)] == [3, 2]
    assert chip.resident(1024, 64, 0) == 1
    assert chip.resident(32, 16, 0) == 32


def test_lines_that_are_gone_are_named(modules: dict[str, ModuleType], reader: ModuleType) -> None:
    model = modules["cuda_model"]
    with pytest.raises(model.UnknownCodeError, match="no instruction comes from a line like 'nowhere'"):
        model.judge(case(model, marks=(model.Mark("nowhere"),)), reader.kernel, 32, reader.sources)


def test_the_cases_are_laid_as_the_sources_say(modules: dict[str, ModuleType]) -> None:
    model, cases = modules["cuda_model"], modules["cuda_cases"]
    known = model.constants(ROOT)
    assert {"kTeamBytes", "kBarrierBytes", "kPieces", "kChunks", "kTopKThreads", "kThreads"} <= set(known)
    found = cases.cases(ROOT)
    assert len({one.title for one in found}) == len(found)
    bars = {one.title.split(" + ")[0]: one.bar for one in found if one.bar}
    assert bars["jsd"] == 50
    assert max(one.blocks for one in found) == 8


def test_the_committed_report_says_what_the_loss_takes() -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "cuda-model.json").read_text())["rows"]
    of_loss = [row for row in rows if row["bench"][0] == "distill"]
    assert len(of_loss) == 15
    assert [row["title"] for row in of_loss if row["percent"][0] < row["bar"]] == []
    for row in of_loss:
        if row["bench"][1] == "forward_kl + CE":
            assert row["outside"]["instructions"] <= 500, row["title"]
            assert sum(each["special"] for each in row["passes"]) < 5, row["title"]  # no third exponential


def test_a_missed_bar_is_the_exit_status(
    modules: dict[str, ModuleType],
    reader: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    model, report = modules["cuda_model"], modules["cuda_report"]
    for moved, status in ((1320 * 4096 * 4, 0), (1320 * 4096, 1)):
        found = model.judge(case(model, moved=moved, bar=90), reader.kernel, 32, reader.sources)
        monkeypatch.setattr(report, "modelled", lambda library, jobs, found=found: [found])
        monkeypatch.setattr(sys, "argv", ["cuda_report.py", "--model"])
        assert report.main() == status
        first, summary = capsys.readouterr().out.splitlines()
        assert first.startswith("tiny: ")
        assert ("<--" in first) == bool(status)
        assert summary == f"1 cases, {status} of them below their bars" + "; tiny" * status
