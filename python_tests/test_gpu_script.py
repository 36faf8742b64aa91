"""benchmarks/gpu.sh: what hangs or faults is named and left out, the rest goes on, and nothing is done twice."""

from __future__ import annotations

import argparse
import importlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from gpu_calls import calls
from gpu_script_kit import TESTS, TORCH, WORKER

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "benchmarks" / "gpu"
# Nobody without a GPU runs it.
of_the_script = pytest.mark.once("the script for a GPU", "benchmarks/gpu", "benchmarks/gpu.sh")
MODULES = ("call", "cases", "guard", "isolated", "prepare", "results", "sanitizing", "smoke", "stages", "testing")


@pytest.fixture(scope="module")
def script() -> Iterator[dict[str, ModuleType]]:
    """The script's modules, which find each other in their own folder."""
    if not FOLDER.is_dir():
        pytest.skip("the tests run outside a checkout")
    sys.path.insert(0, str(FOLDER))
    try:
        yield {name: importlib.import_module(name) for name in MODULES}
    finally:
        sys.path.remove(str(FOLDER))
        for name in MODULES:
            sys.modules.pop(name, None)


@pytest.fixture
def worker(script: dict[str, ModuleType], tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Makes stand-ins: ``worker(what hangs, what faults)``."""
    path = tmp_path / "stand_in.py"
    path.write_text(WORKER)
    made = []

    def make(hangs: str = "", faults: str = "") -> Any:
        made.append(script["isolated"].Isolated([sys.executable, str(path), hangs, faults], tmp_path / "worker.log"))
        return made[-1]

    yield make
    for each in made:
        each.close()


# What runs in a process of its own


@of_the_script
def test_a_task_that_hangs_or_faults_ends_its_own_process_alone(worker: Callable[..., Any], tmp_path: Path) -> None:
    process = worker("slow", "bad")
    began = time.monotonic()
    found = {
        name: process.run({"task": "call", "name": name}, 0.5 if name == "slow" else 20.0)
        for name in ("one", "slow", "two", "bad", "three", "nan", "sticky", "four")
    }
    assert {name: outcome.status for name, outcome in found.items()} == {
        "one": "ok", "slow": "hung", "two": "ok", "bad": "died", "three": "ok", "nan": "failed", "sticky": "died",
        "four": "ok",
    }  # fmt: skip
    assert found["bad"].reason == "signal 9"
    assert found["slow"].seconds < 3
    assert "illegal access" in found["sticky"].reason
    assert time.monotonic() - began < 30
    assert "working on slow" in (tmp_path / "worker.log").read_text()


def test_a_process_that_does_not_start_is_no_fault_of_its_task(script: dict[str, ModuleType], tmp_path: Path) -> None:
    process = script["isolated"].Isolated([sys.executable, "-c", "raise SystemExit(3)"], tmp_path / "log")
    outcome = process.run({"task": "call", "name": "one"}, 5.0)
    assert (outcome.status, outcome.reason) == ("failed", "at the start: exit status 3")


@of_the_script
def test_the_worker(
    script: dict[str, ModuleType], native: str, child_environment: dict[str, str], tmp_path: Path
) -> None:
    """The one that the script starts, on a CPU."""
    command = [sys.executable, str(FOLDER / "worker.py"), "--device", "cpu"]
    process = script["isolated"].Isolated(command, tmp_path / "worker.log", child_environment)
    try:
        named = process.run({"task": "names"}, 60.0)
        assert named.status == "ok", (tmp_path / "worker.log").read_text()
        assert named.value == list(calls())
        assert process.run({"task": "call", "name": "native latent: 5"}, 60.0).status == "ok"
        unknown = process.run({"task": "call", "name": "no such call"}, 60.0)
        assert (unknown.status, unknown.reason) == ("failed", "KeyError: 'no such call'")
        found = process.run({"task": "cases", "quick": True}, 60.0)
        assert {case["noun"] for case in found.value} == set(script["cases"].OPS)
        task = {"task": "case", "noun": "latent", "number": 0, "quick": True, "seconds": 0.01, "copy_rate": 1e9}
        made = process.run({**task, "rivals": ["none"], "late": False}, 60.0)
        assert [(row["backend"], row["status"]) for row in made.value] == [("native", "ok")]
        assert script["results"].same_case(made.value[0], found.value[[c["noun"] for c in found.value].index("latent")])
    finally:
        process.close()


# The smoke stage


@of_the_script
def test_smoke_names_what_hangs_and_what_faults(script: dict[str, ModuleType], worker: Callable[..., Any]) -> None:
    names = ["a", "slow", "b", "bad", "c", "d"]
    told: list[str] = []
    found = script["smoke"].smoke(
        names, lambda: worker("slow", "bad"), time.monotonic() + 30, lambda name, _: told.append(name), limit=1.0,
        processes=2,
    )  # fmt: skip
    assert {name: outcome.status for name, outcome in found.items()} == {
        **dict.fromkeys(names, "ok"), "slow": "hung", "bad": "died"
    }  # fmt: skip
    assert sorted(told) == sorted(names)


@of_the_script
def test_what_the_end_of_the_stage_cuts_short_has_not_hung(
    script: dict[str, ModuleType], worker: Callable[..., Any]
) -> None:
    found = script["smoke"].smoke(
        ["a", "slow", "b"], lambda: worker("slow"), time.monotonic() + 2, lambda name, _: None, limit=30.0, processes=1
    )
    assert found.keys() == {"a"}


@pytest.fixture
def gpu_tests(request: pytest.FixtureRequest) -> list[str]:
    """Their names, where all of the tests are collected."""
    found = [item.nodeid for item in request.session.items if item.get_closest_marker("gpu")]
    files = ("cuda", "cuda_kernels", "triton_gpu", "latent", "topk", "tokens")
    if not all(any(f"test_{name}.py" in test for test in found) for name in files):
        pytest.skip("needs all tests to be collected")
    return found


def test_what_is_left_out_are_tests_that_there_are(script: dict[str, ModuleType], gpu_tests: list[str]) -> None:
    """Of each call that hangs some tests are left out."""
    left_out = script["smoke"].left_out
    for name in calls():
        found = left_out({name: "hung", "native latent: 9": "ok"})
        gone = [test for test in gpu_tests if any(all(word in test for word in words) for words in found)]
        assert gone, (name, found)
        assert len(gone) < len(gpu_tests) * 0.75, name
    assert left_out(dict.fromkeys(calls(), "failed")) == []
    one = left_out({"native distill: stream": "hung"})
    assert one == [["test_cuda", "-stream]"]]


# The tests


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (tmp_path / "torch.py").write_text(TORCH)
    (tmp_path / "test_device.py").write_text(TESTS)
    (tmp_path / "test_missing.py").write_text("import a_library_that_is_not_there\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu\n")
    return tmp_path


@of_the_script
@pytest.mark.parametrize("xdist", [True, False], ids=["xdist", "no xdist"])
def test_a_hung_test_is_named_and_its_process_replaced(
    script: dict[str, ModuleType], suite: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, xdist: bool
) -> None:
    testing = script["testing"]
    if not xdist:
        monkeypatch.setattr(testing, "has_xdist", lambda log: False)
    outcomes, stacks, log = (tmp_path / name for name in ("outcomes.log", "stacks.log", "tests.log"))
    environment = {
        "TGT_TEST_LIMIT": "3", "TGT_TEST_OUTCOMES": str(outcomes), "TGT_TEST_STACKS": str(stacks),
        "TGT_TESTS_LEFT_OUT": json.dumps([["test_kernel", "hung"]]), "PYTHONPATH": str(FOLDER),
        "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "TGT_FAST_REQUIRE_CUDA": "0",
    }  # fmt: skip
    options = ["-q", "-p", "guard", "-p", "no:faulthandler", "-p", "no:cacheprovider"]
    options += ["--continue-on-collection-errors", *(str(suite / f"test_{name}.py") for name in ("device", "missing"))]
    if xdist:
        options += ["-p", "xdist"]
    status, note = testing.run_tests(options, 2, 60.0, log, environment)
    counts, found = testing.read(*tmp_path.glob("outcomes*"))
    assert (status, note) == (1, ""), log.read_text()
    assert counts == {"test_device.py": 13}
    assert "a_library_that_is_not_there" in found.pop("test_missing.py")["message"]
    by_name = {test.partition("::")[2]: outcome["outcome"] for test, outcome in found.items()}
    bad = ("test_hangs", "test_faults", "test_loses_the_device", "test_fails")
    assert {name for name, outcome in by_name.items() if outcome == "failed"} == set(bad)
    assert sum(outcome == "passed" for outcome in by_name.values()) == 8
    assert by_name["test_skips"] == "skipped"
    messages = {test.partition("::")[2]: outcome["message"] for test, outcome in found.items()}
    assert "wrong numbers" in messages["test_loses_the_device"]
    assert "another sum" in messages["test_fails"]
    written = stacks.read_text()
    assert "in test_hangs" in written
    assert "lost the device in" in written
    assert "FAILED " in log.read_text()
    made = testing.summary_of(counts, found, {}, complete=True, left_out=[])
    assert (made["passed"], made["failed"], made["skipped"], made["missing"]) == (8, 4, 1, 0)
    assert not made["files"]["test_device.py"]["proven"]


def test_a_glance_at_a_file_finds_what_is_marked(script: dict[str, ModuleType], gpu_tests: list[str]) -> None:
    files = {Path(test.partition("::")[0]).name for test in gpu_tests}
    assert files <= set(script["testing"].files_with_gpu_tests())


# The benchmarks


@pytest.fixture
def results(script: dict[str, ModuleType], tmp_path: Path) -> Callable[[], Any]:
    return lambda: script["results"].Results(tmp_path / "out", tmp_path / "kept")


def bench_of(script: dict[str, ModuleType], process: Any, results: Any) -> Any:
    bench = script["cases"].Bench(lambda: process, results, quick=False, command="gpu.sh")
    assert bench.prepare().status == "ok"
    return bench


@of_the_script
def test_cases_are_written_as_they_end_whatever_hangs_later(
    script: dict[str, ModuleType], worker: Callable[..., Any], results: Callable[[], Any], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(script["cases"], "LIMIT", 1.0)
    bench, seen, written = bench_of(script, worker("distill 2", "latent 0"), results()), [], []
    path = tmp_path / "out" / "distill-cuda.json"

    def tell(case: dict[str, Any], outcome: Any) -> None:
        seen.append((case["noun"], case["number"], outcome.status))
        written.append(len(json.loads(path.read_text())["rows"]))

    assert bench.ours(time.monotonic() + 60, tell, 0.6) == 5
    assert seen == [
        ("distill", 1, "ok"), ("distill", 0, "ok"), ("distill", 2, "hung"), ("latent", 0, "died"), ("linear", 0, "ok"),
    ]  # fmt: skip
    assert written[:3] == [1, 2, 2]
    record = json.loads(path.read_text())
    assert {name: record[name] for name in ("hardware", "driver", "commit", "date")} == {
        "hardware": "a stand-in", "driver": "1.2", "commit": "abc", "date": "today"
    }  # fmt: skip
    assert [row["number"] for row in record["rows"]] == [0, 1]


@of_the_script
def test_what_is_known_is_not_measured_again(
    script: dict[str, ModuleType],
    worker: Callable[..., Any],
    results: Callable[[], Any],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    seen: list[str] = []

    def tell(case: dict[str, Any], outcome: Any) -> None:
        seen.append(f"{case['noun']} {case['number']}")

    end = time.monotonic() + 60
    bench_of(script, worker("", "latent 0"), results()).ours(end, tell, 0.6)
    seen.clear()
    again = bench_of(script, worker(), results())
    again.ours(end, tell, 0.6)
    assert seen == ["latent 0"]
    again.rivals(end, tell, 0.6)
    assert len(seen) == 1 + 5
    assert again.rivals(end, tell, 0.6) == 0
    assert all(row["rivals"] for row in again.results.rows("distill"))
    monkeypatch.setattr(script["results"], "digest_of_sources", lambda: "other sources")
    assert results().rows("distill") == []


# The whole


@pytest.fixture
def call(
    script: dict[str, ModuleType], worker: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Any]]:
    """``call(only=...)`` runs the script with stand-ins for the device."""
    module, before, ran = script["call"], dict(os.environ), []

    def run_tests(*arguments: Any) -> tuple[int, str]:
        lines = ({"collected": {"test_numerics.py": 1}}, {"test": "test_numerics.py::test_it", "outcome": "passed"})
        Path(arguments[-1]["TGT_TEST_OUTCOMES"]).write_text("".join(json.dumps(line) + "\n" for line in lines))
        ran.append(arguments[0])
        return 0, ""

    monkeypatch.setattr(script["testing"], "run_tests", run_tests)
    monkeypatch.setattr(script["prepare"], "environment", lambda *arguments: None)
    monkeypatch.setattr(module, "KEPT", tmp_path / "kept")
    monkeypatch.setattr(module, "_runs_anywhere", lambda name: True)
    monkeypatch.setattr(script["prepare"], "core", lambda *arguments: True)
    monkeypatch.setattr(script["smoke"], "LIMIT", 1.0)
    monkeypatch.setattr(module.Call, "worker", lambda self, log, end=None: worker("native distill: warp", "latent 0"))
    monkeypatch.setattr(module, "profile_command", lambda device, folder: [sys.executable, "-c", "print('a kernel')"])

    def run(only: str | None = None) -> tuple[int, dict[str, Any], int]:
        given = argparse.Namespace(out=tmp_path / "out", only=only, commit="abc", seconds=300.0, dry=True)
        given.out.mkdir(exist_ok=True)
        status = module.Call(given).run()
        return status, json.loads((given.out / "gpu-cpu.json").read_text()), len(ran)

    yield run
    os.environ.clear()
    os.environ.update(before)


def stages_of(summary: dict[str, Any]) -> dict[str, str]:
    return {stage["stage"]: stage["outcome"] for stage in summary["stages"]}


@of_the_script
def test_two_calls(call: Callable[..., Any], tmp_path: Path) -> None:
    status, summary, _ = call("tests")
    assert status == 1
    found = stages_of(summary)
    assert found.keys() == {"smoke", "tests", "checks"}
    assert found["smoke"] == found["checks"] == "failed"
    assert found["tests"] == "passed"
    assert {name: one["status"] for name, one in summary["kernels"].items()} == {
        "native distill: warp": "hung", "native latent: 5": "ok", "triton latent: 7": "ok"
    }  # fmt: skip
    assert any(status.startswith("died") for status in summary["checks"].values())
    assert summary["tests"]["passed"] == 1
    assert {"commit", "date", "command"} <= summary.keys()

    status, summary, _ = call("bench")
    assert stages_of(summary).keys() >= {"bench", "rivals", "profile"}
    assert "latent: latent 0 float32: died, signal 9" in str(summary["stages"])
    files = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert len(files) <= 8
    assert {"distill-cpu.json", "gpu-cpu.json", "linear-cpu.json"} <= set(files)
    assert summary["kernels"]  # what the first call has found is kept
    assert summary["tests"]["passed"] == 1


@of_the_script
def test_one_call_does_both_and_skips_what_is_proven(call: Callable[..., Any]) -> None:
    call("tests")
    _, summary, times = call()
    found = stages_of(summary)
    assert found.keys() >= {"smoke", "tests", "checks", "bench", "rivals", "profile"}
    assert "0 of 1 ran well" in str(summary["stages"])  # the one that hung
    assert found["tests"] == "skipped"
    assert times == 1
    assert summary["tests"]["passed"] == 1


def test_the_readme_takes_in_what_a_call_without_rivals_has_written(
    tables: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = {
        "op": "an op", "shape": "2 x 3", "dtype": "float32", "backend": "native", "status": "ok", "batch": 4,
        "milliseconds": {"ours": 2.0, "copy": 1.0}, "bytes_per_second": 1e9, "of_copy": 0.5, "flops": 10**9,
        "rivals": {},
    }  # fmt: skip
    origin = {
        "command": "gpu.sh", "hardware": "a chip", "driver": "1.2", "commit": "abc", "date": "today",
        "versions": {"torch": "2"}, "copy_bytes_per_second": 4e12,
    }  # fmt: skip
    for noun in tables.GPU_OPS:
        (tmp_path / f"{noun}-cuda.json").write_text(json.dumps({**origin, "rows": [row, {"status": "skipped"}]}))
    summary = {
        "kernels": {"one": {"status": "ok"}, "two": {"status": "hung"}}, "checks": {"a case": "ok"},
        "tests": {"passed": 7, "failed": 1, "skipped": 0, "missing": 0, "failures": [{"test": "test_x"}]},
        "sanitizer": {"memcheck native": {"outcome": "passed", "note": "", "calls": 3}},
    }  # fmt: skip
    (tmp_path / "gpu-cuda.json").write_text(json.dumps({**origin, **summary}))
    monkeypatch.setattr(tables, "RESULTS", tmp_path)
    text = tables.rendered((ROOT / "docs/performance/gpu.md").read_text())
    assert text.count("commit abc, today.") == 10
    assert "| calls that reach every kernel | 1 of 2 | two: hung |" in text
    assert "1 failed; test_x |" in text
    assert "| memcheck native | 3 calls | passed |" in text


def test_the_command_says_how_it_is_used() -> None:
    if not FOLDER.is_dir():
        pytest.skip("the tests run outside a checkout")
    done = subprocess.run([str(FOLDER.with_suffix(".sh"))], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "--only tests|bench" in done.stderr


def test_cmake_and_python_agree_on_the_sources_of_a_core(
    script: dict[str, ModuleType], native: str, tmp_path: Path
) -> None:
    from tgt_fast.kernels.native import core

    assert len(core().build_info()["sources"]) == 64
    if not shutil.which("cmake"):
        pytest.skip("no cmake")
    ask = f'include("{ROOT}/cmake/sources_digest.cmake")\ntgt_sources_digest("{ROOT}" digest files)\n'
    (tmp_path / "ask.cmake").write_text(ask + 'message("${digest}")\n')
    done = subprocess.run(["cmake", "-P", str(tmp_path / "ask.cmake")], capture_output=True, text=True, check=True)
    assert done.stderr.strip() == script["results"].digest_of_core()
