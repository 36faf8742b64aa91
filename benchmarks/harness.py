"""Additions of the benchmarks to ``tgt-fast bench``: one op a script, and its result file for the documentation."""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

from tgt_fast.bench.command import run_bench
from tgt_fast.bench.device import chosen_device
from tgt_fast.bench.run import Plan
from tgt_fast.bench.table import bench_console
from tgt_fast.errors import TgtError
from tgt_fast.reproduce import FOLDER_VARIABLE

RESULTS = Path(__file__).parent / "results"


def main(noun: str, description: str) -> int:
    """Measure every case of a noun; with --save, write results/NOUN-DEVICE.json if all of it was right."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="time for timing a case")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--rivals", default="available", help="see tgt-fast bench")
    parser.add_argument("--quick", action="store_true", help="few small cases; never saved")
    parser.add_argument("--save", action="store_true", help=f"write benchmarks/results/{noun}-DEVICE.json")
    given = parser.parse_args()
    if given.save and given.quick:
        parser.error("--save is for the full set")
    try:
        device = chosen_device(given.device)
        plan = Plan(device, (noun,), given.quick, given.seconds, rivals=tuple(given.rivals.split(",")))
        command = f"python benchmarks/bench_{noun}.py --save"
        rows, record = run_bench(plan, bench_console(), command=command)
    except TgtError as error:
        print(error, file=sys.stderr)
        return 1
    if any(row.failed for row in rows):
        print("nothing was saved" if given.save else "not every row is right", file=sys.stderr)
        return 1
    if given.save:
        print(save(f"{noun}-{device.type}", record))
    return 0


def save(name: str, record: dict[str, Any]) -> Path:
    """Writes results/NAME.json."""
    folder = Path(os.environ.get(FOLDER_VARIABLE) or RESULTS)  # tgt-fast reproduce has them put elsewhere
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}.json"
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path
