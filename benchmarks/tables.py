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
from demo_tables import digits, docstrings, grid, lm, replay, retrieval

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"

TOP_K, TOP_P = 50, 0.95  # of tgt_fast/bench/tokens.py


def _source(record: dict[str, Any]) -> str:
    versions, commit = record["versions"], f"commit {record['commit']}, {record['date']}"
    return f"`{record['command']}`, {record['hardware']}; torch {versions['torch']}; {commit}."


def _measured(record: dict[str, Any]) -> list[dict[str, Any]]:
    """The rows that were not left out, for want of memory for example."""
    return [row for row in record["rows"] if row.get("status", "ok") == "ok"]


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}x"


def _ms(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def distill(record: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['divergence']} + CE, {row['rows']} x {row['classes']}, {row['dtype']}",
            _ms(row["milliseconds"]["ours"]),
            _times(row["over_eager"]),
            _times(row["over_compile"]),
            f"{row['milliseconds']['copy'] / row['milliseconds']['ours']:.0%}",
        ]
        for row in _measured(record)
    ]
    peak = next(row["peak_extra"] for row in record["rows"] if "peak_extra" in row)
    caption = (
        "Forward and backward, median milliseconds, and the speed relative to rivals in the same run. The last column "
        "is the time of plainly copying as many bytes. Peak extra memory of the first row, in units of the student's "
        f"logits: {peak['ours']:.2f}, eager {peak['eager']:.2f}. Liger's kernels need a GPU. " + _source(record)
    )
    return grid(["distillation loss", "ms", "over eager", "over torch.compile", "copy"], rows) + "\n\n" + caption


def linear(record: dict[str, Any]) -> str:
    """On either device: the floor is arithmetic, so a rate of that and not of bytes."""
    caption = (
        "Forward and backward, rows x (hidden sizes of student and teacher) x classes: median milliseconds, TFLOP/s of "
        "the products that the loss and the gradients take, the speed relative to rivals in the same run, and the peak "
        "of memory beyond what is returned. Chunks: the loss of 256 rows at a time under `torch.utils.checkpoint`. "
        "`linear_cross_entropy`: both terms by PyTorch's own function, which has chunks for labels alone. In bfloat16 "
        "the rivals round logits before the softmax, and multiply faster for it; ours never rounds them. Peak of the "
        "first row with its gradients, in units of the student's logits: "
    )
    return _chunked(record, "distillation loss from hidden states", caption)


def contrast(record: dict[str, Any]) -> str:
    caption = (
        "Forward and backward to the student's towers, queries x (sizes of the student's and the teacher's vectors) x "
        "passages: median milliseconds, TFLOP/s of the products, the speed relative to rivals in the same run, and the "
        "peak of memory beyond what is returned. In bfloat16 the rivals round scores before the softmax, and multiply "
        "faster for it. Peak of the first row with its gradients, in units of the student's scores: "
    )
    return _chunked(record, "contrastive distillation loss", caption)


def _chunked(record: dict[str, Any], name: str, caption: str) -> str:
    measured = _measured(record)
    others = ("eager", "compile", "chunked", "linear_cross_entropy", *PEERS)
    shown = [
        (key, f"over {_CALLED.get(key, key)}") for key in others if any(row.get(f"over_{key}") for row in measured)
    ]
    rows = [
        [
            f"{row['op']}, {row['shape']}, {row['dtype']}",
            _ms(row["milliseconds"]["ours"]),
            f"{row['flops'] / row['milliseconds']['ours'] / 1e9:.3g}",
            *(_times(row.get(f"over_{key}")) for key, _ in shown),
            # Nothing: the peak of setting up was higher, so the call's own is not known.
            f"{extra / 2**20:.0f}" if (extra := row.get("extra_memory_bytes") or 0) > 0 else "-",
        ]
        for row in measured
    ]
    peak = next((row["peak_extra"] for row in measured if "peak_extra" in row), {})
    peaks = [f"{_CALLED.get(name, name)} {peak[name]:.2f}" for name in peak if name != "ours"]
    said = ", ".join([f"{peak['ours']:.2f}" if "ours" in peak else "not measured", *peaks])
    header = [name, "ms", "TFLOP/s", *(called for _, called in shown), "extra MiB"]
    return grid(header, rows) + "\n\n" + caption + said + ". " + _source(record)


def topk(record: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['op']}, {row['shape']}, {row['dtype']}",
            _ms(row["milliseconds"]["ours"]),
            _times(row["over_eager"]),
            _times(row["over_compile"]),
            f"{row['milliseconds']['copy'] / row['milliseconds']['ours']:.0%}",
        ]
        for row in _measured(record)
    ]
    caption = (
        "Forward and backward, median milliseconds, beside the dense KL divergence from the teacher's logits, which is "
        "what there is without a record. The last column is the time of plainly copying as many bytes. "
    )
    header = ["loss against a top-k record", "ms", "over dense eager", "over dense torch.compile", "copy"]
    return grid(header, rows) + "\n\n" + caption + _source(record)


