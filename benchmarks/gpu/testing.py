"""The tests marked ``gpu`` in many processes, and what the summary says of them."""

from __future__ import annotations

import json
import re
import sys
import threading
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from results import ROOT
from stages import FAILED, PASSED, SKIPPED, Stages, run

PROCESSES = 14
LIMIT = 60.0  # seconds a test
NO_TESTS = 5  # pytest's exit status where none is selected
FOLLOW = 2.0  # seconds between looks at what the tests have come to
MOST_FAILURES = 60  # with their messages in the summary
HAS_GPU_TESTS = re.compile(r"mark\.gpu|\bbackend: str|parametrize\(\s*\"backend\"")
DRY = ("test_numerics.py",)


def files_with_gpu_tests(folder: Path = ROOT / "python_tests") -> list[str]:
    """By a look at their text, which is quicker than to collect all."""
    return [path.name for path in sorted(folder.glob("test_*.py")) if HAS_GPU_TESTS.search(path.read_text())]


def tests(stages: Stages, limit: float, left_out: list[list[str]], device: str) -> None:
    """Run those that no earlier call has proven. ``left_out``: see guard.py."""
    began, log = time.monotonic(), stages.log("tests")
    dry = device != "cuda"
    same = stages.results.proven("tests", "left_out") == left_out
    before: dict[str, Any] = (stages.results.proven("tests", "files") if same else None) or {}
    proven = {name: found for name, found in before.items() if found.get("proven")}
    names = [name for name in (DRY if dry else files_with_gpu_tests()) if name not in proven]
    if not names:
        stages.results.update(tests=summary_of({}, {}, proven, complete=True, left_out=left_out))
        stages.record("tests", SKIPPED, 0, "an earlier call has run all of them on these sources")
        return
    outcomes, stacks = stages.log("outcomes"), stages.log("stacks")
    for path in (*outcomes.parent.glob("outcomes*"), stacks):
        path.unlink(missing_ok=True)
    options = [
        "-q", "-m", "not gpu" if dry else "gpu", "-p", "guard", "-p", "no:faulthandler", "-p", "no:cacheprovider",
        "--tb=short", "--no-summary", "--color=no", "--continue-on-collection-errors",
        *(str(ROOT / "python_tests" / name) for name in names),
    ]  # fmt: skip
    environment = {
        "TGT_TEST_LIMIT": str(LIMIT), "TGT_TEST_OUTCOMES": str(outcomes), "TGT_TEST_STACKS": str(stacks),
        "TGT_TESTS_LEFT_OUT": json.dumps(left_out), "TGT_FAST_REQUIRE_CUDA": "0" if dry else "1",
        "TGT_FAST_FULL_GRID": "1",  # a GPU is there rarely, and quick
    }  # fmt: skip
    told: set[str] = set()

    def follow(complete: bool = False) -> dict[str, Any]:
        """Failures are told as they happen, and whatever ends this call, the summary holds what was seen."""
        counts, lines = read(*outcomes.parent.glob("outcomes*"))
        for test, found in lines.items():
            if found["outcome"] == "failed" and test not in told:
                told.add(test)
                stages.tell(f"{test}: {(found['message'].strip().splitlines() or ['failed'])[-1][:300]}")
        made = summary_of(counts, lines, proven, complete=complete, left_out=left_out)
        stages.results.update(tests=made)
        return made

    over = threading.Event()

    def follow_until_over() -> None:
        while not over.wait(FOLLOW):
            follow()

    beside = threading.Thread(target=follow_until_over)
    beside.start()
    try:
        status, note = run_tests(options, 2 if dry else PROCESSES, max(1.0, stages.left(limit)), log, environment)
    finally:
        over.set()
        beside.join()
    made = follow(complete=status in (0, 1))
    said = f"{made['passed']} passed, {made['failed']} failed, {made['skipped']} skipped, {made['missing']} not reached"
    stages.record(
        "tests", PASSED if status == 0 else FAILED, time.monotonic() - began, "; ".join(filter(None, (said, note))), log
    )


