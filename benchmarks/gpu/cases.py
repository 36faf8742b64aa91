"""The benchmarks case by case, in a process that a hung kernel takes down alone; every case is written as it ends."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from isolated import DIED, HUNG, OK, Isolated, Outcome
from results import Results, same_case

# In the order of their worth.
OPS = ("distill", "latent", "linear", "topk", "tokens", "explore", "contrast", "listwise", "step")
LIMIT, LIMIT_WITH_RIVALS = 45.0, 100.0  # seconds a case, its float64 truth and compilers included
FIRST = 128256  # classes


class Bench:
    """The cases to measure, and the progress with them."""

    def __init__(self, worker: Callable[[], Isolated], results: Results, *, quick: bool, command: str) -> None:
        self.process, self.results, self.quick, self.command = worker(), results, quick, command
        self._cases: list[dict[str, Any]] = []
        self._origin: dict[str, Any] = {}
        self.lost: dict[str, str] = {}  # cases that hung or took the process down, and how

    def close(self) -> None:
        self.process.close()

    def prepare(self) -> Outcome:
        """Ask what cases there are and where results come from."""
        listed = self.process.run({"task": "cases", "quick": self.quick}, 60.0)
        if listed.status != OK:
            return listed
        known = {noun: place for place, noun in enumerate(OPS)}
        self._cases = sorted(listed.value, key=lambda c: (known.get(c["noun"], 99), c["classes"] != FIRST))
        made = self.process.run({"task": "origin", "command": self.command}, 60.0)
        if made.status == OK:
            self._origin = made.value
            self.results.carry_over(OPS)
        return made

    @property
    def cases(self) -> Sequence[dict[str, Any]]:
        return self._cases

    @property
    def origin(self) -> dict[str, Any]:
        return self._origin

    def check(
        self, end: float, tell: Callable[[dict[str, Any], Outcome], None], rivals: Sequence[str],
        over: threading.Event | None = None,
    ) -> int:  # fmt: skip
        """All cases with hardly any timing: results at full shapes, and what compilers keep. How many were reached.

        ``over``: no case is begun once it is set.
        """
        return self._run(self._cases, end, tell, seconds=0.02, rivals=rivals, keep=False, over=over)

    def ours(self, end: float, tell: Callable[[dict[str, Any], Outcome], None], seconds: float) -> int:
        """Ours alone, but for those cases that are known."""
        wanted = [case for case in self._cases if not self._known(case)]
        return self._run(wanted, end, tell, seconds=seconds, rivals=("none",), keep=True)

    def rivals(self, end: float, tell: Callable[[dict[str, Any], Outcome], None], seconds: float) -> int:
        """Ours again, in turns with the rivals: such rows take the place of those without."""
        wanted = [case for case in self._cases if not self._known(case, with_rivals=True)]
        return self._run(wanted, end, tell, seconds=seconds, rivals=("available",), keep=True)

    def _known(self, case: dict[str, Any], with_rivals: bool = False) -> bool:
        found = [row for row in self.results.rows(case["noun"]) if same_case(row, case)]
        good = [row for row in found if row["status"] == "ok" and row["milliseconds"].get("ours")]
        return bool(good) and (not with_rivals or any(row.get("rivals") for row in good))

    def _run(
        self, cases: Iterable[dict[str, Any]], end: float, tell: Callable[[dict[str, Any], Outcome], None], *,
        seconds: float, rivals: Sequence[str], keep: bool, over: threading.Event | None = None,
    ) -> int:  # fmt: skip
        alone = tuple(rivals) == ("none",)
        reached = 0
        for case in cases:
            left = end - time.monotonic()
            if left < 2 or (over is not None and over.is_set()):
                break
            task = {
                "task": "case", "noun": case["noun"], "number": case["number"], "quick": self.quick,
                "seconds": seconds, "rivals": list(rivals), "late": left < 20,
                "copy_rate": self._origin["copy_bytes_per_second"],
            }  # fmt: skip
            outcome = self.process.run(task, min(LIMIT if alone else LIMIT_WITH_RIVALS, left))
            reached += 1
            cut_short = outcome.status == HUNG and left < (LIMIT if alone else LIMIT_WITH_RIVALS)
            if outcome.status in (HUNG, DIED) and not cut_short:
                self.lost[title(case)] = outcome.reason
            if outcome.value is not None and keep and self._improves(case, outcome.value):
                self.results.put(case["noun"], self._origin, case, outcome.value)
            if not cut_short:
                tell(case, outcome)
        return reached

    def _improves(self, case: dict[str, Any], rows: Sequence[dict[str, Any]]) -> bool:
        """A measurement is not given up for one that failed, in which a rival may have had its part."""
        return not self._known(case) or any(row["status"] == "ok" and row["milliseconds"].get("ours") for row in rows)


def title(case: dict[str, Any]) -> str:
    return f"{case['noun']}: {case['op']} {case['shape']} {case['dtype']}"
