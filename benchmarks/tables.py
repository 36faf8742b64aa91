"""Writes the tables of the README and of docs/performance from benchmarks/results/*.json.

    python benchmarks/tables.py [--check]

A table stands between ``<!-- table: NAME -->`` and ``<!-- end -->``. With ``--check`` nothing is written: exit status 1
says that a page does not show what the result files hold.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import scaling_tables
from demo_tables import digits, docstrings, glyphs, glyphs_line, lm, methods, replay, retrieval, tail
from model_table import model
from op_tables import (
    cache,
    contrast,
    cuda,
    distill,
    explore,
    gpu,
    latent,
    linear,
    listwise,
    loss_options,
    tokens,
    topk,
    vocab_parallel,
)
from step_tables import step
from table_parts import grid, measured, ms, times

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

GPU_OPS = ("distill", "linear", "topk", "latent", "tokens", "explore", "contrast", "listwise", "step")
NOT_YET = {f"{noun}-cuda": "*Not yet measured on a GPU.*" for noun in GPU_OPS}
NOT_YET["gpu-cuda"] = "*Nothing has run on a GPU yet.*"


def wheels(record: dict[str, Any]) -> str:
    rows = []
    for row in record["rows"]:
        versions = row["versions"]
        _, _, python, _, platform = row["wheel"].removesuffix(".whl").split("-")
        rows.append([
            f"`{versions['tgt-fast']}`, {python}, {platform}", f"{row['bytes'] / 2**20:.1f} MiB", versions["python"],
            versions["torch"], versions["numpy"], row.get("tests", "-"),
        ])  # fmt: skip
    header = ["wheel", "size", "Python", "PyTorch", "NumPy", "tests of the suite"]
    return grid(header, rows)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "digits": digits,
    "replay-digits-random": replay,
    "replay-digits-gradient": replay,
    "tail-digits": tail,
    "methods-digits": methods,
    "glyphs": glyphs,
    "docstrings": docstrings,
    "retrieval": retrieval,
    "lm": lm,
    "distill-cpu": distill,
    "linear-cpu": linear,
    "topk-cpu": topk,
    "latent-cpu": latent,
    "explore-cpu": explore,
    "cache-cpu": cache,
    "tokens-cpu": tokens,
    "contrast-cpu": contrast,
    "listwise-cpu": listwise,
    "loss-options-cpu": loss_options,
    "step-cpu": step,
    "vocab-parallel-cpu": vocab_parallel,
    "distill-cuda": cuda,
    "linear-cuda": linear,
    "topk-cuda": cuda,
    "latent-cuda": cuda,
    "tokens-cuda": cuda,
    "explore-cuda": explore,
    "contrast-cuda": contrast,
    "listwise-cuda": cuda,
    "step-cuda": step,
    "gpu-cuda": gpu,
    "cuda-model": model,
    "wheels": wheels,
    "scaling-cpu": scaling_tables.points,
}


def summary() -> str:
    """A line of each result file, for the README: the first case, which is the largest."""
    lines, sources = [], {}
    for noun, called in _SUMMED.items():
        record = json.loads((RESULTS / f"{noun}-cpu.json").read_text())
        row = measured(record)[0]
        shape = row.get("shape") or f"{row.get('rows', row.get('samples'))} x {row.get('classes', row.get('size'))}"
        compiled = times(row.get("over_compile"))
        lines.append([called, shape, ms(row["milliseconds"]["ours"]), times(row["over_eager"]), compiled])
        sources[f"{record['hardware']}; torch {record['versions']['torch']}"] = None
    caption = "Median milliseconds, and the speed over PyTorch in the same run. " + "; ".join(sources) + "."
    return grid(["float32, CPU", "shape", "ms", "over eager", "over torch.compile"], lines) + "\n\n" + caption


def ops() -> str:
    """Which op has kernels where, and whether these have run on a GPU."""
    path = RESULTS / "gpu-cuda.json"
    kernels = json.loads(path.read_text())["kernels"] if path.exists() else {}
    well = [found["status"] == "ok" for found in kernels.values()]
    ran = "not yet" if not well else "yes" if all(well) else "in part"
    rows = [[name, "C++", cuda, triton, ran] for name, (cuda, triton) in _KERNELS.items()]
    return grid(["op", "CPU", "CUDA", "Triton", "run on a GPU"], rows)


_SUMMED = {
    "distill": "distillation loss and cross-entropy",
    "linear": "the same from hidden states",
    "topk": "against a record of 64 classes",
    "contrast": "contrastive loss",
    "latent": "keyed noise",
}
_KERNELS = {
    "`distillation_loss`": ("yes", "yes"),
    "... against a top-k record": ("yes", "-"),
    "`linear_distillation_loss`, `contrastive_distillation_loss`": ("yes", "yes"),
    "`perturb_latents`, `ascend_latents`": ("yes", "yes"),
    "`listwise_distillation_loss`": ("-", "yes"),
    "`sample_tokens`": ("yes", "-"),
    "`soft_embedding`": ("-", "yes"),
}


def body(name: str) -> str:
    if name in _MADE:
        return _MADE[name]()
    path = RESULTS / f"{name}.json"
    return (
        TABLES[name](json.loads(path.read_text())) if path.exists() else NOT_YET.get(name, "*No committed result yet.*")
    )


def _scaling(table: Callable[[dict[str, Any]], str]) -> Callable[[], str]:
    return lambda: table(json.loads((RESULTS / "scaling-cpu.json").read_text()))


def _glyphs_line() -> str:
    return glyphs_line(json.loads((RESULTS / "glyphs.json").read_text()))


_MADE: dict[str, Callable[[], str]] = {
    "glyphs-line": _glyphs_line,
    "summary": summary,
    "ops": ops,
    "scaling": _scaling(scaling_tables.calculated),
    "scaling-limits": _scaling(scaling_tables.limits),
}
_PLACE = re.compile(r"(<!-- table: ([\w-]+) -->\n).*?(<!-- end -->)", re.DOTALL)


def pages() -> list[Path]:
    """Every page that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def rendered(text: str) -> str:
    """A page with every table that it has made anew."""
    return _PLACE.sub(lambda match: f"{match[1]}{body(match[2])}\n{match[3]}", text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; fail if a page is out of date")
    arguments = parser.parse_args()
    texts = {page: page.read_text() for page in pages()}
    places = [match[2] for text in texts.values() for match in _PLACE.finditer(text)]
    for name in (*TABLES, *_MADE):
        if places.count(name) != 1:
            sys.exit(f"the pages have {places.count(name)} places for the table {name!r}, expected 1")
    stale = [page for page, text in texts.items() if rendered(text) != text]
    if arguments.check:
        named = ", ".join(page.relative_to(ROOT).as_posix() for page in stale)
        sys.exit(f"{named}: not what the committed results say; run python benchmarks/tables.py" if stale else 0)
    for page in stale:
        page.write_text(rendered(texts[page]))


if __name__ == "__main__":
    main()
