"""Measures cases one after the other. Each is checked first, is bounded, and leaves the others alone if it fails."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch

from tgt_fast._rng import isolated_rng
from tgt_fast.bench import memory, rivals
from tgt_fast.bench.case import Call, Case, UnfitError, Work
from tgt_fast.bench.copying import copier
from tgt_fast.bench.load import Watch
from tgt_fast.bench.ops import OPS
from tgt_fast.bench.row import DIFFERS, FAILED, OK, SKIPPED, WRONG, Row, Standing
from tgt_fast.bench.timing import Timing, medians
from tgt_fast.errors import ArgumentError
from tgt_fast.kernels.select import BACKENDS, ORDER

AVAILABLE: Final = "available"
OURS: Final = "ours:"  # and the backend: a contender's name
_PATIENCE: Final = {"cuda": 140.0, "cpu": 1800.0}  # seconds; after them no rival is started that has to compile itself


@dataclass(frozen=True)
class Plan:
    """The selection of what is measured."""

    device: torch.device
    nouns: Sequence[str] = tuple(OPS)
    quick: bool = False
    seconds: float | None = None  # of timing a case; None: a default for the device
    backends: Sequence[str] = (AVAILABLE,)
    rivals: Sequence[str] = (AVAILABLE,)

    def __post_init__(self) -> None:
        _check("--ops", self.nouns, tuple(OPS))
        _check("--backends", self.backends, (*BACKENDS, AVAILABLE))
        _check("--rivals", self.rivals, (*rivals.ALL, AVAILABLE, "none"))
        if self.seconds is not None and not 0 < self.seconds < float("inf"):
            raise ArgumentError(f"--seconds must be positive, got {self.seconds!r}")

    @property
    def seconds_a_case(self) -> float:
        if self.seconds is not None:
            return self.seconds
        if self.device.type == "cuda":
            return 0.2 if self.quick else 0.6
        return 0.3 if self.quick else 6.0

    def wants(self, rival: str) -> bool:
        return rival in self.rivals or AVAILABLE in self.rivals


def _check(option: str, given: Sequence[str], known: Sequence[str]) -> None:
    wrong = [name for name in given if name not in known]
    if option == "--ops" and "sparse" in wrong:
        raise ArgumentError("--ops: the op 'sparse' is called 'topk' now")
    if wrong or not given:
        raise ArgumentError(f"{option}: expected some of {', '.join(known)}, got {', '.join(wrong) or 'nothing'}")


def measure(plan: Plan, copy_rate: float) -> Iterator[Row]:
    """The rows, as they come."""
    started = time.perf_counter()
    for noun in plan.nouns:
        for number in range(len(OPS[noun](plan.device, plan.quick))):
            late = time.perf_counter() - started > _PATIENCE.get(plan.device.type, 600.0)
            yield from measure_case(plan, noun, number, copy_rate, late=late)


def measure_case(plan: Plan, noun: str, number: int, copy_rate: float, *, late: bool = False) -> list[Row]:
    """The rows of one case, one a backend. ``late``: no rival is started that has to compile itself."""
    begun, watch = time.perf_counter(), Watch()
    rows = _rows(OPS[noun](plan.device, plan.quick)[number], plan, number, late)
    load = watch.load()
    for row in rows:
        row.copy_rate, row.load = copy_rate, load
        row.seconds = (time.perf_counter() - begun) / len(rows)
    return rows


def _rows(case: Case, plan: Plan, number: int, late: bool) -> list[Row]:
    """One row a backend; the rivals are measured once, in turns with all of them."""
    named = [name for name in plan.backends if name != AVAILABLE]
    free = memory.free_bytes(case.device)
    if free is not None and free < case.bytes_needed:
        reason = f"needs about {case.bytes_needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free"
        return [Row(case, name, Standing(SKIPPED, reason), {}) for name in named or ["-"]]
    try:
        return _measured(case, plan, number, late)
    except Exception as error:
        return [Row(case, name, Standing(FAILED, brief(error)), {}) for name in named or ["-"]]
    finally:
        gc.collect()
        if case.device.type == "cuda":
            torch.cuda.empty_cache()


def _measured(case: Case, plan: Plan, number: int, late: bool) -> list[Row]:
    work = case.build()
    ours: dict[str, Standing] = {}
    calls: dict[str, Call] = {}
    for name in _backends(case, work, plan):
        ours[name] = _checked(name, case, work, calls)
    theirs: dict[str, Standing] = {}
    if calls:  # nobody is compared with a wrong result
        for name in case.rivals:
            if plan.wants(name):
                theirs[name] = _rival(name, case, work, calls, late)
    rows = [Row(case, name, standing, theirs, result_bytes=work.result_bytes) for name, standing in ours.items()]
    if calls:
        standings = {**{OURS + name: standing for name, standing in ours.items()}, **theirs}
        _take_peaks(case, plan, number, work, calls, standings)
        copy = _take_times(case, plan, calls, standings)
        parts = work.parts(calls)
        for row in rows:
            row.copy = copy
            shown = {"ours": OURS + row.backend, **{name: name for name in theirs}}
            row.parts = {name: parts[call] for name, call in shown.items() if call in parts}
    work.forget()
    return rows


def _take_times(case: Case, plan: Plan, calls: dict[str, Call], standings: dict[str, Standing]) -> Timing:
    timed: dict[str, Callable[[], Any]] = {**calls, "copy": copier(case.bytes_moved, case.device)}
    try:
        timings = medians(timed, seconds=plan.seconds_a_case, device=case.device)
    except Exception as error:  # a rival that stumbles only now; without rivals it is ours, and the case's failure
        if all(name.startswith(OURS) for name in calls):
            raise
        for name in [name for name in calls if not name.startswith(OURS)]:
            standings[name].status, standings[name].reason = FAILED, f"with rivals the timing failed: {brief(error)}"
            del calls[name], timed[name]
        timings = medians(timed, seconds=plan.seconds_a_case, device=case.device)
    for name in calls:
        standings[name].timing = timings[name]
    return timings["copy"]


def _take_peaks(
    case: Case, plan: Plan, number: int, work: Work, calls: dict[str, Call], standings: dict[str, Standing]
) -> None:
    for name, call in calls.items():
        if case.device.type == "cuda":
            standings[name].peak = memory.peak_on_device(work, call, case.device)
        elif case.peak and name != rivals.COMPILE:
            standings[name].peak = memory.peak_in_fresh_process(case, name, quick=plan.quick, number=number)
    work.forget()


def _backends(case: Case, work: Work, plan: Plan) -> list[str]:
    """Those asked for; of ``available`` ones every compiled backend that takes the call, else the reference."""
    found: list[str] = []
    for name in plan.backends:
        if name != AVAILABLE:
            found.append(name)
            continue
        order = ORDER.get(case.device.type, ())  # without an interpreted backend, whose time says nothing
        able = [n for n in order if n != "reference" and BACKENDS[n].refusal(case.kernels_of, work.operands) is None]
        found += able or ["reference"]
    return list(dict.fromkeys(found))


def _checked(name: str, case: Case, work: Work, calls: dict[str, Call]) -> Standing:
    """One of ours, checked; it joins the calls that are timed only if it is right."""
    refusal = BACKENDS[name].refusal(case.kernels_of, work.operands)
    if refusal is not None:
        return Standing(SKIPPED, refusal)
    try:
        call = work.ours(name)
        check = work.check(call())
    except Exception as error:
        return Standing(FAILED, brief(error))
    finally:
        work.forget()
    if not check.ok:
        return Standing(WRONG, str(check), check)
    calls[OURS + name] = call
    return Standing(OK, "", check)


def _rival(name: str, case: Case, work: Work, calls: dict[str, Call], late: bool) -> Standing:
    reason = rivals.absence(name, case.device)
    if name == rivals.COMPILE and not case.compiled:
        reason = "left out of these cases, to save the time of compiling"
    if reason is None and late and name != rivals.EAGER:
        reason = "the run has taken its time already"
    if reason is not None:
        return Standing(SKIPPED, reason)
    try:
        call = work.rival(name)
        with isolated_rng(0):  # one that draws numbers of its own is judged by the same ones in every run
            check = work.compare(call())
    except UnfitError as unfit:
        return Standing(SKIPPED, str(unfit))
    except ImportError as error:
        return Standing(SKIPPED, f"does not load: {brief(error)}")
    except Exception as error:
        return Standing(FAILED, brief(error))
    finally:
        work.forget()
    if not check.ok:
        return Standing(DIFFERS, f"computes something else: {check}", check)
    calls[name] = call
    return Standing(OK, "", check)


def brief(error: BaseException) -> str:
    """An error in one line."""
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first}"[:200].rstrip(": ")