def latent(record: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['op']}, {row['samples']} x {row['size']}",
            _ms(row["milliseconds"]["ours"]),
            _times(row["over_eager"]),
            _times(row["over_compile"]),
        ]
        for row in _measured(record)
    ]
    return grid(["latent op, float32", "ms", "over eager", "over torch.compile"], rows) + "\n\n" + _source(record)


def explore(record: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['op']}, batch {row['batch']}",
            _ms(row["milliseconds"]["ours"]),
            _ms(row["milliseconds"]["eager"]) if "eager" in row["milliseconds"] else "-",
            _times(row.get("over_eager")),
        ]
        for row in _measured(record)
    ]
    caption = (
        "Gradient exploration, convolutional decoder, labeler and student: encode, climb one step, decode, label. "
        "Eager: the same written with `loss.backward()`. "
    )
    return grid(["exploration", "ms", "eager ms", "over eager"], rows) + "\n\n" + caption + _source(record)


def step(record: dict[str, Any]) -> str:
    rows = [
        [
            row["op"].replace("plain", "every example fresh"),
            _ms(row["milliseconds"]["ours"]),
            f"{row['batch'] / row['milliseconds']['ours'] * 1e3:,.0f}",
            f"{row['batch'] / row['milliseconds']['eager'] * 1e3:,.0f}" if "eager" in row["milliseconds"] else "-",
            _times(row.get("over_eager")),
        ]
        for row in _measured(record)
    ]
    caption = (
        f"A whole training step on {_measured(record)[0]['shape']}: residual labeler, convolutional autoencoder and "
        "student, loss, backward pass, Adam. Eager: the same step by hand, teacher frozen and without graphs, the "
        "gradient in the latents alone; it has every example fresh. Cache: labels and latents of real examples are "
        f"stored; replay: each synthetic one serves {_REUSE} times; prefetch: a thread explores ahead, where PyTorch "
        "leaves it a core. "
    )
    if load := record.get("load", {}).get("average"):
        caption += f"Load average at the start: {load:.1f}. "
    header = ["training step", "ms", "real examples/s", "eager examples/s", "over eager"]
    return grid(header, rows) + "\n\n" + caption + _source(record) + "\n\n" + _step_parts(record)


def _step_parts(record: dict[str, Any]) -> str:
    """The networks' shares, of the contenders with most and least to do."""
    rows = []
    for row in _measured(record):
        shown = {"eager": f"{row['mode']}, eager"} if row.get("parts") == "" else {}
        for name, called in {**shown, "ours": row["op"].replace("plain", "every example fresh")}.items():
            found = row.get("parts_milliseconds", {}).get(name, {})
            rows.append([called, *(_ms(found[part]) if part in found else "-" for part in _STEP_PARTS)])
    caption = (
        "Milliseconds of a step by network, under a profiler, which takes some of them. Student: with its backward "
        "pass. Slope: of gradient mode, through decoder, labeler and student and back to the latents; of ours what "
        "goes back alone, the ways forward being those networks'."
    )
    return grid(["where the time goes", *_STEP_PARTS], rows) + "\n\n" + caption


_STEP_PARTS = ("encoder", "decoder", "labeler", "slope", "student", "loss", "optimizer", "else")
_REUSE = 8  # of tgt_fast/bench/step.py


def cache(record: dict[str, Any]) -> str:
    rows = [
        [
            row["case"],
            row["order"],
            f"{row['rows_per_second']:,.0f}",
            f"{row['bytes_per_second'] / 1e6:,.0f}",
            *("-" if row.get(name) is None else f"{row[name]:.2f}x" for name in CACHE_RIVALS),
        ]
        for row in _measured(record)
    ]
    caption = (
        "`TeacherCache.read` in batches, and its speed relative to plain reads of rows of as many bytes in the same "
        "run: `numpy.memmap` indexed by the ids, `os.pread` and safetensors' `safe_open` a row, `read()` of a file. In "
        "order and shuffled: out of the page cache. Cold: a cache is opened and read once in order, from the disk, "
        f"checksums included. Load average at the start: {record['load']:.1f}. "
    )
    header = ["teacher cache", "order", "rows/s", "MB/s", "over memmap", "over pread", "over safe_open", "over read()"]
    return grid(header, rows) + "\n\n" + caption + _source(record)


def tokens(record: dict[str, Any]) -> str:
    rows = [
        [
            f"{row['op']}, {row['shape']}",
            _ms(row["milliseconds"]["ours"]),
            _ms(row["milliseconds"]["eager"]),
            _times(row["over_eager"]),
        ]
        for row in _measured(record)
    ]
    peak = next(row["peak_extra"] for row in record["rows"] if "peak_extra" in row)
    share = (peak["ours"] - 1) / (peak["eager"] - 1)
    caption = (
        f"Sampling, top-k {TOP_K} and top-p {TOP_P}, against a sort, a cut and `torch.multinomial`; a soft embedding, "
        "forward and backward to the logits, against `F.gumbel_softmax(logits) @ table` (plain: `torch.softmax`). Peak "
        f"extra memory of the one with noise, beyond its gradient: {share:.0%} of eager's. "
    )
    return grid(["tokens, float32", "ms", "eager ms", "over eager"], rows) + "\n\n" + caption + _source(record)


