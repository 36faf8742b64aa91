"""A pytest plugin for tests on a device that may hang: ``pytest -n N --dist worksteal -p guard -p no:faulthandler``.

A test has TGT_TEST_LIMIT seconds. Then its process writes where it is to TGT_TEST_STACKS and ends, whatever holds it;
xdist names the test and starts another process. A process whose device answers with errors from a failed test on ends
too. Failures are printed as they happen, and every outcome is a line of the file TGT_TEST_OUTCOMES. Tests that hold all
words of a list of TGT_TESTS_LEFT_OUT (JSON) are left out.

Where pytest-xdist is missing, testing.py starts the processes itself: TGT_TEST_SHARD "2/14" is the third of 14 of them,
which leaves out what TGT_TEST_OUTCOMES says has begun before.
"""

from __future__ import annotations

import faulthandler
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

DEAD = 70  # the exit status of a process whose device is lost
PATIENT = {"test_compile.py": 2.0, "test_bench.py": 2.0}  # times the limit: they wait for torch.compile


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput") or config.getoption("dist", "no") == "no":
        config.pluginmanager.register(Worker(), "guard-worker")
    if not hasattr(config, "workerinput"):
        config.pluginmanager.register(Teller(), "guard-teller")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    lists = json.loads(os.environ.get("TGT_TESTS_LEFT_OUT", "[]"))
    kept = [item for item in items if not any(all(word in item.nodeid for word in words) for words in lists)]
    shard = os.environ.get("TGT_TEST_SHARD")
    if shard:
        teller: Any = config.pluginmanager.get_plugin("guard-teller")
        teller.count([item.nodeid for item in kept])
        place, of = map(int, shard.split("/"))
        begun = begun_tests(Path(os.environ["TGT_TEST_OUTCOMES"]))
        kept = [item for item in kept[place::of] if item.nodeid not in begun]
    if len(kept) < len(items):
        staying = set(kept)
        config.hook.pytest_deselected(items=[item for item in items if item not in staying])
        items[:] = kept


def begun_tests(outcomes: Path) -> set[str]:
    lines = outcomes.read_text().splitlines() if outcomes.exists() else []
    return {told["began"] for told in map(json.loads, lines) if "began" in told}


class Worker:
    """In a process that runs tests."""

    def __init__(self) -> None:
        self.limit = float(os.environ.get("TGT_TEST_LIMIT", "60"))
        self.failed = False
        path = os.environ.get("TGT_TEST_STACKS")
        # pytest takes the error stream away; the file must be open before the process hangs
        self.stacks = open(path, "a") if path else sys.__stderr__  # noqa: SIM115
        # What pytest's own plugin of that name does; that one would also cancel the limit of a test that fails.
        faulthandler.enable(self.stacks)

    @pytest.hookimpl(wrapper=True, tryfirst=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        patience = next((times for name, times in PATIENT.items() if name in item.nodeid), 1.0)
        limit = self.limit * patience
        self.failed = False
        self._note(f"began {item.nodeid}")
        faulthandler.dump_traceback_later(limit, exit=True, file=self.stacks)
        try:
            return (yield)
        finally:
            faulthandler.cancel_dump_traceback_later()
            self._note(f"ended {item.nodeid}")
            reason = _lost() if self.failed else ""
            if reason:  # before xdist hears that the test is over: so it is this one that the end is put down to
                self._note(f"lost the device in {item.nodeid}: {reason}")
                os._exit(DEAD)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.failed |= report.failed

    def _note(self, line: str) -> None:
        print(f"== {os.environ.get('PYTEST_XDIST_WORKER', 'main')} {line}", file=self.stacks, flush=True)


def _lost() -> str:
    """Why the device is of no more use to this process."""
    torch: Any = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return ""
    try:
        torch.cuda.synchronize()
    except Exception as error:
        return (str(error).strip().splitlines() or ["?"])[0]
    return ""


class Teller:
    """In the process that hears of all tests."""

    def __init__(self) -> None:
        path = os.environ.get("TGT_TEST_OUTCOMES")
        self.file = open(path, "a") if path else None  # noqa: SIM115
        self.told = False  # how many tests there are

    @pytest.hookimpl(optionalhook=True)
    def pytest_xdist_node_collection_finished(self, node: Any, ids: list[str]) -> None:
        self.count(ids)

    def count(self, ids: list[str]) -> None:
        if not self.told:
            self.told = True
            self._write({"collected": Counter(Path(test.partition("::")[0]).name for test in ids)})

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            print(f"\nFAILED to collect {report.nodeid}\n{str(report.longrepr)[-3000:]}", flush=True)
            message = str(report.longrepr)[-1500:]
            self._write({"test": report.nodeid, "when": "collect", "outcome": "failed", "message": message})

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self._write({"began": nodeid})

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.outcome == "passed":
            return
        message = "" if not report.failed else str(report.longrepr)
        if report.failed:
            print(f"\nFAILED {report.nodeid} ({report.when})\n{message[-3000:]}", flush=True)
        self._write({"test": report.nodeid, "when": report.when, "outcome": report.outcome, "message": message[-1500:]})

    def pytest_sessionfinish(self) -> None:
        self._write({"finished": True})

    def _write(self, line: dict[str, Any]) -> None:
        if self.file is not None:
            print(json.dumps(line), file=self.file, flush=True)
