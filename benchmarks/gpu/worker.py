"""A process that runs one task a line of its input: a call that reaches some kernels, or a case of the benchmarks.

What it prints goes to its error stream; the output stream carries answers alone.
"""

from __future__ import annotations

import argparse
import faulthandler
import gc
import json
import os
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "python_tests"))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--calls", nargs="+", help="run these calls and end, for a tool that looks on")
    given = parser.parse_args()
    if given.calls:
        sys.exit(run_calls(given.device, given.calls))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)

    def answer(**fields: Any) -> None:
        answers.write(json.dumps(fields) + "\n")
        answers.flush()

    import torch

    device = torch.device(given.device)
    if device.type == "cuda":
        device = torch.device("cuda", torch.cuda.current_device())
        torch.zeros(1, device=device).cpu()
    tasks: dict[str, Callable[..., dict[str, Any]]] = {
        "call": call, "names": names, "cases": cases, "origin": origin, "case": case,
    }  # fmt: skip
    answer(status="ok")
    for line in sys.stdin:
        task = json.loads(line)
        limit = task.pop("limit")
        print(f"== {task}", file=sys.stderr, flush=True)
        faulthandler.dump_traceback_later(max(0.5, 0.95 * limit), file=sys.stderr)  # of what is about to be ended
        try:
            made = tasks[task.pop("task")](device, **task)
        except Exception as error:
            traceback.print_exc()
            made = {"status": "failed", "reason": f"{type(error).__name__}: {error}"[:300]}
        faulthandler.cancel_dump_traceback_later()
        gc.collect()
        answer(**made, lost=lost(device))


def run_calls(device: str, names: list[str]) -> int:
    """All of them, one after the other; 1 if one gave what is no number."""
    import torch

    status = 0
    for name in names:
        print(name, flush=True)
        made = call(torch.device(device), name)
        if made["status"] != "ok":
            print(f"{name}: {made['reason']}", flush=True)
            status = 1
    return status


def lost(device: Any) -> bool:
    """True if the device answers this process with errors from now on."""
    import torch

    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()
    except Exception as error:
        print(f"the device is lost: {error}", file=sys.stderr)
        return True
    return False


def names(device: Any) -> dict[str, Any]:
    from gpu_calls import calls

    return {"status": "ok", "value": list(calls())}


def call(device: Any, name: str) -> dict[str, Any]:
    """One of those that reach every kernel; a result that is no number is a failure."""
    from gpu_calls import calls

    found = calls()[name](device)
    bad = sum(bool(result.isnan().any()) for result in found)
    if bad or not found:
        return {"status": "failed", "reason": f"{bad} of {len(found)} results hold a NaN"}
    return {"status": "ok"}


def cases(device: Any, quick: bool) -> dict[str, Any]:
    """The cases to measure."""
    from tgt_fast.bench.case import dtype_name
    from tgt_fast.bench.ops import OPS

    found = [
        {
            "noun": noun, "number": number, "op": case.op, "shape": case.shape, "dtype": dtype_name(case.dtype),
            "classes": case.numbers.get("classes", 0),
        }
        for noun, made in OPS.items()
        for number, case in enumerate(made(device, quick))
    ]  # fmt: skip
    return {"status": "ok", "value": found}


def origin(device: Any, command: str) -> dict[str, Any]:
    from tgt_fast.bench import record
    from tgt_fast.bench.copying import copy_rate

    return {"status": "ok", "value": record.origin(device, copy_rate(device), command)}


def case(
    device: Any, noun: str, number: int, quick: bool, seconds: float, rivals: list[str], late: bool, copy_rate: float
) -> dict[str, Any]:
    """The rows of a case, one a backend."""
    from tgt_fast.bench.run import Plan, measure_case

    plan = Plan(device, (noun,), quick, seconds, rivals=tuple(rivals))
    rows = measure_case(plan, noun, number, copy_rate, late=late)
    return {"status": "ok", "value": [row.to_json() for row in rows]}


if __name__ == "__main__":
    main()