def run_tests(
    options: Sequence[str], processes: int, limit: float, log: Path, environment: Mapping[str, str]
) -> tuple[int, str]:
    """pytest's exit status, and what is to be said of it."""
    command = [sys.executable, "-m", "pytest", *options]
    if has_xdist(log):
        share = ["-n", str(processes), "--dist", "worksteal", "--max-worker-restart", "60"]
        return run([*command, *share], limit, log, environment)
    end, whole = time.monotonic() + limit, Path(environment["TGT_TEST_OUTCOMES"])
    shards = [f"{place}/{processes}" for place in range(processes)]
    files = [whole.with_suffix(f".{place}") for place in range(processes)]
    with ThreadPoolExecutor(processes) as pool:
        found = list(pool.map(lambda shard, file: _shard(command, shard, end, log, environment, file), shards, files))
    return max(found, key=lambda one: one[0])


def has_xdist(log: Path) -> bool:
    """Asked of a child: where it comes with the peers, this process does not see it."""
    return run([sys.executable, "-c", "import xdist"], 20, log)[0] == 0


def _shard(
    command: Sequence[str], shard: str, end: float, log: Path, environment: Mapping[str, str], outcomes: Path
) -> tuple[int, str]:
    """Its part of the tests. A process that ends amid one is followed by another, as xdist would do."""
    environment = {**environment, "TGT_TEST_SHARD": shard, "TGT_TEST_OUTCOMES": str(outcomes)}
    outcomes.unlink(missing_ok=True)
    worst, last = 0, ""
    while True:
        status, note = run(command, max(1.0, end - time.monotonic()), log, environment)
        worst = max(worst, status if note else status not in (0, NO_TESTS))  # 1: as for tests that failed
        lines = [json.loads(line) for line in outcomes.read_text().splitlines()] if outcomes.exists() else []
        begun = [line["began"] for line in lines if "began" in line]
        if note or not begun or begun[-1] == last or "finished" in lines[-1]:
            return worst, note
        last = begun[-1]
        lost = {"test": last, "when": "call", "outcome": "failed", "message": f"its process ended ({status}) amid it"}
        with outcomes.open("a") as file:
            file.write(json.dumps(lost) + "\n")


def read(*paths: Path) -> tuple[dict[str, int], dict[str, dict[str, Any]]]:
    """The number of tests of each file, and the outcome of each test, the worst of its phases."""
    counts: dict[str, int] = {}
    tests: dict[str, dict[str, Any]] = {}
    for line in (line for path in paths for line in path.read_text().splitlines()):
        try:
            found = json.loads(line)
        except ValueError:  # a torn last line
            continue
        if "collected" in found:
            counts = dict(found["collected"])
        if "test" not in found:
            continue
        known = tests.setdefault(found["test"], found)
        if found["outcome"] == "failed" and known is not found:
            message = "\n".join(filter(None, (known["message"], found["message"])))
            tests[found["test"]] = {**found, "message": message}
    return counts, tests


def summary_of(
    counts: dict[str, int], tests: dict[str, dict[str, Any]], proven: dict[str, Any], *, complete: bool,
    left_out: list[list[str]],
) -> dict[str, Any]:  # fmt: skip
    """Numbers for each file and over all, and the failures. A file is proven when all of it passed or skipped."""
    files: dict[str, dict[str, Any]] = {name: dict(found) for name, found in proven.items()}
    for name, collected in counts.items():
        of_file = Counter(found["outcome"] for test, found in tests.items() if file_of(test) == name)
        seen = sum(of_file.values())
        files[name] = {
            "passed": of_file["passed"], "failed": of_file["failed"], "skipped": of_file["skipped"],
            "missing": collected - seen,
            "proven": complete and not of_file["failed"] and seen == collected,
        }  # fmt: skip
    failures = [
        {"test": test, "message": found["message"].splitlines()[-12:]}
        for test, found in tests.items()
        if found["outcome"] == "failed"
    ]
    total = {key: sum(found[key] for found in files.values()) for key in ("passed", "failed", "skipped", "missing")}
    return {**total, "left_out": left_out, "files": files, "failures": failures[:MOST_FAILURES]}


def file_of(test: str) -> str:
    return Path(test.partition("::")[0]).name