def cuda(record: dict[str, Any]) -> str:
    """Ops on a GPU whose floor is the bytes that move; rivals as far as they were measured."""
    rows = _measured(record)
    several = len({row["backend"] for row in rows}) > 1
    lines = []
    for row in rows:
        name = f"{row['op']}, {row['shape']}, {row['dtype']}" + (f", {row['backend']}" if several else "")
        others = {key.removeprefix("over_"): row[key] for key in row if key.startswith("over_") and row[key]}
        eager, compiled = others.pop("eager", None), others.pop("compile", None)
        best = min(others, key=others.__getitem__, default=None)  # the fastest of them: least ahead of it are we
        lines.append(
            [
                name,
                _ms(row["milliseconds"]["ours"]),
                f"{row['bytes_per_second'] / 1e9:.0f}",
                f"{row['of_copy']:.0%}",
                _times(eager),
                _times(compiled),
                "-" if best is None else f"{best} {others[best]:.1f}x",
            ]
        )
    peers = [f"{name} {found}" for name, found in record["versions"].items() if name in PEERS]
    caption = (
        "Median milliseconds of a call (of the loss: forward and backward) with a cold L2 cache, the bytes that have "
        "to move (each input read once, each result written once) by that time, the share of a plain copy's "
        f"{record['copy_bytes_per_second'] / 1e9:.0f} GB/s in the same run, and the speed relative to rivals"
        + (f" ({', '.join(peers)})" if peers else "")
        + f". Driver {record['driver']}. "
        + _source(record)
    )
    header = ["", "ms", "GB/s", "of copy", "over eager", "over torch.compile", "best other"]
    return grid(header, lines) + "\n\n" + caption


def gpu(record: dict[str, Any]) -> str:
    """Runs on a GPU and their results: ``benchmarks/gpu.sh``."""
    kernels, checks, tests = (record.get(name, {}) for name in ("kernels", "checks", "tests"))
    bad = [f"{name}: {found['status']}" for name, found in kernels.items() if found["status"] != "ok"]
    wrong = [f"{name}: {status}" for name, status in checks.items() if status not in ("ok", "skipped")]
    left = [f"{tests[key]} {called}" for key, called in _OF_TESTS.items() if tests.get(key)]
    left += [each["test"] for each in tests.get("failures", [])]
    found = [
        ["calls that reach every kernel", f"{len(kernels) - len(bad)} of {len(kernels)}", "; ".join(bad)],
        ["tests", str(tests.get("passed", 0)), "; ".join(left)],
        ["benchmark cases against float64", f"{len(checks) - len(wrong)} of {len(checks)}", "; ".join(wrong)],
    ]
    for tool, one in record.get("sanitizer", {}).items():
        found.append([tool, f"{one['calls']} calls", one["note"] or one["outcome"]])
    return grid(["on a GPU", "well", "and else"], found) + f"\n\nDriver {record['driver']}. " + _source(record)


_OF_TESTS = {"failed": "failed", "skipped": "skipped", "missing": "not reached"}
PEERS = ("liger", "orda", "quack", "cce")
_CALLED = {"compile": "torch.compile", "chunked": "chunks", "linear_cross_entropy": "`linear_cross_entropy`"}
GPU_OPS = ("distill", "linear", "topk", "latent", "tokens", "explore", "contrast", "step")
NOT_YET = {f"{noun}-cuda": "*Not yet measured on a GPU.*" for noun in GPU_OPS}
NOT_YET["gpu-cuda"] = "*Nothing has run on a GPU yet.*"
CACHE_RIVALS = ("over_memmap", "over_pread", "over_safe_open", "over_file")


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
    "step-cpu": step,
    "distill-cuda": cuda,
    "linear-cuda": linear,
    "topk-cuda": cuda,
    "latent-cuda": cuda,
    "tokens-cuda": cuda,
    "explore-cuda": explore,
    "contrast-cuda": contrast,
    "step-cuda": step,
    "gpu-cuda": gpu,
    "wheels": wheels,
    "scaling-cpu": scaling_tables.points,
}


def summary() -> str:
    """A line of each result file, for the README: the first case, which is the largest."""
    lines, sources = [], {}
    for noun, called in _SUMMED.items():
        record = json.loads((RESULTS / f"{noun}-cpu.json").read_text())
        row = _measured(record)[0]
        shape = row.get("shape") or f"{row.get('rows', row.get('samples'))} x {row.get('classes', row.get('size'))}"
        compiled = _times(row.get("over_compile"))
        lines.append([called, shape, _ms(row["milliseconds"]["ours"]), _times(row["over_eager"]), compiled])
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


_MADE: dict[str, Callable[[], str]] = {
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
