"""The script that launches Triton's kernels without a GPU: which forms it knows, and what it writes down."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from tgt_fast.bench.ops import OPS


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    folder = Path(__file__).parent.parent / "benchmarks"
    if not folder.is_dir():
        pytest.skip("the tests run outside a checkout")
    monkeypatch.syspath_prepend(folder)
    made = importlib.import_module("triton_dry_run")
    monkeypatch.setattr(made, "RESULT", tmp_path / "result.json")
    # The script takes it away, for a process of its own; the tests that come after this one have it again.
    monkeypatch.setenv("TRITON_INTERPRET", os.environ.get("TRITON_INTERPRET", "0"))
    return made


def test_the_bench_has_a_form_of_every_case_with_kernels_in_triton(script: ModuleType) -> None:
    names = list(script.bench_forms())
    # A step's kernels are those of other ops.
    assert {name.split()[1].rstrip(":") for name in names} == set(OPS) - {"topk", "step"}
    gpu = torch.device("cuda")
    for noun in ("distill", "latent", "contrast", "explore"):
        assert {f"bench {noun}: {case.title}" for case in OPS[noun](gpu, False)} <= set(names)
    assert not any("sample" in name for name in names)


def test_all_and_some_combinations_of_options(script: ModuleType) -> None:
    every, few, fragile = (set(script.forms_of(*which)) for which in (("options", 1), ("options", 20), ("fragile", 1)))
    assert len(every) > 3000
    assert few < every
    assert len(few) >= len(every) // 20
    assert fragile < every
    assert {name for name in every if "state" in name and "smoothed" not in name and " 100 classes" in name} < fragile


def test_what_is_on_a_gpu_lies_on_meta(script: ModuleType) -> None:
    with script.on_meta():
        assert torch.zeros(3, device="cuda").is_meta
        assert torch.empty(3).to(torch.device("cuda", 0)).is_meta
        assert not torch.zeros(3).is_meta


def test_every_version_of_triton_has_its_place(script: ModuleType) -> None:
    nothing: dict[str, Any] = {"forms": 3, "of": 5, "kernels": "now", "failed": {}, "launches": {"a_kernel": 6}}
    script.save("3.6.0", "bench", nothing)
    script.save("3.9.0", "options", nothing)
    script.save("3.9.0", "bench", {**nothing, "failed": {"one": "why"}})
    found = json.loads(script.RESULT.read_text())
    assert set(found) == {"3.6.0", "3.9.0"}
    assert found["3.9.0"]["sets"]["options"]["of"] == 5
    assert found["3.9.0"]["sets"]["bench"]["failed"] == {"one": "why"}
    one = found["3.6.0"]["sets"]["bench"]
    assert nothing.items() <= one.items()
    assert {"date", "python", "torch"} < set(one)
    assert found["3.6.0"]["architecture"] == "sm_90"


def test_a_result_for_other_sources_is_kept_while_it_is_the_larger(script: ModuleType) -> None:
    def saved(forms: int, sources: str) -> dict[str, Any]:
        script.save("3.6.0", "tests", {"forms": forms, "of": 9, "kernels": sources, "failed": {}, "launches": {}})
        found: dict[str, Any] = json.loads(script.RESULT.read_text())["3.6.0"]["sets"]["tests"]
        return {part["kernels"]: part["forms"] for part in (found, found.get("earlier")) if part}

    assert saved(8, "old") == {"old": 8}
    assert saved(3, "new") == {"new": 3, "old": 8}
    assert saved(5, "new") == {"new": 5, "old": 8}
    assert saved(2, "newest") == {"newest": 2, "new": 5}
    assert saved(9, "newest") == {"newest": 9}


def test_a_set_that_runs_out_of_time_says_how_much_of_it_there_was(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The forms that there was time for begin an order that does not change, of the sources as they were then."""
    seen: list[str] = []
    clock = iter([0.0, *map(float, range(100))])

    class Pool:
        def __init__(self, jobs: int, context: Any) -> None:
            assert context.get_start_method() == "spawn"  # a fork of a process with threads may wait for them for ever

        def __enter__(self) -> Pool:
            return self

        def __exit__(self, *what: object) -> None:
            return None

        def submit(self, function: Any, name: str, one_of: int, form: str) -> Any:
            seen.append(form)
            monkeypatch.setattr(script, "kernels_digest", lambda: "of later sources")
            failure = "it is red" if form == "red" else ""
            return SimpleNamespace(result=lambda: (failure, Counter({"a_kernel": 2})))

    forms = dict.fromkeys(["one", "two", "three", "red", "five", "six"])
    monkeypatch.setattr(script, "_forms", lambda name, one_of: forms)
    monkeypatch.setattr(script, "ProcessPoolExecutor", Pool)
    monkeypatch.setattr(script, "kernels_digest", lambda: "of these sources")
    monkeypatch.setattr(script, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    monkeypatch.setattr(sys, "argv", ["", "--only", "options", "--jobs", "1", "--seconds", "3.5", "--save"])
    status = script.main()
    ordered = script.order(forms)
    assert seen == ordered[:4]
    assert ordered == script.order(reversed(forms))
    found = json.loads(script.RESULT.read_text())[importlib.metadata.version("triton")]["sets"]["options"]
    assert (found["forms"], found["of"], found["launches"]) == (4, 6, {"a_kernel": 8})
    assert found["failed"] == ({"red": "it is red"} if "red" in seen else {})
    assert found["kernels"] == "of these sources"
    assert status == bool(found["failed"])
    assert "options: 4 forms of 6" in capsys.readouterr().out

    monkeypatch.setattr(script, "FORMS_OF_A_PROCESS", 1)  # the rest, each by a process of its own
    monkeypatch.setattr(script, "kernels_digest", lambda: "of these sources")
    monkeypatch.setattr(sys, "argv", ["", "--only", "options", "--jobs", "1", "--go-on", "--save"])
    monkeypatch.setattr(script, "time", SimpleNamespace(monotonic=lambda: 0.0))
    assert script.main() == 1
    assert seen == ordered
    found = json.loads(script.RESULT.read_text())[importlib.metadata.version("triton")]["sets"]["options"]
    assert (found["forms"], found["launches"], found["failed"]) == (6, {"a_kernel": 12}, {"red": "it is red"})


def test_the_record_says_of_each_set_which_sources_it_holds_for_and_how_much_of_it_ran(script: ModuleType) -> None:
    """Not that they are today's: later changes to kernels make it old, not wrong."""
    runs = json.loads((Path(script.__file__).parent / "results" / "triton-dry-run.json").read_text())
    assert len(runs) >= 2
    for triton, run in runs.items():
        assert set(run["sets"]) <= set(script.SETS), triton
        assert {"bench", "fragile", "options"} <= set(run["sets"]), triton
        for name, found in run["sets"].items():
            assert re.fullmatch("[0-9a-f]{16}", found["kernels"]), (triton, name)
            assert 0 < found["forms"] <= found["of"], (triton, name)
            assert found["failed"] == {}, (triton, name)
