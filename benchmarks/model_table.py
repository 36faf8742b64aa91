"""The table of what the CUDA kernels' machine code allows, from benchmarks/results/cuda-model.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from table_parts import grid, measured

RESULTS = Path(__file__).parent / "results"


def model(record: dict[str, Any]) -> str:
    ran = _of_copy()
    rows = []
    for row in record["rows"]:
        low, high = row["percent"]
        time = ran.get(tuple(row["bench"]))
        rows.append([
            row["title"],
            ", ".join(f"{each['pass']} {each['instructions']:.1f}" for each in row["passes"]),
            ", ".join(f"{each['special']:.1f}" for each in row["passes"]),
            f"{row['outside']['instructions']:.0f}",
            f"{row['registers']} x {row['resident']}",
            f"{row['in_flight'] / 1024:.0f}",
            f"{low:.0f} to {high:.0f} %, {row['limit']}",
            "-" if row["bar"] is None else f"{row['bar']:.0f} %",
            "-" if time is None else f"{time:.0%}",
        ])  # fmt: skip
    header = [
        "call",
        "instructions",
        "MUFU",
        "outside",
        "registers x blocks",
        "KiB in flight",
        "bound",
        "bar",
        "measured",
    ]
    missed = (
        f"{record['bad']} of {record['kernels']} calls miss their bars." if record["bad"] else "No call misses its bar."
    )
    return f"{grid(header, rows)}\n\n{missed} `python benchmarks/cuda_report.py --model`, {record['by']}."


def _of_copy() -> dict[tuple[str, ...], float]:
    """The measured shares of a copy's speed, where a GPU has run the bench."""
    found = {}
    for noun in ("distill", "topk", "latent"):
        path = RESULTS / f"{noun}-cuda.json"
        for row in measured(json.loads(path.read_text())) if path.exists() else ():
            if row["backend"] == "native" and row["of_copy"] is not None:
                found[noun, row["op"], row["shape"], row["dtype"]] = row["of_copy"]
    return found
