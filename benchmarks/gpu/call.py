"""The stages of benchmarks/gpu.sh, in order; see there."""

from __future__ import annotations

import argparse
import datetime
import os
import shutil
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import cases
import prepare
import smoke
from isolated import OK, Isolated, Outcome
from results import ROOT, Results, commit
from sanitizing import sanitizers
from stages import FAILED, PASSED, SKIPPED, Stages
from testing import tests

HERE = Path(__file__).parent
KEPT = ROOT / "build" / "gpu-kept"  # results and compiled kernels, where a machine is used again
TESTS_TIME, WHOLE_TIME = 280.0, 570.0  # seconds of a call
BUILD_TIME, SMOKE_TIME, PROFILE_TIME, SANITIZER_TIME = 150.0, 60.0, 40.0, 150.0
MOST_FILES, MOST_BYTES = 8, 4 << 20
LOGS = ("tests", "checks", "smoke", "stacks", "build", "bench", "environment")  # as far as there is room for files
SECONDS, SECONDS_DRY = 0.6, 0.02  # of timing a case


class Call:
    """One call of the script."""

    def __init__(self, given: argparse.Namespace) -> None:
        self.device = "cpu" if given.dry else "cuda"
        self.dry, self.only = bool(given.dry), given.only
        self.results = Results(given.out.resolve(), KEPT / self.device, self.device)
        seconds = given.seconds or (TESTS_TIME if given.only == "tests" else WHOLE_TIME)
        self.stages = Stages(self.results, KEPT / "logs", time.monotonic() + seconds)
        for log in self.stages.logs.glob("*.log"):
            log.unlink()
        self.command = f"benchmarks/gpu.sh OUT{f' --only {given.only}' if given.only else ''}"
        os.environ["TGT_FAST_COMMIT"] = found = commit(given.commit)
        self.results.update(
            command=self.command, commit=found, date=datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
            device=self.device,
        )  # fmt: skip
        self.kernels: dict[str, dict[str, Any]] = dict(self.results.proven("kernels") or {})
        self.checked: dict[str, str] = dict(self.results.proven("checks") or {})

    def worker(self, log: str, end: float | None = None) -> Isolated:
        command = [sys.executable, str(HERE / "worker.py"), "--device", self.device]
        return Isolated(command, self.stages.log(log), end=self.stages.end if end is None else end)

    def run(self) -> int:
        with tempfile.TemporaryDirectory() as scratch:
            self._set_up(Path(scratch))
            wanted = {"tests": ("tests",), "bench": ("bench",)}.get(self.only, ("tests", "bench"))
            try:
                prepare.peers(self.stages, Path(scratch) / "peers")
                if self._prepare():
                    if "tests" in wanted:
                        self.smoke()
                        self.tests_and_checks()
                    if "bench" in wanted:
                        self.bench()
                        self.sanitize_and_profile()
            finally:
                self._finish()
        return int(self.stages.failed)

    def _set_up(self, scratch: Path) -> None:
        """Paths that children see. Compilers keep what they made where a later call finds it."""
        paths = [str(ROOT), str(HERE), os.environ.get("PYTHONPATH", ""), str(scratch / "peers")]
        os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
        os.environ["TRITON_CACHE_DIR"] = str(KEPT / "triton")
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(KEPT / "inductor")
        os.environ["PYTHONUNBUFFERED"] = os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
        os.environ["CI"] = "true"
        os.environ["PATH"] += os.pathsep + "/usr/local/cuda/bin"
        if self.dry:
            os.environ["TRITON_INTERPRET"] = "1"

    def _prepare(self) -> bool:
        """The environment beside the build. Without a core of these sources nothing else has a meaning."""
        beside = threading.Thread(target=prepare.environment, args=(self.stages, self.device))
        beside.start()
        made = prepare.core(self.stages, self.device, self.stages.left(BUILD_TIME))
        beside.join()
        return made

    def smoke(self) -> None:
        """Every kernel once; what an earlier call has seen run well is not run again."""
        began = time.monotonic()
        end = began + self.stages.left(SMOKE_TIME)
        first = self.worker("smoke", end)
        listed = first.run({"task": "names"}, 20.0)
        first.close()
        names = [name for name in listed.value or () if not self.dry or _runs_anywhere(name)]
        names = [name for name in names if self.kernels.get(name, {}).get("status") != OK]
        found = smoke.smoke(
            names, lambda: self.worker("smoke", end), end, self._told_of_call, processes=2 if self.dry else 12
        )
        missing = [name for name in names if name not in found]
        bad = [name for name, outcome in found.items() if outcome.status != OK]
        notes = [f"{len(found) - len(bad)} of {len(names)} ran well", *bad]
        if listed.status != OK:
            notes = [listed.reason]
        if missing:
            notes.append(f"{len(missing)} not reached")
        failed = bad or missing or listed.status != OK
        took = time.monotonic() - began
        self.stages.record("smoke", FAILED if failed else PASSED, took, "; ".join(notes), self.stages.log("smoke"))

    def _told_of_call(self, name: str, outcome: Outcome) -> None:
        self.kernels[name] = outcome.to_json()
        self.results.update(kernels=dict(self.kernels))
        if outcome.status != OK:
            self.stages.tell(f"{name}: {outcome.status}, {outcome.reason}")

    def tests_and_checks(self) -> None:
        """The tests, and beside them the cases of the benchmarks with hardly any timing."""
        left_out = smoke.left_out({name: found["status"] for name, found in self.kernels.items()})
        # Without --only the benchmarks have most of the time.
        limit = self.stages.left(220.0) - 5 if self.only == "tests" else 150.0
        stop = time.monotonic() + self.stages.left(limit)
        over = threading.Event()
        beside = threading.Thread(target=self._checks, args=(stop, over))
        beside.start()
        tests(self.stages, limit, left_out, self.device)
        over.set()
        beside.join()

    def _checks(self, stop: float, over: threading.Event) -> None:
        began = time.monotonic()
        bench = cases.Bench(lambda: self.worker("checks"), self.results, quick=self.dry, command=self.command)
        try:
            prepared = bench.prepare()
            if prepared.status != OK:
                self.stages.record(
                    "checks", FAILED, time.monotonic() - began, prepared.reason, self.stages.log("checks")
                )
                return

            def tell(case: dict[str, Any], outcome: Outcome) -> None:
                for row in outcome.value or ():
                    name = f"{cases.title(case)} [{row['backend']}]"
                    self.checked[name] = row["status"] if row["status"] != "failed" else f"failed: {row['reason']}"
                    if row["status"] not in ("ok", "skipped"):
                        self.stages.tell(f"{name}: {row['status']}, {row['reason']}")
                if outcome.value is None:
                    self.checked[cases.title(case)] = f"{outcome.status}: {outcome.reason}"
                    self.stages.tell(f"{cases.title(case)}: {outcome.status}, {outcome.reason}")
                self.results.update(checks=dict(self.checked))

            known = all(any(name.startswith(cases.title(case)) for name in self.checked) for case in bench.cases)
            reached = len(bench.cases) if known else bench.check(stop, tell, ("none",))
            if not over.is_set() and reached == len(bench.cases) and not self.dry:
                bench.check(stop, lambda case, outcome: None, ("compile",), over)  # what torch.compile keeps
            bad = [name for name, status in self.checked.items() if status not in ("ok", "skipped")]
            note = f"{reached} of {len(bench.cases)} cases" + "".join(f"; {name}" for name in bad)
            outcome = FAILED if bad or reached == 0 else PASSED
            self.stages.record("checks", outcome, time.monotonic() - began, note, self.stages.log("checks"))
        finally:
            bench.close()

    def bench(self) -> None:
        """Ours alone, most valuable cases first; then in turns with the rivals as long as there is time."""
        bench = cases.Bench(lambda: self.worker("bench"), self.results, quick=self.dry, command=self.command)
        began, log = time.monotonic(), self.stages.log("bench")
        try:
            prepared = bench.prepare()
            if prepared.status != OK:
                self.stages.record("bench", FAILED, time.monotonic() - began, prepared.reason, log)
                return
            end = time.monotonic() + self.stages.left() - PROFILE_TIME - SANITIZER_TIME / 2
            seconds = SECONDS_DRY if self.dry else SECONDS
            for stage, measure in (("bench", bench.ours), ("rivals", bench.rivals)):
                began, bad = time.monotonic(), []

                def tell(case: dict[str, Any], outcome: Outcome, bad: list[str] = bad) -> None:
                    for row in outcome.value or ():
                        time_taken = row["milliseconds"].get("ours")
                        said = (
                            row["status"]
                            if time_taken is None
                            else f"{time_taken:.3g} ms, {row['of_copy']:.0%} of copy"
                        )
                        self.stages.tell(f"{cases.title(case)} [{row['backend']}]: {said}")
                        if row["status"] not in ("ok", "skipped"):
                            bad.append(f"{cases.title(case)} [{row['backend']}]: {row['reason']}")
                    if outcome.value is None:
                        bad.append(f"{cases.title(case)}: {outcome.status}, {outcome.reason}")
                        self.stages.tell(bad[-1])

                reached = measure(end, tell, seconds)
                note = "; ".join([f"{reached} cases", *bad])
                outcome = FAILED if bad and stage == "bench" else PASSED
                self.stages.record(stage, outcome, time.monotonic() - began, note, log)
        finally:
            bench.close()

    def sanitize_and_profile(self) -> None:
        calls = [name for name, found in self.kernels.items() if found["status"] == OK]
        if not calls:  # no smoke stage in this call
            process = self.worker("smoke")
            calls = process.run({"task": "names"}, 60.0).value or []
            process.close()
            calls = [name for name in calls if self.kernels.get(name, {}).get("status", OK) == OK]
        if self.dry:
            calls = [name for name in calls if _runs_anywhere(name)][:2]
        sanitizers(self.stages, self.stages.left() - PROFILE_TIME, calls, self.device)
        folder = KEPT / "profile"
        if self.stages.left() < 5:
            self.stages.record("profile", SKIPPED, 0, "no time left")
            return
        if self.stages.command("profile", profile_command(self.device, folder), PROFILE_TIME):
            lines = self.stages.log("profile").read_text().splitlines()
            self.results.update(profile=[line.rstrip() for line in lines if line.strip()])

    def _finish(self) -> None:
        """The files that come back: results first, then logs while there is room."""
        if not self.stages.found:
            self.stages.record("nothing", FAILED, 0, "no stage was reached")
        self.results.update(passed=not self.stages.failed)
        room = MOST_FILES - len(list(self.results.out.glob("*")))
        for name in LOGS:
            log = self.stages.log(name)
            if room <= 0:
                break
            if log.exists() and log.stat().st_size:
                with log.open("rb") as file:
                    file.seek(max(0, log.stat().st_size - MOST_BYTES))
                    (self.results.out / log.name).write_bytes(file.read())
                room -= 1
        print(f"results in {self.results.out}", flush=True)


def profile_command(device: str, folder: Path) -> list[str]:
    return [sys.executable, "-m", "tgt_fast.cli", "profile", "--device", device, "--out", str(folder)]


def _runs_anywhere(name: str) -> bool:
    """Calls that a CPU can run in a moment, for a dry run."""
    return name in ("native latent: 5", "native tokens: torch.bfloat16", "triton latent: 7")


def main() -> int:
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__)
    parser.add_argument("out", type=Path, metavar="OUT", help="folder of the results")
    parser.add_argument("--only", choices=("tests", "bench"), help="one half of it")
    parser.add_argument("--commit", help="what results are of, where there is no git")
    parser.add_argument("--seconds", type=float, help="for all of it (280 with --only tests, else 570)")
    parser.add_argument("--dry", action="store_true", help="the same on the CPU, a little of each: to try the script")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for file in given.out.iterdir():  # of an earlier call: its results are read first
        if file.suffix == ".log":
            file.unlink()
    if sys.version_info < (3, 10) or not shutil.which("cmake"):
        print("needs Python 3.10 or later, and cmake", file=sys.stderr)
    return Call(given).run()


if __name__ == "__main__":
    sys.exit(main())
